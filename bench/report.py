"""The README.md and the pictures of a folder of results, made from its JSON files alone."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.data import table as loading
from bench.ledger.cost import H200, KINDS
from bench.resources import COLUMNS
from bench.results import UNITS, Row, markdown_table, read_folder, read_json, significant, speed_up
from epg_fast.files import write_atomically

OURS = ("triton", "cuda", "extension", "extension, in place")
"""Variants of operations that are the package's."""

# Okabe and Ito's colours, which colour-blind readers tell apart, too; products, of which nothing can be saved, in grey.
_COLOURS = {"plain": "#999999", "plain, torch.compile": "#E69F00", "ours": "#D55E00", "ours, FP8": "#0072B2"}
_COLOURS |= zip(KINDS, ("#BBBBBB", "#777777", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7"), strict=True)

_LADDERS = """\
A row is one way of doing the job; speed-up is against the first row with a number. Numbers are medians with their 20th
and 80th percentiles. Peak memory is the allocator's. MFU is the job's matrix products over what a large bfloat16
product reached in the same process, FP8 included; floor is the least time that products and bytes take at measured
ceilings (`bench.roofline`), over the time taken. The error of sampling is the relative L2 of images against the plain
code in float32 from the same noise, with random weights; that of training is of the first losses, likewise. Rows
without numbers say why.
"""

FLOORS = (
    "These are floors, counted and not measured: no gaps between launches, every product and every access perfect; "
    "a GPU takes longer."
)
_LEDGER = f"""\
A floor is the sum over kernels of the longer of their FLOP at {H200.products / 1e12:.0f} TFLOP/s (twice that in FP8)
and their bytes at {H200.memory / 1e12:.1f} TB/s. The rival is the best of the plain code and the package's plain
operations under torch.compile; the minimum has one kernel for everything that can ride in one (`bench.roofline`),
and moves 16 bits where kernels in FP8 may move 8.
"""
RESOURCES = (*COLUMNS, "resident")
"""Of a kernel on sm_90, with the blocks that a multiprocessor holds."""
OWN_PRODUCTS = "products of our own"
"""The job of rows that `bench.ledger.products` studies."""
_PRODUCTS = """\
Break-even: how much slower than a library's a product may be before what its operation saves is gone. Its model: how
much slower unfilled tiles and the unfilled last wave make it, the part of a slow-down that arithmetic knows; the
library's is taken to lose nothing to either. A product whose model is worse than its break-even is not a win.
"""


def write(folder: Path) -> str:
    """Write the README.md and the pictures of `folder`; returns the text. Raises ValueError if nothing is in it."""
    found = read_folder(folder)
    *_, (header, _) = found.values()
    sections = [
        f"{FLOORS}\n" if "ledger" in found else "",
        f"# Benchmarks on {header['device']}\n",
        _missing(folder),
        f"## Ladders\n\n{_LADDERS}" if {"sampling", "training"} & set(found) else "",
        *(
            section(found[name][1], folder / f"{name}.png", header)
            for name, section in _SECTIONS.items()
            if name in found
        ),
        "## This machine\n\n" + "".join(f"- {name}: {value}\n" for name, value in header.items()),
    ]
    text = "\n".join(filter(None, sections))
    write_atomically(folder / "README.md", text)
    return text


def _missing(folder: Path) -> str:
    """What was not done, by the notes of `python -m bench`."""
    if not (folder / "progress.json").exists():
        return ""
    outcomes = read_json(folder / "progress.json").items()
    missing = "".join(f"- {name}: {outcome}\n" for name, outcome in outcomes if outcome != "complete")
    return f"Missing:\n\n{missing}" if missing else "All parts are complete.\n"


def _groups(rows: Sequence[Row], key: Callable[[Row], object]) -> list[list[Row]]:
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _error(row: Row) -> str:
    return "" if row.error is None else f"{row.error:.1e}" if row.error else "0"


def _times(factor: float) -> str:
    return f"{significant(factor)}x"


def ladder_table(rows: Sequence[Row]) -> str:
    """A row per variant, against the first one that was measured."""
    first, cells = next((row for row in rows if row.median is not None), None), []
    for row in rows:
        numbers = [""] * 3
        if row.median is not None:
            numbers = [significant(row.median), row.spread, _times(speed_up(row, first))]
        peak = row.peak_memory_bytes and significant(row.peak_memory_bytes / 2**30)
        shares = [f"{100 * row.details[name]:.1f}%" if name in row.details else "" for name in ("mfu", "floor")]
        psnr = significant(row.details.get("psnr_db"))
        cells.append((row.variant, row.dtype, *numbers, peak, *shares, _error(row), psnr, row.note))
    columns = ("variant", "dtype", rows[0].unit, "p20 to p80", "speed-up", "peak, GiB", "MFU", "floor", "error")
    return markdown_table((*columns, "PSNR, dB", "note"), cells)


def _ladders(rows: list[Row], picture: Path, header: dict) -> str:
    parts, panels = [], []
    for ladder in _groups(rows, lambda row: (row.job, row.shape)):
        parts += [f"### {ladder[0].job}: {ladder[0].shape}\n", ladder_table(ladder)]
        parts += [_longest(row) for row in ladder if "longest" in row.details]
        if any(row.median is not None for row in ladder):
            panels.append(_panel(ladder))
    if panels and draw(panels, picture, f"{header['device']}, torch {header['torch']}"):
        parts.insert(0, f"![{picture.stem}]({picture.name})\n")
    return "\n".join(parts)


def _longest(row: Row) -> str:
    """The longest kernels of a variant (operators on a CPU)."""
    found = row.details["longest"]
    whole, kernels = (
        found["milliseconds"],
        [*found["kernels"], *([("nothing", found["idle"])] if found["idle"] else [])],
    )
    cells = [(name, significant(ms), f"{100 * ms / whole:.0f}%") for name, ms in kernels]
    title = f"<details><summary>{row.variant}: the longest kernels of {significant(whole)} ms</summary>\n\n"
    return title + markdown_table(("kernel", "ms", "share"), cells) + "\n</details>\n"


def _turns(rows: list[Row], *_) -> str:
    """A row per job that was done in turns."""
    cells, plain = [], {(row.job, row.shape): row for row in rows if row.variant == "plain"}
    for row in rows:
        if row.variant != "plain":
            ratio = row.details.get("ratio")
            ratios = (
                (_times(ratio["median"]), f"{_times(ratio['p20'])} to {_times(ratio['p80'])}") if ratio else ("", "")
            )
            numbers = significant(plain[row.job, row.shape].median), significant(row.median)
            cells.append((row.job, row.shape, *numbers, *ratios, _error(row), row.note))
    columns = ("job", "shape", "plain, ms", "ours, ms", "plain / ours", "p20 to p80 of pairs", "error", "note")
    how = "The package as it comes and the plain code, in turns; above 1 the package is faster.\n"
    return f"## In float32, in turns\n\n{how}\n{markdown_table(columns, cells)}"


def _operations(rows: list[Row], _, header: dict) -> str:
    """A row per operation and shape: the package's fastest kernel against the others' fastest.

    Shares of the ceilings are those of a GPU: small shapes stay in a CPU's caches.
    """
    cells, measured = [], [row for row in rows if row.median is not None]
    for found in _groups(measured, lambda row: (row.job, row.shape, row.dtype)):
        ours, others = (
            min((row for row in found if (row.variant in OURS) == own), key=lambda row: row.median, default=None)
            for own in (True, False)
        )
        kinds = [row and f"{significant(row.median)} ({row.variant})" for row in (ours, others)]
        factor = ours and others and _times(speed_up(ours, others))
        roof = ours and max(ours.details.get("percent_of_copy", 0), ours.details.get("percent_of_gemm", 0))
        share = f"{roof:.0f}%" if roof and header["gpu"] != "none" else ""
        cells.append((found[0].job, f"{found[0].shape}, {found[0].dtype}", *kinds, factor, share))
    columns = ("operation", "of", "ours, us", "the fastest other, us", "other / ours", "ours of the roof")
    return f"## Operations\n\n{markdown_table(columns, cells)}"


# ---------------------------------------------------------------------------------------------------------- the ledger


def best(rows: Sequence[Row], ours: bool) -> Row | None:
    """The lowest floor of the package's kernels, or of everything else: the rival."""
    here = [row for row in rows if row.median is not None and row.variant.startswith("ours") == ours]
    return min(here, key=lambda row: row.median, default=None)


def _ledger(rows: list[Row], picture: Path, _) -> str:
    jobs = _groups([row for row in rows if row.unit == "ms"], lambda row: row.job)
    summary, panels, every, phases, problems = [], [], [], [], []
    for found in jobs:
        name, of = found[0].job, f"{found[0].shape}, {found[0].dtype}"
        sides = {"rival": best(found, False), "ours": best(found, True)}
        rival, ours = sides.values()
        least = next((row.details["least"] for row in (rival, ours) if row), {})
        cells = []
        for row in sides.values():
            cells += [row and f"{row.variant}: {significant(row.median, 4)}", row and row.details["kernels"]]
        gain = ours and rival and f"{100 * (1 - ours.median / rival.median):.1f}%"
        summary.append((name, of, *cells, gain, least and significant(sum(least.values()), 4)))
        bars = [
            Bar(f"{what}: {row.variant}", row.details["milliseconds"], text=f"{row.details['kernels']:,} kernels")
            for what, row in sides.items()
            if row
        ]
        if bars:
            panels.append(Panel(f"{name}: {of}", "milliseconds", [*bars, Bar("minimum", least)]))
        for row in found:
            d, numbers = row.details, [""] * (4 + len(KINDS))
            if row.median is not None:
                numbers = [d["kernels"], significant(d["gigabytes"], 4), significant(row.median, 4)]
                numbers += map(significant, (d["above_products"], *map(d["milliseconds"].get, KINDS)))
            every.append((name, row.variant, *numbers, row.note))
            for phase, p in d.get("phases", {}).items() if len(d.get("phases", {})) > 1 else ():
                floor = significant(sum(p["milliseconds"].values()), 4)
                phases.append((name, row.variant, phase, p["kernels"], significant(p["gigabytes"], 4), floor))
            for text, n in d.get("problems", {}).items():
                problems.append(f"- {name}, {row.variant}: {text}{f' ({n} times)' * (n > 1)}\n")
    picture_line = f"![ledger]({picture.name})\n\n" if panels and draw(panels, picture, FLOORS) else ""
    nothing = (
        "No graph break, no second compilation, no wait of the host, no tensor on the CPU in a graph, and no operator "
        "whose launcher and fake implementation disagree.\n"
    )
    columns = ("job", "of", "rival, ms", "kernels", "ours, ms", "kernels", "gain", "minimum, ms")
    more = ("job", "by", "kernels", "GB", "floor, ms", "above products", *KINDS, "note")
    parts = [
        f"## Ledger: what a Hopper GPU would be given\n\n{_LEDGER}\n{picture_line}{markdown_table(columns, summary)}",
        f"### Every count\n\n{markdown_table(more, every)}",
        f"### Phases\n\n{markdown_table(('job', 'by', 'phase', 'kernels', 'GB', 'floor, ms'), phases)}",
        f"### What should not be\n\n{''.join(problems) or nothing}",
    ]
    if studied := [row for row in rows if row.job == OWN_PRODUCTS]:
        parts.append(f"### Matrix products of our own\n\n{_PRODUCTS}\n{_own_products(studied)}")
    if used := {tuple(cells) for row in rows for cells in row.details.get("resources", ())}:
        parts.append(f"### Our Triton kernels on sm_90\n\n{markdown_table(RESOURCES, sorted(used, key=str))}")
    return "\n".join(parts)


def _own_products(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        d = row.details
        result, tile = (" x ".join(map(str, d[name])) for name in ("result", "tile"))
        lost = (f"+{100 * (d[name] - 1):.1f}%" for name in ("unfilled", "idle"))
        numbers = significant(d["floor_us"]), *lost, significant(row.median)
        outcome = f"{d['slowdown']:.3f}", f"{d['break_even']:.3f}", d["outcome"]
        cells.append((row.variant, result, tile, d["resident"], f"{d['waves']:.2f}", *numbers, *outcome))
    columns = ("product", "result", "tile", "resident", "waves", "floor, us", "unfilled tiles", "last wave")
    return markdown_table((*columns, "with both, us", "model", "break-even", "outcome"), cells)


_SECTIONS = {
    "sampling": _ladders,
    "training": _ladders,
    "turns": _turns,
    "ops": _operations,
    "data": lambda rows, *_: f"## Loading\n\n{loading(rows)}",
    "ledger": _ledger,
}
"""Of files: section(rows, picture, header)."""


# ------------------------------------------------------------------------------------------------------------ pictures


class Bar(NamedTuple):
    """A bar of stacked parts; spread: ends of a line on it; text: behind the sum."""

    label: str
    parts: dict[str, float]
    spread: tuple[float, float] = (0.0, 0.0)
    text: str = ""


class Panel(NamedTuple):
    title: str
    unit: str
    bars: list[Bar]


def _panel(rows: Sequence[Row]) -> Panel:
    """Of a ladder."""
    bars = []
    for row in rows:
        label = f"{row.variant} ({row.dtype})"
        if row.median is None:
            bars.append(Bar(label, {}, text=row.note[:90]))
            continue
        part = "ours, FP8" if row.dtype == "fp8" else "ours" if row.variant.startswith("ours") else row.variant
        text = f"{row.details['mfu']:.0%} of the GEMM ceiling"
        bars.append(Bar(label, {part if part in _COLOURS else "plain": row.median}, (row.p20, row.p80), text))
    unit = f"{rows[0].unit}, {UNITS[rows[0].unit]} is better; the line is the 20th to the 80th percentile"
    return Panel(f"{rows[0].job}: {rows[0].shape}", unit, bars)


def draw(panels: list[Panel], path: Path, title: str) -> bool:
    """Write the PNG, 1200 pixels wide; whether matplotlib is here to do so."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        print(f"{path.name} needs matplotlib: pip install 'epg_fast[demo]'", file=sys.stderr)
        return False
    heights = [0.35 * len(panel.bars) + 1.0 for panel in panels]
    figure = Figure(figsize=(12, sum(heights) + 1.1), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11, wrap=True)
    places = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(places, panels, strict=True):
        most = max(max(sum(bar.parts.values()), *bar.spread) for bar in panel.bars)
        for place, bar in enumerate(panel.bars):
            end = 0.0
            for name, value in bar.parts.items():
                axes.barh(place, value, left=end, color=_COLOURS[name], height=0.72)
                end += value
            if any(bar.spread):
                axes.plot(bar.spread, (place, place), color="black", linewidth=1)
            number = f"{significant(end, 4)}   " if end else ""
            axes.text(max(end, *bar.spread) + 0.008 * most, place, number + bar.text, va="center", fontsize=9)
        axes.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars], fontsize=9)
        axes.set_ylim(len(panel.bars) - 0.5, -0.5)
        axes.set_xlim(0, 1.35 * most)
        axes.set_xlabel(panel.unit, fontsize=8)
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    drawn = {name for panel in panels for bar in panel.bars for name in bar.parts}
    handles = [Patch(color=colour, label=name) for name, colour in _COLOURS.items() if name in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())
    return True
