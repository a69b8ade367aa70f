"""What the speed on one Hopper GPU is meant to be, and whether rows that were measured there reach it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.results import Row, markdown_table, significant
from bench.tables import speed_up

HEUN = ("sample-heun", "epg_xl_16_256, batch 64, 32 levels")
LATENCY = ("sample-onestep", "epg_l_16_256, batch 1")
ONE_STEP = ("sample-onestep", "epg_l_16_256, batch 64")


class NotMeasured(Exception):
    """A goal's number is not among the rows; says what is missing."""


@dataclass(frozen=True)
class Goal:
    """bound: at least so much, or at most if `less`. number: of a ladder, or NotMeasured."""

    name: str
    bound: float
    text: str
    """The bound and a number in words, with {} for it."""
    number: Callable[[Rows], tuple[float, str]]
    less: bool = False

    def reached(self, number: float) -> bool:
        return number <= self.bound if self.less else number >= self.bound


class Rows:
    """The rows of one machine."""

    def __init__(self, rows: Sequence[Row]):
        self._rows = rows

    def one(self, ladder: tuple[str, str], rung: str) -> Row:
        """The measured row of a rung."""
        for row in self._rows:
            if (row.job, row.shape) == ladder and row.rung == rung:
                if row.median is None:
                    raise NotMeasured(f"{rung}: {row.note}")
                return row
        raise NotMeasured(f"no row of {', '.join(ladder)}, {rung}")

    def best(self, ladder: tuple[str, str], dtype: str) -> Row:
        """The fastest of the package's rungs."""
        here = [row for row in self._rows if (row.job, row.shape) == ladder]
        ours = [r for r in here if r.rung.startswith("ours") and r.dtype == dtype and r.median is not None]
        if not ours:
            raise NotMeasured(f"no measured row of {', '.join(ladder)}, ours in {dtype}")
        return max(ours, key=lambda row: speed_up(row, ours[0]))


def _share(ladder: tuple[str, str]) -> Callable[[Rows], tuple[float, str]]:
    def number(rows: Rows) -> tuple[float, str]:
        row = rows.best(ladder, "bf16")
        return row.details["mfu"], row.rung

    return number


def _times(other: str) -> Callable[[Rows], tuple[float, str]]:
    def number(rows: Rows) -> tuple[float, str]:
        row = rows.best(HEUN, "bf16")
        return speed_up(row, rows.one(HEUN, other)), f"{row.rung}, against {other}"

    return number


def _fp8(rows: Rows) -> tuple[float, str]:
    row, base = rows.best(HEUN, "fp8"), rows.best(HEUN, "bf16")
    return speed_up(row, base), f"{row.rung}, against {base.rung}"


def _memory(rows: Rows) -> tuple[float, str]:
    row, base = rows.best(HEUN, "bf16"), rows.one(HEUN, "plain, 16 bits")
    if row.peak_memory_bytes is None or base.peak_memory_bytes is None:
        raise NotMeasured("peak memory is that of a GPU")
    return row.peak_memory_bytes / base.peak_memory_bytes, f"{row.rung}, against {base.rung}"


def _latency(rows: Rows) -> tuple[float, str]:
    row = rows.best(LATENCY, "bf16")
    return row.median, row.rung


_HEUN = "EPG-XL/16, Heun with 32 levels, interval guidance, batch 64"
GOALS = (
    Goal(f"{_HEUN}: ours in bf16, of the measured GEMM ceiling", 0.78, "{:.1%}", _share(HEUN)),
    Goal("likewise: against plain fp32", 10.0, "{:.2f}x", _times("plain")),
    Goal("likewise: against plain 16 bits", 2.0, "{:.2f}x", _times("plain, 16 bits")),
    Goal("likewise: against torch.compile of the plain code", 1.12, "{:.2f}x", _times("plain, torch.compile")),
    Goal("likewise: FP8 against our bf16", 1.4, "{:.2f}x", _fp8),
    Goal("likewise: peak memory of our bf16 against plain 16 bits", 1.3, "{:.2f}x", _memory, less=True),
    Goal("EPG-L/16, one step, batch 1: latency of ours in bf16", 1.2, "{:.2f} ms", _latency, less=True),
    Goal("EPG-L/16, one step, batch 64: ours in bf16, of the measured GEMM ceiling", 0.8, "{:.1%}", _share(ONE_STEP)),
)


def goals_table(rows: Sequence[Row], gpu: str) -> str:
    """Every goal as reached, not reached or not measured, with the number. gpu: where the rows are from, or "none"."""
    found = Rows(rows)
    cells = [_line(goal, found, gpu) for goal in GOALS]
    cells += [_training_line(row) for row in _best_of_training(rows)] if _is_hopper(gpu) else []
    return markdown_table(("goal, on one Hopper GPU", "wanted", "measured", "outcome", "by"), cells)


def _line(goal: Goal, rows: Rows, gpu: str) -> tuple[str, ...]:
    wanted = ("at most " if goal.less else "at least ") + goal.text.format(goal.bound)
    if not _is_hopper(gpu):
        here = "this machine has no GPU" if gpu == "none" else f"measured on {gpu}, which is no Hopper GPU"
        return goal.name, wanted, "", "not measured", here
    try:
        number, by = goal.number(rows)
    except NotMeasured as reason:
        return goal.name, wanted, "", "not measured", str(reason)
    return goal.name, wanted, goal.text.format(number), "reached" if goal.reached(number) else "not reached", by


def _best_of_training(rows: Sequence[Row]) -> list[Row]:
    """The package's fastest row of every training ladder; they have no goal yet."""
    ladders = dict.fromkeys((r.job, r.shape) for r in rows if not r.job.startswith("sample"))
    best = []
    for ladder in ladders:
        for dtype in ("bf16", "fp8"):
            try:
                best.append(Rows(rows).best(ladder, dtype))
            except NotMeasured:
                continue
    return best


def _training_line(row: Row) -> tuple[str, ...]:
    mfu = f"{row.details['mfu']:.1%} of the GEMM ceiling, {significant(row.median)} {row.unit}"
    return f"{row.job}, {row.shape}, {row.dtype}", "no goal is stated", mfu, "", row.rung


def _is_hopper(gpu: str) -> bool:
    return re.search(r"\bG?H[12]00\b", gpu) is not None
