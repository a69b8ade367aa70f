"""Figures that a run measures beside training: when they are due, where they go, what they cost.

A measurement comes after the checkpoint of its step, so that a kill while it takes long loses nothing, and its figures
are a function of the weights of that step. A run that goes on from a checkpoint measures what metrics.jsonl lacks of
that step: no line is lost, and none comes twice.
"""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from epg_fast.config import RunConfig
from epg_fast.distributed import Ranks
from epg_fast.training.metrics import Metrics, figures_at

log = logging.getLogger("epg_fast")
# Groups of the configuration, and how the names of their figures begin.
_MEASURED = {"collapse": "collapse", "probe": "probe", "evaluate": "evaluation"}
# Share of the time that a measurement may take without a word.
_CHEAP = 0.05


class Measurement(abc.ABC):
    """Something to measure of the weights as they are now."""

    name: str
    """Its group in the configuration, which has `every`."""

    @classmethod
    def is_asked_for(cls, config: RunConfig) -> bool:
        """Whether it is ever due."""
        return cls.name in _intervals(config)

    @abc.abstractmethod
    def figures(self) -> dict[str, float]:
        """The figures on the main rank. All ranks call it at the same point, and training is left as it is.

        Raises ValueError for what cannot be measured now; no other rank waits for one that does. Raises `BrokenOff` on
        all ranks when the run is to end before that.
        """

    def said(self, figures: dict[str, float]) -> str:
        """The figures in a line of the log."""
        return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


class BrokenOff(Exception):
    """The run is to end."""


def measurements_due(config: RunConfig, step: int) -> list[str]:
    """Names of the measurements that are due at `step`: at multiples of their `every`, and at the last step."""
    return [name for name, n in _intervals(config).items() if step and (step % n == 0 or step == config.steps)]


def measurements_missing(config: RunConfig, outdir: Path, step: int, ranks: Ranks) -> list[str]:
    """Those of `measurements_due` without a figure in metrics.jsonl, because the run was ended before; on all ranks."""
    due = measurements_due(config, step)
    found = ranks.decide(lambda: figures_at(outdir, step)) if due else ()
    return [name for name in due if not any(figure.startswith(_MEASURED[name]) for figure in found)]


def _intervals(config: RunConfig) -> dict[str, int]:
    """Steps between measurements, of those that are asked for."""
    groups = {name: getattr(config, name) for name in _MEASURED if hasattr(config, name)}
    return {name: group.every for name, group in groups.items() if group.every}


class Measuring:
    """Makes measurements and writes what they find."""

    def __init__(self, measurements: Sequence[Measurement], metrics: Metrics):
        self._measurements, self._metrics = measurements, metrics
        self._ended: dict[str, float] = {}
        self._warned: set[str] = set()

    def measure(self, names: Collection[str], step: int, stop: bool = False) -> bool:
        """Make those of these names; False if the run is to end before that, as `stop` says or one finds meanwhile."""
        for measurement in (m for m in self._measurements if m.name in names):
            begin, figures = time.perf_counter(), {}
            try:
                if stop:
                    raise BrokenOff
                with self._metrics.paused():
                    figures = measurement.figures()
            except BrokenOff:
                log.warning("step %d: no figures of %s yet; the same command begins with them", step, measurement.name)
                return False
            except ValueError as error:
                log.warning("step %d: no figures of %s: %s; training goes on", step, measurement.name, error)
            if figures:
                self._metrics.write_figures(step, figures)
                log.info("step %d: %s", step, measurement.said(figures))
            self._say_cost(measurement.name, begin, step)
        return True

    def _say_cost(self, name: str, begin: float, step: int) -> None:
        end, last = time.perf_counter(), self._ended.get(name)
        self._ended[name] = end
        share = 0.0 if last is None else (end - begin) / (end - last)
        if share > _CHEAP and name not in self._warned:
            self._warned.add(name)
            log.warning(
                "step %d: %s took %.1f s, %.0f%% of the time since the last one; a larger --%s.every costs less",
                *(step, name, end - begin, 100 * share, name),
            )
