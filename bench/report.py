"""The README.md and the pictures of a folder of results, made from its JSON files alone."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.data import table as loading
from bench.ledger.cost import H200, KINDS
from bench.resources import COLUMNS
from bench.results import UNITS, Row, markdown_table, read, read_json, significant
from epg_fast.files import write_atomically

OURS = ("triton", "cuda", "extension", "extension, in place")
"""Variants of operations that are the package's."""

# Okabe and Ito's colours, which colour-blind readers tell apart, too; products, of which nothing can be saved, in grey.
_GREY, _ORANGE, _RED, _BLUE = "#999999", "#E69F00", "#D55E00", "#0072B2"
_KIND_COLOURS = dict(zip(KINDS, ("#BBBBBB", "#777777", _BLUE, _ORANGE, _RED, "#009E73", "#CC79A7"), strict=True))

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
    found, header = {}, {}
    for path in sorted(folder.glob("*.json")):
        if "schema" in read_json(path):
            header, found[path.stem] = read(path)
    if not found:
        raise ValueError(f"{folder}: holds no results; python -m bench --output {folder} makes some")
    sections = [
        f"{FLOORS}\n" if "ledger" in found else "",
        f"# Benchmarks on {header['device']}\n",
        _missing(folder),
        f"## Ladders\n\n{_LADDERS}" if {"sampling", "training"} & set(found) else "",
        *(_ladders(found.get(name), folder / f"{name}.png", header) for name in ("sampling", "training")),
    ]
    for name, section in (
        ("turns", _turns),
        ("ops", lambda rows: _operations(rows, on_gpu=header["gpu"] != "none")),
        ("data", lambda rows: f"## Loading\n\n{loading(rows)}"),
        ("ledger", lambda rows: _ledger(rows, folder / "ledger.png")),
    ):
        sections.append(section(found[name]) if name in found else "")
    sections.append("## This machine\n\n" + "".join(f"- {name}: {value}\n" for name, value in header.items()))
    text = "\n".join(filter(None, sections))
    write_atomically(folder / "README.md", text)
    return text


def _missing(folder: Path) -> str:
    """What was not done, by the notes of `python -m bench`."""
    if not (folder / "progress.json").exists():
        return ""
    missing = {name: outcome for name, outcome in read_json(folder / "progress.json").items() if outcome != "complete"}
    if not missing:
        return "All parts are complete.\n"
    return "Missing:\n\n" + "".join(f"- {name}: {outcome}\n" for name, outcome in missing.items())


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by job and shape."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.job, row.shape), []).append(row)
    return list(groups.values())


def speed_up(row: Row, base: Row) -> float:
    """How many times as fast as `base` a row of the same unit is."""
    return row.median / base.median if UNITS[row.unit] == "more" else base.median / row.median


def _error(row: Row) -> str:
    return "" if row.error is None else f"{row.error:.1e}" if row.error else "0"


def ladder_table(rows: Sequence[Row]) -> str:
    """A row per variant, against the first one that was measured."""
    first, cells = next((row for row in rows if row.median is not None), None), []
    for row in rows:
        numbers = [""] * 3
        if row.median is not None:
            spread = f"{significant(row.p20)} to {significant(row.p80)}"
            numbers = [significant(row.median), spread, f"{significant(speed_up(row, first))}x"]
        peak = row.peak_memory_bytes and significant(row.peak_memory_bytes / 2**30)
        shares = [f"{100 * row.details[name]:.1f}%" if name in row.details else "" for name in ("mfu", "floor")]
        psnr = significant(row.details.get("psnr_db"))
        cells.append((row.variant, row.dtype, *numbers, peak, *shares, _error(row), psnr, row.note))
    columns = ("variant", "dtype", rows[0].unit, "p20 to p80", "speed-up", "peak, GiB", "MFU", "floor", "error")
    columns = (*columns, "PSNR, dB", "note")
    return markdown_table(columns, cells)


def _ladders(rows: list[Row] | None, picture: Path, header: dict) -> str:
    parts = []
    for ladder in _groups(rows or []):
        parts += [f"### {ladder[0].job}: {ladder[0].shape}\n", ladder_table(ladder)]
        for row in ladder:
            if "longest" in row.details:
                parts.append(_longest(row))
    if any(row.median is not None for row in rows or []):
        panels = [_panel(ladder) for ladder in _groups(rows) if any(row.median is not None for row in ladder)]
        if draw(panels, picture, f"{header['device']}, torch {header['torch']}"):
            parts.insert(0, f"![{picture.stem}]({picture.name})\n")
    return "\n".join(parts)


def _longest(row: Row) -> str:
    """The longest kernels of a variant (operators on a CPU)."""
    found = row.details["longest"]
    whole = found["milliseconds"]
    cells = [(name, significant(ms), f"{100 * ms / whole:.0f}%") for name, ms in found["kernels"]]
    if found["idle"]:
        cells.append(("nothing", significant(found["idle"]), f"{100 * found['idle'] / whole:.0f}%"))
    title = f"<details><summary>{row.variant}: the longest kernels of {significant(whole)} ms</summary>\n\n"
    return title + markdown_table(("kernel", "ms", "share"), cells) + "\n</details>\n"


def _turns(rows: list[Row]) -> str:
    """A row per job that was done in turns."""
    cells, plain = [], {(row.job, row.shape): row for row in rows if row.variant == "plain"}
    for row in rows:
        if row.variant == "plain":
            continue
        ratio = row.details.get("ratio", {})
        spread = f"{significant(ratio['p20'])}x to {significant(ratio['p80'])}x" if ratio else ""
        middle = f"{significant(ratio['median'])}x" if ratio else ""
        numbers = significant(plain[row.job, row.shape].median), significant(row.median), middle, spread
        cells.append((row.job, row.shape, *numbers, _error(row), row.note))
    columns = ("job", "shape", "plain, ms", "ours, ms", "plain / ours", "p20 to p80 of pairs", "error", "note")
    how = "The package as it comes and the plain code, in turns; above 1 the package is faster.\n"
    return f"## In float32, in turns\n\n{how}\n{markdown_table(columns, cells)}"


def _operations(rows: list[Row], on_gpu: bool) -> str:
    """A row per operation and shape: the package's fastest kernel against the others' fastest.

    Shares of the ceilings are those of a GPU: small shapes stay in a CPU's caches.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.median is not None:
            groups.setdefault((row.job, f"{row.shape}, {row.dtype}"), []).append(row)
    cells = []
    for key, found in groups.items():
        ours, others = (
            min((row for row in found if (row.variant in OURS) == own), key=lambda row: row.median, default=None)
            for own in (True, False)
        )
        kinds = [row and f"{significant(row.median)} ({row.variant})" for row in (ours, others)]
        factor = f"{significant(others.median / ours.median)}x" if ours and others else ""
        roof = on_gpu and ours and max(ours.details.get("percent_of_copy", 0), ours.details.get("percent_of_gemm", 0))
        cells.append((*key, *kinds, factor, f"{roof:.0f}%" if roof else ""))
    columns = ("operation", "of", "ours, us", "the fastest other, us", "other / ours", "ours of the roof")
    return f"## Operations\n\n{markdown_table(columns, cells)}"


# ---------------------------------------------------------------------------------------------------------- the ledger


def best(rows: Sequence[Row], ours: bool) -> Row | None:
    """The lowest floor of the package's kernels, or of everything else: the rival."""
    here = [row for row in rows if row.median is not None and row.variant.startswith("ours") == ours]
    return min(here, key=lambda row: row.median, default=None)


def _ledger(rows: list[Row], picture: Path) -> str:
    jobs: dict[str, list[Row]] = {}
    for row in rows:
        if row.unit == "ms":
            jobs.setdefault(row.job, []).append(row)
    summary, every, phases, problems, panels = [], [], [], [], []
    for name, found in jobs.items():
        rival, ours = best(found, False), best(found, True)
        known = rival or ours
        least = known.details.get("least") if known else None
        of = f"{found[0].shape}, {found[0].dtype}"
        cells = [name, of]
        for row in (rival, ours):
            cells += [row and f"{row.variant}: {significant(row.median, 4)}", row and row.details["kernels"]]
        gain = ours and rival and f"{100 * (1 - ours.median / rival.median):.1f}%"
        summary.append((*cells, gain, least and significant(sum(least.values()), 4)))
        bars = [
            Bar(f"{what}: {row.variant}", row.details["milliseconds"], text=f"{row.details['kernels']:,} kernels")
            for what, row in (("rival", rival), ("ours", ours))
            if row
        ]
        if bars:
            bars += [Bar("minimum", least)] if least else []
            panels.append(Panel(f"{name}: {of}", "milliseconds", bars, _KIND_COLOURS))
        for row in found:
            d = row.details
            if row.median is None:
                every.append((name, row.variant, *[""] * (4 + len(KINDS)), row.note))
                continue
            split = [significant(d["milliseconds"][kind]) for kind in KINDS]
            numbers = d["kernels"], significant(d["gigabytes"], 4), significant(row.median, 4)
            every.append((name, row.variant, *numbers, significant(d["above_products"]), *split, row.note))
            for phase, of_phase in d["phases"].items() if len(d["phases"]) > 1 else ():
                floor = significant(sum(of_phase["milliseconds"].values()), 4)
                phases.append(
                    (name, row.variant, phase, of_phase["kernels"], significant(of_phase["gigabytes"], 4), floor)
                )
            times = {text: f" ({n} times)" * (n > 1) for text, n in d["problems"].items()}
            problems += [f"- {name}, {row.variant}: {text}{n}\n" for text, n in times.items()]
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


# ------------------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class Bar:
    """A bar of stacked parts; spread: ends of a line on it; text: behind the sum."""

    label: str
    parts: dict[str, float]
    spread: tuple[float, float] | None = None
    text: str = ""


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    bars: list[Bar]
    colours: dict[str, str]
    """Of the parts."""


def _panel(rows: Sequence[Row]) -> Panel:
    """Of a ladder."""
    colours = {"plain": _GREY, "plain, torch.compile": _ORANGE, "ours": _RED, "ours, FP8": _BLUE}
    bars = []
    for row in rows:
        label = f"{row.variant} ({row.dtype})"
        if row.median is None:
            bars.append(Bar(label, {}, text=row.note[:90]))
            continue
        part = "ours, FP8" if row.dtype == "fp8" else "ours" if row.variant.startswith("ours") else row.variant
        text = f"{row.details['mfu']:.0%} of the GEMM ceiling"
        bars.append(Bar(label, {part if part in colours else "plain": row.median}, (row.p20, row.p80), text))
    unit = f"{rows[0].unit}, {UNITS[rows[0].unit]} is better; the line is the 20th to the 80th percentile"
    return Panel(f"{rows[0].job}: {rows[0].shape}", unit, bars, colours)


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
        most = max(max(sum(bar.parts.values()), *(bar.spread or (0,))) for bar in panel.bars)
        for place, bar in enumerate(panel.bars):
            end = 0.0
            for name, value in bar.parts.items():
                axes.barh(place, value, left=end, color=panel.colours[name], height=0.72)
                end += value
            if bar.spread:
                axes.plot(bar.spread, (place, place), color="black", linewidth=1)
            number = f"{significant(end, 4)}   " if end else ""
            axes.text(max(end, *(bar.spread or (0,))) + 0.008 * most, place, number + bar.text, va="center", fontsize=9)
        axes.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars], fontsize=9)
        axes.set_ylim(len(panel.bars) - 0.5, -0.5)
        axes.set_xlim(0, 1.35 * most)
        axes.set_xlabel(panel.unit, fontsize=8)
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    colours = {name: colour for panel in panels for name, colour in panel.colours.items()}
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())
    return True
