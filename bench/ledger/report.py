"""What the ledger writes: a line per count while it counts, rows as JSON, a report in Markdown, stacked bars.

A count is two rows of `bench.results`, one of its floor in milliseconds and one of its kernels, which
`python -m bench.compare` reads; the details of the first hold the rest.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.ledger.cost import BANDWIDTH, FLOPS, KINDS, Kernel, Total, total
from bench.results import Row, header_lines, markdown_table, significant, write_text

FLOORS = (
    "These are floors, counted and not measured: no gaps between launches, every product and every access perfect; "
    "a GPU takes longer."
)
_MS, _KERNELS = "ms", "kernels"
_PRODUCTS = "products of our own"


def run(chosen: list, variants: list, output: Path | None, *, kernels: bool, resources: bool) -> int:
    """Count, print, and write into a folder what it lacks. Returns the exit code: 1 if a count failed."""
    from bench.ladder import open_results
    from bench.ledger import products
    from bench.results import header

    found = open_results(output / "ledger.json", header()) if output else None
    print(FLOORS, flush=True)
    failed = False
    for job in chosen:
        for variant in variants:
            if found and any((row.job, row.rung) == (job.name, variant.name) for row in found.rows):
                continue
            rows, counter = _counted(job, variant)
            failed |= counter is None and "failed" in rows[0].note
            if counter and kernels:
                print(listing(counter.kernels), flush=True)
            if counter and resources:
                rows[0].details["resources"] = products.resources(counter.launches)
                print(markdown_table(products.RESOURCES, rows[0].details["resources"]), flush=True)
            for row in rows if found else ():
                found.add(row)
            del counter
            gc.collect()
    if found:
        if any(job.name == "sample_xl" for job in chosen) and not any(row.job == _PRODUCTS for row in found.rows):
            for row in products.rows_of(products.study("epg_xl_16_256", 64), _PRODUCTS, "epg_xl_16_256, batch 64"):
                found.add(row)
        write(output, found.header, found.rows)
        print(output / "README.md")
    return int(failed)


def _counted(job, variant) -> tuple[list[Row], object]:
    """(rows of a count, its counter); a row that says why, and None, where there is none."""
    from bench.ledger import jobs

    started, name = time.monotonic(), f"{job.name}, {variant.name}"
    try:
        counter = jobs.count(job, variant)
    except jobs.NotCounted as reason:
        note = str(reason)
    except Exception as error:  # one count that fails does not cost the others
        note = f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
    else:
        print(
            f"{name}: {job.shape}, {job.dtype} ({time.monotonic() - started:.0f} s)\n{text_of(job, counter)}",
            flush=True,
        )
        return rows_of(job, variant.name, counter), counter
    print(f"{name}: not counted: {note}", flush=True)
    return [Row(job.name, variant.name, job.shape, job.dtype, _MS, note=note)], None


def rows_of(job, variant: str, counter) -> list[Row]:
    """The floor and the number of kernels of a count, as results."""
    phases = list(dict.fromkeys(name for name, _ in counter.phases))
    whole = total(k for name in job.counted for k in counter.of_phase(name))
    details = _details(whole)
    details["phases"] = {name: _details(total(counter.of_phase(name))) for name in phases}
    details["problems"] = dict(counter.problems)
    least = job.least and job.least(job)
    if least:
        details["least"] = {kind: 1e3 * seconds for kind, seconds in least_seconds(least, job.dtype == "fp8").items()}
    identity = (job.name, variant, job.shape, job.dtype)
    floor = 1e3 * whole.floor
    return [
        Row(*identity, _MS, floor, floor, floor, details=details),
        Row(f"{job.name}, launches", *identity[1:], _KERNELS, whole.kernels, whole.kernels, whole.kernels),
    ]


def _details(found: Total) -> dict:
    return {
        "kernels": found.kernels,
        "gigabytes": found.bytes / 1e9,
        "teraflop": found.flops / 1e12,
        "milliseconds": {kind: 1e3 * seconds for kind, seconds in found.seconds.items()},
        "above_products": 1e3 * found.above,
    }


def least_seconds(job, fp8: bool = False) -> dict[str, float]:
    """Floors by kind of a job of `bench.parts`: in the largest fusion there is."""
    from bench.ledger.cost import ATTENTION, ELEMENTWISE, NORMS, OPTIMISER, PRODUCTS

    seconds = dict.fromkeys(KINDS, 0.0)
    for part in job.parts:
        large = fp8 and any(word in part.name for word in (" qkv", " proj", " fc1", " fc2", " skip_linear"))
        floor = max(part.products / (FLOPS * (2 if large else 1)), part.bytes / BANDWIDTH)
        kind = ELEMENTWISE
        if part.direction == "update":
            kind = OPTIMISER
        elif "attention" in part.name:
            kind = ATTENTION
        elif part.products:
            kind = PRODUCTS
        elif "norm" in part.name:
            kind = NORMS
        seconds[kind] += part.times * floor
    return seconds


def text_of(job, counter) -> str:
    """The count in a few lines."""
    phases = dict.fromkeys(name for name, _ in counter.phases)
    rows = [(name, total(counter.of_phase(name))) for name in phases]
    if len(job.counted) > 1:
        rows.append(("all", total(k for name in job.counted for k in counter.of_phase(name))))
    lines = [f"  {name:13}{_line(found)}" for name, found in rows]
    lines += [f"  problem: {text}" + f" ({times} times)" * (times > 1) for text, times in counter.problems.items()]
    return "\n".join(lines)


def _line(found: Total) -> str:
    split = ", ".join(f"{kind} {1e3 * found.seconds[kind]:.2f}" for kind in KINDS if found.seconds[kind] > 5e-6)
    return (
        f"{found.kernels:6} kernels {found.bytes / 1e9:9.2f} GB {1e3 * found.floor:9.2f} ms, "
        f"{1e3 * found.above:.2f} above products ({split})"
    )


def listing(kernels: Iterable[Kernel]) -> str:
    """A line per kernel, equal neighbours once."""
    lines: list[list] = []
    for kernel in kernels:
        text = (
            f"{kernel.by:9} {kernel.kind:16} {1e6 * kernel.seconds:8.1f} us  read {kernel.read / 1e6:9.2f} "
            f"written {kernel.written / 1e6:9.2f} MB {kernel.flops / 1e9:9.1f} GFLOP  {kernel.name[:70]}  "
            f"{kernel.detail[:200]}"
        )
        if lines and lines[-1][1] == text:
            lines[-1][0] += kernel.launches
        else:
            lines.append([kernel.launches, text])
    return "\n".join(f"  {times:3} x {text}" for times, text in lines)


# ---------------------------------------------------------------------------------------------- a folder of counts


def write(output: Path, header: dict, rows: Sequence[Row]) -> None:
    """README.md and ledger.png beside the rows."""
    write_text(output / "README.md", markdown(header, rows))
    try:
        from bench.ledger.picture import draw
    except ImportError:
        print("ledger.png needs matplotlib: pip install 'epg_fast[demo]'", file=sys.stderr)
        return
    draw(by_job(rows), output / "ledger.png", FLOORS)


def by_job(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The floors of each job, those that were counted and those that say why not."""
    jobs: dict[str, list[Row]] = {}
    for row in rows:
        if row.unit == _MS:
            jobs.setdefault(row.job, []).append(row)
    return jobs


def best(rows: Sequence[Row], ours: bool) -> Row | None:
    """The lowest floor of the package's kernels, or of everything else: the rival."""
    here = [row for row in rows if row.median is not None and row.rung.startswith("ours") == ours]
    return min(here, key=lambda row: row.median, default=None)


def markdown(header: dict, rows: Sequence[Row]) -> str:
    jobs = by_job(rows)
    parts = [
        f"{FLOORS}\n\n# Ledger: what a Hopper GPU would be given\n",
        f"A floor is the sum over kernels of the longer of their FLOP at {FLOPS / 1e12:.0f} TFLOP/s (twice that in "
        f"FP8) and their bytes at {BANDWIDTH / 1e12:.1f} TB/s. The rival is the best of the plain code and the "
        "package's plain operations under torch.compile; the minimum has one kernel for everything that can ride in "
        "one (`bench.parts`). ![ledger](ledger.png)\n",
        "## Jobs\n",
        _summary(jobs),
        "## Every count\n",
        _every(jobs),
        "## Phases\n",
        _phases(jobs),
        "## What should not be\n",
        _problems(jobs),
        "## Matrix products of our own\n",
        "Break-even: how much slower than a library's a product may be before what it saves is gone. Its tiles: what "
        "unfilled tiles and unfilled waves cost it, the part of a slow-down that arithmetic knows.\n",
        _products(rows),
        *_resources(jobs),
        "## This ledger\n",
        header_lines(header),
    ]
    return "\n".join(parts)


def _summary(jobs: dict[str, list[Row]]) -> str:
    cells = []
    for name, rows in jobs.items():
        rival, ours = best(rows, False), best(rows, True)
        known = rival or ours
        least = sum(known.details["least"].values()) if known and "least" in known.details else None
        cells.append(
            (
                name,
                f"{rows[0].shape}, {rows[0].dtype}",
                rival and f"{rival.rung}: {significant(rival.median, 4)}",
                rival and rival.details["kernels"],
                ours and f"{ours.rung}: {significant(ours.median, 4)}",
                ours and ours.details["kernels"],
                ours and rival and f"{100 * (1 - ours.median / rival.median):.1f}%",
                significant(least, 4),
            )
        )
    columns = ("job", "of", "rival, ms", "kernels", "ours, ms", "kernels", "gain", "minimum, ms")
    return markdown_table(columns, cells)


def _every(jobs: dict[str, list[Row]]) -> str:
    cells = []
    for name, rows in jobs.items():
        for row in rows:
            if row.median is None:
                cells.append((name, row.rung, *[None] * (4 + len(KINDS)), row.note))
                continue
            d = row.details
            split = [significant(d["milliseconds"][kind]) for kind in KINDS]
            numbers = (d["kernels"], significant(d["gigabytes"], 4), significant(row.median, 4))
            cells.append((name, row.rung, *numbers, significant(d["above_products"]), *split, ""))
    return markdown_table(("job", "by", "kernels", "GB", "floor, ms", "above products", *KINDS, "note"), cells)


def _phases(jobs: dict[str, list[Row]]) -> str:
    cells = [
        (
            name,
            row.rung,
            phase,
            d["kernels"],
            significant(d["gigabytes"], 4),
            significant(sum(d["milliseconds"].values()), 4),
        )
        for name, rows in jobs.items()
        for row in rows
        for phase, d in row.details.get("phases", {}).items()
        if len(row.details["phases"]) > 1
    ]
    return markdown_table(("job", "by", "phase", "kernels", "GB", "floor, ms"), cells) if cells else "None.\n"


def _problems(jobs: dict[str, list[Row]]) -> str:
    found = [
        f"- {name}, {row.rung}: {text}" + f" ({times} times)" * (times > 1)
        for name, rows in jobs.items()
        for row in rows
        for text, times in row.details.get("problems", {}).items()
    ]
    nothing = (
        "No graph break, no second compilation, no wait of the host, no tensor on the CPU in a graph, and no operator "
        "whose launcher and fake implementation disagree."
    )
    return "\n".join(found or [nothing]) + "\n"


def _products(rows: Sequence[Row]) -> str:
    cells = [
        (row.rung, *row.details["tiles"], significant(1e3 * row.details["floor_ms"]), f"{row.median:.1f}")
        + (f"{row.details['break_even']:.2f}", f"{row.details['slowdown']:.2f}", row.details["outcome"])
        for row in rows
        if row.job == _PRODUCTS
    ]
    tiles = ("result", "tile", "resident", "waves", "unfilled", "idle")
    columns = ("product", *tiles, "floor, us", "with its tiles, us", "break-even", "its tiles", "outcome")
    return markdown_table(columns, cells) if cells else "Not counted.\n"


def _resources(jobs: dict[str, list[Row]]) -> list[str]:
    """Of the kernels of every count that was asked for them, each configuration once."""
    from bench.ledger.products import RESOURCES

    found = {tuple(cells) for rows in jobs.values() for row in rows for cells in row.details.get("resources", ())}
    return ["## Our Triton kernels at sm_90\n", markdown_table(RESOURCES, sorted(found, key=str))] if found else []
