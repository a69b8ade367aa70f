"""A ladder: one job done by several variants, from plain PyTorch upwards, each measured alike and each a row.

Variants are measured in a process of their own, one after another, which lets go of everything between two of them. One
that fails is a row with a note. One that ends the process, hangs or breaks the GPU's context costs its own row only:
the next process goes on behind it. So does the same command later, given the same file.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from bench import measure
from bench.measure import Ceilings
from bench.results import UNFINISHED, Results, Row
from bench.roofline import Work
from epg_fast.child import Child, Failed


class NotHere(Exception):
    """A variant cannot be had on this machine; says why."""


@dataclass(frozen=True)
class Variant:
    """One way of doing the job. options: what the ladder makes of it; profiled: its longest kernels are listed."""

    name: str
    dtype: str
    options: dict = field(default_factory=dict)
    profiled: bool = False


@dataclass
class Ready:
    """A variant that has compiled and warmed up. call: the job, or a part of it that takes 1 / `scale` of its time."""

    call: Callable[[], object]
    error: float
    scale: float = 1.0
    calls: int = 1
    """Between two synchronisations."""
    profiled: Callable[[], object] | None = None
    """What is profiled, if not `call`."""
    notes: list[str] = field(default_factory=list)
    details: dict = field(default_factory=dict)


class Ladder:
    """What the ladders of sampling and training share. It is sent to other processes, before anything is measured.

    job: of `Row`; shape: likewise; images: per call; unit: "images/s", or "ms" for the time of a call; seconds: of a
    variant's repetitions.
    """

    job: str
    shape: str
    images: int
    unit: str
    seconds: float
    variants: tuple[Variant, ...]
    device: torch.device

    def prepare(self, variant: Variant) -> Ready:
        """Raises NotHere, or whatever goes wrong."""
        raise NotImplementedError

    @cached_property
    def work(self) -> Work:
        """FLOPs and traffic of a call."""
        raise NotImplementedError

    @cached_property
    def reference(self) -> torch.Tensor:
        """What errors are measured against."""
        raise NotImplementedError

    @cached_property
    def ceilings(self) -> Ceilings:
        """Measured in this process, once."""
        return Ceilings(measure.large_product(self.device), measure.large_copy(self.device))

    def measure(self, variant: Variant) -> Row:
        _ = self.reference, self.ceilings  # neither in the peak nor in the time
        left = measure.start_afresh(self.device)
        ready = self.prepare(variant)
        timed = measure.rounds(ready.call, self.device, self.seconds, calls=ready.calls)
        details = {"allocated_before": left, **ready.details}
        row = self.row(variant, [ready.scale * x for x in timed], ready.error, "; ".join(ready.notes), **details)
        if variant.profiled:
            call = ready.profiled or ready.call
            typical = measure.percentiles(measure.rounds(call, self.device, 0.0))[1]
            row.details["longest"] = measure.longest_kernels(call, self.device, typical)
        return row

    def row(self, variant: Variant, timed: list[float], error: float, note: str = "", **details) -> Row:
        """A row of seconds per call, with the shares of the ceilings."""
        low, median, high = measure.percentiles(timed)
        if self.unit == "images/s":
            numbers = {"median": self.images / median, "p20": self.images / high, "p80": self.images / low}
        else:
            numbers = {"median": 1e3 * median, "p20": 1e3 * low, "p80": 1e3 * high}
        details |= {
            "repetitions": len(timed),
            "mfu": self.work.flops / median / self.ceilings.products,
            "floor": self.work.floor(self.ceilings) / median,
            "ceiling_tflops": self.ceilings.products / 1e12,
            "ceiling_gbps": self.ceilings.memory / 1e9,
        }
        if self.device.type == "cuda":
            numbers["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return Row(*self._identity(variant), **numbers, error=error, details=details, note=note)

    def empty_row(self, variant: Variant, note: str, **details) -> Row:
        """A row without numbers."""
        return Row(*self._identity(variant), details=details, note=note)

    def _identity(self, variant: Variant) -> tuple[str, ...]:
        return self.job, variant.name, self.shape, variant.dtype, self.unit


def attempt(ladder: Ladder, variant: Variant) -> Row:
    """The variant's row; one with a note if it cannot be measured."""
    try:
        return ladder.measure(variant)
    except NotHere as reason:
        return ladder.empty_row(variant, str(reason))
    except Exception as error:
        traceback.print_exc()
        # what the frames hold would be counted for the next variant
        traceback.clear_frames(error.__traceback__)
        lines = str(error).strip().splitlines() or [""]
        return ladder.empty_row(variant, f"failed: {type(error).__name__}: {lines[0][:300]}")


def climb(ladder: Ladder, found: Results, *, seconds: float, each: float) -> bool:
    """Measure the variants that `found` has no row of; returns whether there was time for all.

    seconds, each: for everything and for one variant.
    """
    known = {row.identity for row in found.rows}
    deadline = time.monotonic() + seconds
    late = []
    with Child(partial(Measuring, ladder), shown=True) as child:
        for variant in ladder.variants:
            if ladder.empty_row(variant, "-").identity in known:
                continue
            row = None if late else _asked(child, ladder, variant, each, deadline)
            if row is None:
                late.append(variant)
            else:
                found.say(row)
    for variant in late:
        note = "its turn did not come in the time given; the same command with the same folder goes on"
        found.say(ladder.empty_row(variant, note, **{UNFINISHED: True}))
    return not late


def _asked(child: Child, ladder: Ladder, variant: Variant, each: float, deadline: float) -> Row | None:
    """The variant's row from the process, whose start does not count; None when the deadline has come before."""
    try:
        child.start(deadline - time.monotonic())
        row, broken = child.ask(variant, seconds=min(each, deadline - time.monotonic()))
    except Failed as failure:
        if failure.kind == "hung" and time.monotonic() >= deadline:
            return None
        return ladder.empty_row(variant, f"failed: {failure}")
    if broken:
        child.end()
    return row


class Measuring:
    """Measures variants, in a process of its own."""

    def __init__(self, ladder: Ladder):
        if ladder.device.type == "cpu":
            torch.set_num_threads(1)  # more wait for cores that others keep busy
        torch.backends.cudnn.allow_tf32 = False  # float32 is the reference; the engine chooses for itself
        measure.start_afresh(ladder.device)
        self._ladder = ladder

    def __call__(self, variant: Variant) -> tuple[Row, bool]:
        """(the variant's row, whether it has broken the GPU's context, behind which nothing can be measured)."""
        row = attempt(self._ladder, variant)
        try:
            measure.synchronise(self._ladder.device)
        except RuntimeError:
            return row, True
        return row, False


ALLOWED = 1e-3
PLAIN = Variant("plain", "fp32", {"plain": None})
OURS = Variant("ours", "fp32")


def in_turns(ladder: Ladder, least: int = 5) -> tuple[Row, Row]:
    """Rows of the plain code and of the package as it comes, both in float32, in milliseconds; for a CPU.

    They take turns, and each turn gives a ratio of two times that lie beside each other: a machine that is busy for a
    while spoils a few ratios and not their median. Outputs that differ are not timed. details of ours: "ratio", plain
    over ours.
    """
    identity = {"job": ladder.job, "shape": ladder.shape, "dtype": "fp32", "unit": "ms"}
    ready = {variant.name: ladder.prepare(variant) for variant in (PLAIN, OURS)}
    error = ready["ours"].error
    if not error <= ALLOWED:
        note = f"not timed: outputs differ by {error:.1e}, {ALLOWED:.0e} is allowed"
        return tuple(Row(variant=name, note=note, **identity) for name in ready)
    times: dict[str, list[float]] = {name: [] for name in ready}
    began = time.perf_counter()
    while len(times["ours"]) < least or time.perf_counter() - began < ladder.seconds:
        # whoever comes second finds the caches as the other left them
        for name in sorted(ready, reverse=len(times["ours"]) % 2 == 0):
            start = time.perf_counter()
            ready[name].call()
            times[name].append(ready[name].scale * (time.perf_counter() - start))
    low, middle, high = measure.percentiles([a / b for a, b in zip(times["plain"], times["ours"], strict=True)])
    details = {"repetitions": len(times["ours"]), "ratio": {"median": middle, "p20": low, "p80": high}}
    rows = []
    for name, values in times.items():
        p20, median, p80 = (1e3 * value for value in measure.percentiles(values))
        more = {"error": error, "details": details} if name == "ours" else {}
        note = "; ".join(ready[name].notes)
        rows.append(Row(variant=name, median=median, p20=p20, p80=p80, note=note, **more, **identity))
    return tuple(rows)


def default_device() -> torch.device:
    """The first GPU, or the CPU if there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def chosen(variants: tuple[Variant, ...], names: list[str] | None) -> tuple[Variant, ...]:
    """Those of these names, all for None. Raises ValueError for a name that none has."""
    known = [variant.name for variant in variants]
    for name in names or ():
        if name not in known:
            raise ValueError(f"variant {name!r}: wanted one of {', '.join(map(repr, known))}")
    return tuple(variant for variant in variants if names is None or variant.name in names)
