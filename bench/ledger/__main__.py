"""Which kernels a Hopper GPU would be given, and the least time they take, counted on any machine.

    python -m bench.ledger --output FOLDER                            # everything: README.md, ledger.json, ledger.png
    python -m bench.ledger --job sample_xl --variant ours-blocks      # one job, one way
    python -m bench.ledger --job sample_xl --variant ours-blocks --kernels

Wants a CUDA build of PyTorch, Triton and a C compiler, and no GPU: `make ledger` makes such an environment. With the
same folder the same command goes on with what is missing; what is there is not counted again. A count is two rows of
`bench.results`, one of its floor in milliseconds and one of its kernels, which `python -m bench.compare` reads; beside
job sample_xl stands a row per matrix product of the package's own, with what its tiles and waves cost.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

from bench.ledger import device
from bench.ledger.cost import KINDS, Kernel, Total, total


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=__doc__.splitlines()[0])
    parser.add_argument("--job", nargs="+", help="some of the jobs (default: all); a wrong name lists them")
    parser.add_argument("--variant", nargs="+", help="some of the ways to do them (default: all); likewise")
    parser.add_argument("--kernels", action="store_true", help="list every kernel of each count")
    parser.add_argument("--resources", action="store_true", help="and what its Triton kernels take on sm_90")
    parser.add_argument("--output", type=Path, help="folder for README.md, ledger.json and ledger.png")
    options = parser.parse_args(arguments)
    try:
        device.preload(arguments)
        device.prepare()
        return _count(options)
    except ValueError as error:
        print(f"bench.ledger: {error}", file=sys.stderr)
        return 2


def _named(what: str, known: dict, names: list[str] | None) -> list:
    for name in names or ():
        if name not in known:
            raise ValueError(f"{what} {name!r}: want some of {', '.join(known)}")
    return [value for name, value in known.items() if names is None or name in names]


def _count(options: argparse.Namespace) -> int:
    """Count, print, and write into a folder what it lacks. Returns 1 if a count failed."""
    # only here, where the GPU is there to be seen
    from bench import report
    from bench.ledger import products
    from bench.ledger.jobs import JOBS, VARIANTS
    from bench.results import Results, header

    warnings.filterwarnings("ignore", message=".*force_disable_caches.*")
    chosen, variants = _named("job", JOBS, options.job), _named("variant", VARIANTS, options.variant)
    found = Results.resume(options.output / "ledger.json", header()) if options.output else None
    print(report.FLOORS, flush=True)
    failed = False
    for job in chosen:
        for variant in variants:
            if found and any((row.job, row.variant) == (job.name, variant.name) for row in found.rows):
                continue
            rows = _counted(job, variant, options)
            failed |= rows[0].note.startswith("failed")
            for row in rows if found else ():
                found.add(row)
            gc.collect()
    if found:
        if JOBS["sample_xl"] in chosen and all(row.job != report.OWN_PRODUCTS for row in found.rows):
            for row in products.study(JOBS["sample_xl"]):
                found.add(row)
        report.write(options.output)
        print(options.output / "README.md")
    return int(failed)


def _counted(job, variant, options: argparse.Namespace) -> list:
    """Rows of a count, or one that says why there is none."""
    from bench import report
    from bench.ledger import jobs, products
    from bench.results import Row, markdown_table

    started, name = time.monotonic(), f"{job.name}, {variant.name}"
    try:
        counter = jobs.count(job, variant)
    except jobs.NotCounted as reason:
        note = str(reason)
    except Exception as error:  # one count that fails does not cost the others
        note = f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
    else:
        print(f"{name}: {job.shape}, {job.dtype} ({time.monotonic() - started:.0f} s)")
        print(text_of(job, counter), flush=True)
        if options.kernels:
            print(listing(counter.kernels), flush=True)
        rows = rows_of(job, variant.name, counter)
        if options.resources:
            rows[0].details["resources"] = used = products.resources(counter.kernels)
            print(markdown_table(report.RESOURCES, used) if used else "none of the package's Triton", flush=True)
        return rows
    print(f"{name}: not counted: {note}", flush=True)
    return [Row(job.name, variant.name, job.shape, job.dtype, "ms", note=note)]


def rows_of(job, variant: str, counter) -> list:
    """The floor and the number of kernels of a count, as results."""
    from bench.ledger.jobs import least_seconds
    from bench.results import Row

    totals, whole = _totals(job, counter)
    details = whole.as_json()
    details["phases"] = {name: found.as_json() for name, found in totals.items()}
    details["problems"] = dict(counter.problems)
    details["least"] = {kind: 1e3 * seconds for kind, seconds in least_seconds(job).items()}
    of, floor, launches = (job.shape, job.dtype), 1e3 * whole.floor, whole.kernels
    return [
        Row(job.name, variant, *of, "ms", floor, floor, floor, details=details),
        Row(f"{job.name}, launches", variant, *of, "kernels", launches, launches, launches),
    ]


def _totals(job, counter) -> tuple[dict[str, Total], Total]:
    """(of each phase, of those that make up the job)."""
    totals = {name: total(counter.of_phase(name)) for name in dict.fromkeys(name for name, _ in counter.phases)}
    return totals, total(kernel for name in job.counted for kernel in counter.of_phase(name))


def text_of(job, counter) -> str:
    """The count in a few lines."""
    totals, whole = _totals(job, counter)
    if len(job.counted) > 1:
        totals["all"] = whole
    lines = [f"  {name:13}{_line(found)}" for name, found in totals.items()]
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


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
