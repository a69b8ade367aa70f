"""Which candidate is tried against which, and who wins.

First sites, one after another, on a few blocks: a backend that is right and faster than the best so far replaces it.
Then the whole job: ways to run it, with what the sites have won and without. Whoever measures is a `Bench`; everything
that it has answered is kept, so that an interrupted tuning goes on.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

from epg_fast.tuning.candidates import Variant, unit_of

SITE_GAIN, WHOLE_GAIN = 1.02, 1.01
"""How many times as fast a candidate must be to win."""
WANDER = 0.03
_RESERVED = 0.5  # of the time, for the whole job


class Bench(Protocol):
    """What checks and times. Either raises `Failed` for a candidate that is wrong, crashes or hangs."""

    def check(self, unit: str, variant: Variant, seconds: float) -> dict[str, float]:
        """Errors of the candidate against exact results, those of plain code beside them."""

    def times(self, unit: str, variants: list[Variant], seconds: float) -> list[list[float]]:
        """Seconds of each variant, taken in turn."""


class Failed(Exception):
    """A candidate is out; `kind`: "wrong", "crashed", "hung" or "not here"."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


@dataclass
class Row:
    """One candidate: what it was tried against, and what became of it."""

    unit: str
    what: str
    outcome: str
    """"won", "lost", "wrong", "crashed", "hung", "not here" or "not tried"."""
    ratio: float | None = None
    """How many times as fast as the best before: the median of the pairs."""
    spread: float | None = None
    """Half the distance between the 20th and the 80th percentile of the pairs."""
    milliseconds: float | None = None
    against: float | None = None
    """Milliseconds of the best before, beside it."""
    note: str = ""


def compared(base: list[float], candidate: list[float]) -> tuple[float, float]:
    """(how many times as fast the candidate is, the spread of that), from times that were taken in turn."""
    ratios = sorted(a / b for a, b in zip(base, candidate, strict=True))
    if len(ratios) == 1:
        return ratios[0], 0.0
    low, *_, high = statistics.quantiles(ratios, n=5, method="inclusive")
    return statistics.median(ratios), (high - low) / 2


@dataclass
class Tuner:
    """Finds the fastest way of a job. `rows` is the table, `notes` what may have disturbed the clock."""

    bench: Bench
    sites: list[tuple[str, str, str | None]]
    """(site, backend, why it cannot run here or None), in the order in which they are tried."""
    plain: Variant
    """What runs without a plan."""
    runs: list[Variant]
    """Further ways to run the whole job; their ops do not count."""
    seconds: float
    measured: dict[str, dict] = field(default_factory=dict)
    """Answers of before, which are not asked for again; new ones are added."""
    keep: Callable[[dict], None] = lambda measured: None
    """Called with `measured` after every answer."""
    show: Callable[[str], None] = lambda text: None
    """Told what is tried."""
    clock: Callable[[], float] = time.monotonic
    request: float = 240.0
    """Most seconds for one answer."""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    speedup: float = 1.0
    """Of the whole job."""

    def best(self) -> Variant:
        """The fastest variant of the whole job, `plain` if none is faster by 1% and by more than its spread."""
        self._began = self.clock()
        best = self._of_whole(self._of_sites())
        self._look_at_the_clock()
        return best

    def _left(self) -> float:
        return self.seconds - (self.clock() - self._began)

    def _of_sites(self) -> dict[str, str]:
        ops = dict(self.plain.ops)
        end = self.seconds * _RESERVED
        for site, backend, obstacle in self.sites:
            what = f"{site}={backend}"
            if obstacle is not None:
                self.rows.append(Row(unit_of(site), what, "not here", note=obstacle))
                continue
            base, candidate = replace(self.plain, ops=dict(ops)), replace(self.plain, ops=ops | {site: backend})
            if self._left() < end and not self._known(unit_of(site), base, candidate):
                self.rows.append(Row(unit_of(site), what, "not tried", note="the time was up"))
            elif self._wins(unit_of(site), what, base, candidate, SITE_GAIN):
                ops = ops | {site: backend}
        return ops

    def _of_whole(self, ops: dict[str, str]) -> Variant:
        """Ways to run the whole job, each against the best so far, and that against plain code once more."""
        best, changed = self.plain, ops != self.plain.ops
        candidates = [replace(self.plain, ops=ops)] if changed else []
        candidates += [replace(run, ops=ops) for run in self.runs]
        candidates += [replace(run, ops=self.plain.ops) for run in self.runs if changed]
        for candidate in candidates:
            if self._left() <= 0 and not self._known("whole", best, candidate):
                self.rows.append(Row("whole", str(candidate), "not tried", note="the time was up"))
            elif self._wins("whole", str(candidate), best, candidate, WHOLE_GAIN):
                best = candidate
        return self._confirmed(best)

    def _confirmed(self, best: Variant) -> Variant:
        if best == self.plain:
            return best
        try:
            times = self._times("whole", [self.plain, best], again="once more")
        except Failed as failure:
            self.notes.append(f"{best} {failure.kind} when it was timed once more: {failure}")
            return self.plain
        ratio, spread = compared(*times)
        self.rows.append(self._row("whole", f"{best} against plain code", "", times, ratio, spread))
        won = ratio >= WHOLE_GAIN and ratio - 1 > spread
        self.rows[-1].outcome = "won" if won else "lost"
        self.speedup = ratio if won else 1.0
        return best if won else self.plain

    def _look_at_the_clock(self) -> None:
        """Time plain code once more, and note when it is not as fast as it was."""
        before = next((row.against for row in self.rows if row.unit == "whole" and row.against), None)
        if before is None:
            return
        try:
            (times,) = self._times("whole", [self.plain], again="at the end")
        except Failed:
            return
        drift = 1e3 * statistics.median(times) / before - 1
        if abs(drift) > WANDER:
            self.notes.append(f"clocks wandered: plain code took {drift:+.1%} of its first time at the end")

    def _wins(self, unit: str, what: str, base: Variant, candidate: Variant, gain: float) -> bool:
        self.show(f"{unit}: {what}")
        try:
            self._check(unit, candidate)
            times = self._times(unit, [base, candidate])
        except Failed as failure:
            self.rows.append(Row(unit, what, failure.kind, note=str(failure)))
            return False
        ratio, spread = compared(*times)
        won = ratio > gain and ratio - 1 > spread
        self.rows.append(self._row(unit, what, "won" if won else "lost", times, ratio, spread))
        return won

    def _row(self, unit, what, outcome, times, ratio, spread) -> Row:
        base, own = (1e3 * statistics.median(values) for values in times)
        return Row(unit, what, outcome, ratio, spread, own, base)

    def _known(self, unit: str, base: Variant, candidate: Variant) -> bool:
        return _key("times", unit, [base, candidate]) in self.measured

    def _check(self, unit: str, variant: Variant) -> dict[str, float]:
        return self._asked(_key("check", unit, [variant]), lambda limit: self.bench.check(unit, variant, limit))

    def _times(self, unit: str, variants: list[Variant], again: str = "") -> list[list[float]]:
        return self._asked(_key("times", unit, variants, again), lambda limit: self.bench.times(unit, variants, limit))

    def _asked(self, key: str, ask: Callable[[float], object]):
        if key not in self.measured:
            try:
                answer = {"answer": ask(self.request)}
            except Failed as failure:
                answer = {"failed": failure.kind, "why": str(failure)}
            self.measured[key] = answer
            self.keep(self.measured)
        found = self.measured[key]
        if "failed" in found:
            raise Failed(found["failed"], found["why"])
        return found["answer"]


def _key(kind: str, unit: str, variants: list[Variant], again: str = "") -> str:
    return json.dumps([kind, unit, [asdict(variant) for variant in variants], again], sort_keys=True)


def table(rows: list[Row]) -> Iterator[str]:
    """The rows as lines of text; those that cannot run here as a line for each reason."""
    tried = [row for row in rows if row.outcome != "not here"]
    width = max([len(row.what) for row in tried] + [4])
    yield f"{'part':<10} {'what':<{width}} {'outcome':<9} {'ms':>9} {'against':>9} {'ratio':>7} {'spread':>7}"
    for row in tried:
        numbers = [row.milliseconds, row.against, row.ratio, row.spread]
        texts = [" " * size if n is None else f"{n:{size}.3f}" for n, size in zip(numbers, (9, 9, 7, 7), strict=True)]
        yield f"{row.unit:<10} {row.what:<{width}} {row.outcome:<9} {' '.join(texts)}  {row.note}".rstrip()
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.outcome == "not here":
            reasons.setdefault(row.note, []).append(row.what)
    for reason, what in reasons.items():
        yield f"not here, {reason}: {', '.join(what)}"
