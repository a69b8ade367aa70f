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
import itertools
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
    return [known[name] for name in known if names is None or name in names]


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
    known = {(row.job, row.variant) for row in found.rows} if found else set()
    print(report.FLOORS, flush=True)
    failed = False
    for job, variant in itertools.product(chosen, variants):
        if (job.name, variant.name) in known:
            continue
        rows = _counted(job, variant, options)
        failed |= rows[0].note.startswith("failed")
        for row in rows if found else ():
            found.add(row)
        gc.collect()
    if found:
        if JOBS["sample_xl"] in chosen and report.OWN_PRODUCTS not in {name for name, _ in known}:
            for row in products.study(JOBS["sample_xl"]):
                found.add(row)
        report.write(options.output)
        print(options.output / "README.md")
    return int(failed)


def _counted(job, variant, options: argparse.Namespace) -> list:
    """Rows of a count, its floor and the number of its kernels, or one that says why there is none."""
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
        note = ""
    if note:
        print(f"{name}: not counted: {note}", flush=True)
        return [Row(job.name, variant.name, job.shape, job.dtype, "ms", note=note)]
    print(f"{name}: {job.shape}, {job.dtype} ({time.monotonic() - started:.0f} s)")
    phases = {phase: total(counter.of_phase(phase)) for phase in dict.fromkeys(phase for phase, _ in counter.phases)}
    whole = total(kernel for phase in job.counted for kernel in counter.of_phase(phase))
    for phase, found in (phases | ({"all": whole} if len(job.counted) > 1 else {})).items():
        print(f"  {phase:13}{_line(found)}")
    for text, times in counter.problems.items():
        print(f"  problem: {text}" + f" ({times} times)" * (times > 1))
    if options.kernels:
        print(listing(counter.kernels))
    details = whole.as_json() | {
        "phases": {phase: found.as_json() for phase, found in phases.items()},
        "problems": dict(counter.problems),
        "least": {kind: 1e3 * seconds for kind, seconds in jobs.least_seconds(job).items()},
    }
    if options.resources:
        details["resources"] = used = products.resources(counter.kernels)
        print(markdown_table(report.RESOURCES, used) if used else "none of the package's Triton")
    sys.stdout.flush()
    of, floor, launches = (job.shape, job.dtype), 1e3 * whole.floor, whole.kernels
    return [
        Row(job.name, variant.name, *of, "ms", floor, floor, floor, details=details),
        Row(f"{job.name}, launches", variant.name, *of, "kernels", launches, launches, launches),
    ]


def _line(found: Total) -> str:
    split = ", ".join(f"{kind} {1e3 * found.seconds[kind]:.2f}" for kind in KINDS if found.seconds[kind] > 5e-6)
    return (
        f"{found.kernels:6} kernels {found.bytes / 1e9:9.2f} GB {1e3 * found.floor:9.2f} ms, "
        f"{1e3 * found.above:.2f} above products ({split})"
    )


def listing(kernels: Iterable[Kernel]) -> str:
    """A line per kernel, equal neighbours once."""
    texts = (
        f"{k.by:9} {k.kind:16} {1e6 * k.seconds:8.1f} us  read {k.read / 1e6:9.2f} written {k.written / 1e6:9.2f} MB "
        f"{k.flops / 1e9:9.1f} GFLOP  {k.name[:70]}  {k.detail[:200]}"
        for k in kernels
        for _ in range(k.launches)
    )
    return "\n".join(f"  {len([*equal]):3} x {text}" for text, equal in itertools.groupby(texts))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
