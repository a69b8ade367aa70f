"""A ladder: one job done in several ways, from plain PyTorch upwards, each measured alike and each a row.

Rungs are measured in a process of their own, one after another, which lets go of everything between two of them. A rung
that fails is a row with a note. One that ends the process, hangs or breaks the GPU's context costs its own row only:
the next process goes on behind it. So does the same command later, given the same file.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bench import measure, results
from bench.parts import Job
from bench.results import Results, Row
from bench.roofline import Ceilings, seconds

UNFINISHED = "unfinished"
"""In the details of a row that there was no time for, and that is measured when the same command is given again."""

_SAME = ("device", "power_limit", "torch", "triton", "commit", "threads")
"""Of a header: what rows of one file share."""


class NotHere(Exception):
    """A rung cannot be had on this machine; says why."""


@dataclass(frozen=True)
class Rung:
    """One way of doing the job. options: what the ladder makes of it; later: after the others, if time is short."""

    name: str
    dtype: str
    options: dict = field(default_factory=dict)
    later: bool = False
    profiled: bool = False
    """Whether its time is split by kernel class."""


class Ladder:
    """What the ladders of sampling and training share. It is sent to other processes, before anything is measured.

    job: of `Row`; shape: likewise; images: per call; unit: "images/s", or "ms" for the time of a call.
    """

    job: str
    shape: str
    images: int
    unit: str
    rungs: tuple[Rung, ...]
    device: torch.device
    threads: int
    """Of PyTorch on a CPU."""

    def measure(self, rung: Rung) -> Row:
        """The row of a rung. Raises NotHere, or whatever goes wrong."""
        raise NotImplementedError

    @cached_property
    def plan(self) -> Job:
        """Work and traffic of a call."""
        raise NotImplementedError

    @cached_property
    def ceilings(self) -> Ceilings:
        """Measured in this process, once."""
        products, memory = measure.large_product(self.device), measure.large_copy(self.device)
        return Ceilings(products, memory, "measured in the same process as the rungs")

    def row(self, rung: Rung, timed: list[float], error: float | None, note: str = "", **details) -> Row:
        """A row of seconds per call, with the shares of the ceilings."""
        low, median, high = measure.percentiles(timed)
        if self.unit == "images/s":
            numbers = {"median": self.images / median, "p20": self.images / high, "p80": self.images / low}
        else:
            numbers = {"median": 1e3 * median, "p20": 1e3 * low, "p80": 1e3 * high}
        details |= {
            "repetitions": len(timed),
            "mfu": self.plan.products / median / self.ceilings.products,
            "floor_ms": 1e3 * seconds(self.plan, self.ceilings),
            "ceiling_tflops": self.ceilings.products / 1e12,
            "ceiling_gbps": self.ceilings.memory / 1e9,
        }
        peak = measure.peak_memory(self.device)
        return Row(**self._identity(rung), **numbers, peak_memory_bytes=peak, error=error, details=details, note=note)

    def empty_row(self, rung: Rung, note: str, **details) -> Row:
        """A row without numbers."""
        return Row(**self._identity(rung), details=details, note=note)

    def _identity(self, rung: Rung) -> dict:
        return {"job": self.job, "rung": rung.name, "shape": self.shape, "dtype": rung.dtype, "unit": self.unit}


def attempt(ladder: Ladder, rung: Rung) -> Row:
    """The rung's row; one with a note if it cannot be measured."""
    try:
        return ladder.measure(rung)
    except NotHere as reason:
        return ladder.empty_row(rung, str(reason))
    except Exception as error:
        traceback.print_exc()
        # what the frames hold would be counted for the next rung
        traceback.clear_frames(error.__traceback__)
        lines = str(error).strip().splitlines() or [""]
        return ladder.empty_row(rung, f"failed: {type(error).__name__}: {lines[0][:300]}")


def climb(ladder: Ladder, found: Results, *, limit: float, rung_limit: float) -> bool:
    """Measure the rungs that `found` has no row of, the later ones last; returns whether there was time for all.

    limit, rung_limit: seconds for everything and for one rung.
    """
    known = {row.identity for row in found.rows}
    pending = [rung for rung in ladder.rungs if ladder.empty_row(rung, "-").identity not in known]
    pending.sort(key=lambda rung: rung.later)
    deadline = time.monotonic() + limit
    while pending and time.monotonic() < deadline:
        with _Worker(ladder, pending) as worker:
            while pending:
                row = worker.row_of(pending[0], rung_limit, deadline)
                if row is None:
                    break
                found.add(row)
                _say(row)
                del pending[0]
                if worker.broken:
                    break
    for rung in pending:
        note = "not measured: its turn did not come in the time given; the same command with the same folder goes on"
        found.add(ladder.empty_row(rung, note, **{UNFINISHED: True}))
    return not pending


class _Worker:
    """A process that measures rungs one after another."""

    def __init__(self, ladder: Ladder, rungs: list[Rung]):
        context = multiprocessing.get_context("spawn")
        self._ladder, (self._connection, far) = ladder, context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(ladder, list(rungs), far))
        self._process.start()
        far.close()
        self.broken = False
        """Whether it measures no further rung."""

    def row_of(self, rung: Rung, rung_limit: float, deadline: float) -> Row | None:
        """The next row; None if the deadline comes before it. The process is at an end if its rung ended it."""
        began = time.monotonic()
        wait = min(rung_limit, deadline - began)
        try:
            if self._connection.poll(max(wait, 0)):
                row, self.broken = self._connection.recv()
                return row
        except EOFError:
            self._process.join()
            self.broken = True
            return self._ladder.empty_row(rung, f"failed: its process ended with exit code {self._process.exitcode}")
        self.broken = True
        if wait < rung_limit:
            return None
        return self._ladder.empty_row(rung, f"failed: stopped after {rung_limit:.0f} s")

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exception) -> None:
        self._connection.close()
        self._process.join(0 if self.broken else 20)  # at its end it may hang, too
        self._process.kill()
        self._process.join()


def _work(ladder: Ladder, rungs: list[Rung], connection: Connection) -> None:
    """Send a row and whether it is the last one for each rung: behind a fault of the GPU nothing can be measured."""
    if ladder.device.type == "cpu":
        torch.set_num_threads(ladder.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is the reference; the engine chooses for itself
    for rung in rungs:
        row = attempt(ladder, rung)
        broken = False
        try:
            measure.synchronise(ladder.device)
        except RuntimeError:
            broken = True
        connection.send((row, broken))
        if broken:
            return


def open_results(path: Path, header: dict) -> Results:
    """The file of ladders with the rows that it has, but for those that were unfinished.

    Raises ValueError if they were measured elsewhere or by other code.
    """
    found = Results(path, header)
    if path.exists():
        before = results.read(path)
        for name in _SAME:
            if before.header.get(name) != header[name]:
                raise ValueError(
                    f"{path}: measured with {name} {before.header.get(name)}, now it is {header[name]}; "
                    "give another folder"
                )
        found.header = before.header
        found.rows = [row for row in before.rows if UNFINISHED not in row.details]
    return found


def default_device() -> torch.device:
    """The first GPU, or the CPU if there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def chosen(rungs: tuple[Rung, ...], names: list[str] | None) -> tuple[Rung, ...]:
    """Those of these names, all for None. Raises ValueError for a name that none has."""
    known = [rung.name for rung in rungs]
    for name in names or ():
        if name not in known:
            raise ValueError(f"rung {name!r}: wanted one of {', '.join(map(repr, known))}")
    return tuple(rung for rung in rungs if names is None or rung.name in names)


def _say(row: Row) -> None:
    value = row.note if row.median is None else f"{results.significant(row.median, 4)} {row.unit}"
    print(f"{row.job}, {row.shape}, {row.rung}: {value}", file=sys.stderr, flush=True)
