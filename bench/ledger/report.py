"""What the ledger writes: a line per count while it counts, rows as JSON, tables in Markdown, stacked bars."""

from __future__ import annotations

import gc

import time
from pathlib import Path

from bench.ledger import jobs
from bench.ledger.cost import KINDS, Kernel, Total, total

FLOORS = (
    "These are floors, counted and not measured: no gaps between launches, every product and every access perfect; "
    "a GPU takes longer."
)


def run(chosen: list, variants: list, output: Path | None, *, kernels: bool, resources: bool) -> int:
    print(FLOORS)
    for job in chosen:
        for variant in variants:
            started = time.monotonic()
            try:
                counter = jobs.count(job, variant)
            except jobs.NotCounted as reason:
                print(f"{job.name}, {variant.name}: not counted: {reason}", flush=True)
                continue
            print(f"{job.name}, {variant.name}: {job.shape}, {job.dtype} ({time.monotonic() - started:.0f} s)")
            print(text_of(job, counter), flush=True)
            if kernels:
                print(listing(counter.kernels), flush=True)
            del counter
            gc.collect()
    return 0


def text_of(job, counter) -> str:
    """The count in a few lines."""
    phases = dict.fromkeys(name for name, _ in counter.phases)
    rows = [(name, total(counter.of_phase(name))) for name in phases]
    if len(job.counted) > 1:
        rows.append(("all", total(k for name in job.counted for k in counter.of_phase(name))))
    lines = [f"  {name:13}{_line(found)}" for name, found in rows]
    lines += [f"  problem: {text}" + (f" ({times} times)" if times > 1 else "") for text, times in counter.problems.items()]
    return "\n".join(lines or ["  nothing"])


def _line(found: Total) -> str:
    split = ", ".join(f"{kind} {1e3 * found.seconds[kind]:.2f}" for kind in KINDS if found.seconds[kind] > 5e-6)
    return (
        f"{found.kernels:6} kernels {found.bytes / 1e9:9.2f} GB {1e3 * found.floor:9.2f} ms, "
        f"{1e3 * found.above:.2f} above products ({split})"
    )


def listing(kernels: list[Kernel]) -> str:
    """A line per kernel, equal neighbours once."""
    lines: list[list] = []
    for kernel in kernels:
        text = (
            f"{kernel.by:9} {kernel.kind:16} {1e6 * kernel.seconds:8.1f} us  read {kernel.read / 1e6:9.2f} "
            f"written {kernel.written / 1e6:9.2f} MB {kernel.flops / 1e9:9.1f} GFLOP  {kernel.name[:70]}  {kernel.detail[:200]}"
        )
        if lines and lines[-1][1] == text:
            lines[-1][0] += kernel.times
        else:
            lines.append([kernel.times, text])
    return "\n".join(f"  {times:3} x {text}" for times, text in lines)


