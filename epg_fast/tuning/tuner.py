"""Which candidate is tried against which, and who wins.

First sites, one after another, on a few blocks: a backend that is right and faster than the best so far replaces it.
Then the whole job: ways to run it, with what the sites have won and without.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from epg_fast.child import Failed
from epg_fast.plans import Variant
from epg_fast.tuning.answers import Journal
from epg_fast.tuning.candidates import unit_of

SITE_GAIN, WHOLE_GAIN = 1.02, 1.01
"""How many times as fast a candidate must be to win."""
_WANDER = 0.03
_SITES = 0.5  # of the time; the rest is for the whole job


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

    journal: Journal
    """Whom it asks."""
    sites: list[tuple[str, str, str | None]]
    """(site, backend, why it cannot run here or None), in the order in which they are tried."""
    plain: Variant
    """What runs without a plan."""
    runs: list[Variant]
    """Further ways to run the whole job; their ops do not count."""
    seconds: float
    """After so long nothing more is begun."""
    show: Callable[[str], None] = lambda text: None
    """Told what is tried."""
    clock: Callable[[], float] = time.monotonic
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    speedup: float = 1.0
    """Of the whole job."""

    def best(self) -> Variant:
        """The fastest variant of the whole job, `plain` if none is faster by 1% and by more than its spread."""
        self._began = self.clock()
        best = self._confirmed(self._of_whole(self._of_sites()))
        self._look_at_the_clock()
        return best

    def _of_sites(self) -> dict[str, str]:
        ops = dict(self.plain.ops)
        for site, backend, obstacle in self.sites:
            unit, what = unit_of(site), f"{site}={backend}"
            base, candidate = (replace(self.plain, ops=tried) for tried in (ops, ops | {site: backend}))
            if obstacle is not None:
                self.rows.append(Row(unit, what, "not here", note=obstacle))
            elif self._wins(unit, what, base, candidate, until=self.seconds * _SITES):
                ops = ops | {site: backend}
        return ops

    def _of_whole(self, ops: dict[str, str]) -> Variant:
        """The best of the ways to run the whole job, each against the best before it."""
        best, changed = self.plain, ops != self.plain.ops
        candidates = [replace(self.plain, ops=ops)] if changed else []
        candidates += [replace(run, ops=ops) for run in self.runs]
        candidates += [replace(run, ops=self.plain.ops) for run in self.runs if changed]
        for candidate in candidates:
            if self._wins("whole", str(candidate), best, candidate, until=self.seconds):
                best = candidate
        return best

    def _confirmed(self, best: Variant) -> Variant:
        """The best, if it is faster than plain code when both are timed once more."""
        if best == self.plain:
            return best
        try:
            won = self._is_faster("whole", f"{best} against plain code", self.plain, best, again="once more")
        except Failed as failure:
            self.notes.append(f"{best} {failure.kind} when it was timed once more: {failure}")
            return self.plain
        self.speedup = self.rows[-1].ratio if won else 1.0
        return best if won else self.plain

    def _look_at_the_clock(self) -> None:
        """Time plain code once more, and note when it is not as fast as it was."""
        before = next((row.against for row in self.rows if row.unit == "whole" and row.against), None)
        if before is None:
            return
        try:
            (times,) = self.journal.ask("times", "whole", [self.plain], again="at the end")
        except Failed:
            return
        drift = 1e3 * statistics.median(times) / before - 1
        if abs(drift) > _WANDER:
            self.notes.append(f"clocks wandered: plain code took {drift:+.1%} of its first time at the end")

    def _wins(self, unit: str, what: str, base: Variant, candidate: Variant, until: float) -> bool:
        """Whether the candidate is right and faster; until: seconds after which only the journal is asked."""
        is_late = self.clock() - self._began >= until
        if is_late and not self.journal.knows("times", unit, [base, candidate]):
            self.rows.append(Row(unit, what, "not tried", note="the time was up"))
            return False
        self.show(f"{unit}: {what}")
        try:
            self.journal.ask("check", unit, [candidate])
            return self._is_faster(unit, what, base, candidate)
        except Failed as failure:
            self.rows.append(Row(unit, what, failure.kind, note=str(failure)))
            return False

    def _is_faster(self, unit: str, what: str, base: Variant, candidate: Variant, again: str = "") -> bool:
        """Whether by the gain that counts and by more than the spread, of which a row is written."""
        times = self.journal.ask("times", unit, [base, candidate], again)
        ratio, spread = compared(*times)
        won = ratio > (WHOLE_GAIN if unit == "whole" else SITE_GAIN) and ratio - 1 > spread
        against, own = (1e3 * statistics.median(values) for values in times)
        self.rows.append(Row(unit, what, "won" if won else "lost", ratio, spread, own, against))
        return won


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
