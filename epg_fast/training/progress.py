"""The progress line of a run."""

from __future__ import annotations

import logging
import math
import os

from tqdm import tqdm

from epg_fast.distributed import Ranks

log = logging.getLogger("epg_fast")

# Seconds without a batch after which the log says so.
_LONG_STALL = 30.0


class Progress:
    """Steps done and the newest figures in one line on the main rank's terminal; while no data comes, the wait instead.

    Args:
        name, steps, done: stage, updates to make and updates made before.
        data: what is waited for in `next(batches)`, for the one line that is logged about a long wait.
        ranks: this process's place.
    """

    def __init__(self, name: str, steps: int, done: int, data: str, ranks: Ranks):
        self._data, self._ranks = data, ranks
        self._figures: dict[str, str] = {}
        self._stalled = self._said = False
        self._line = tqdm(
            total=steps,
            initial=done,
            desc=name,
            disable=not ranks.main,
            dynamic_ncols=True,
            mininterval=0.5 if os.isatty(2) else 20,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        self._line.close()

    def reach(self, step: int) -> None:
        """Show that `step` is reached."""
        self._line.update(step - self._line.n)

    def show(self, metrics: dict) -> None:
        """Show a line of metrics.jsonl."""
        self._figures = {
            "loss": f"{metrics.get('loss', math.nan):.4g}",  # none if all batches were skipped
            "img/s": f"{metrics['images_per_second']:.0f}",
            "data wait": f"{metrics['data_wait']:.0%}",
        }
        if "mfu" in metrics:
            self._figures["MFU"] = f"{metrics['mfu']:.1%}"
        if "peak_memory_gib" in metrics:
            self._figures["peak"] = f"{metrics['peak_memory_gib']:.1f} GiB"
        self._line.set_postfix(self._figures)

    def stalled(self, seconds: float) -> None:
        """Show how long the next batch has been waited for, and log a long wait once."""
        self._stalled = True
        self._line.set_postfix(self._figures | {"data wait": f"{seconds:.0f} s"})
        if seconds >= _LONG_STALL and not self._said:
            self._said = True
            # the other ranks' warnings are not shown, but only the rank that waits knows what all are waiting for
            level = logging.WARNING if self._ranks.main else logging.ERROR
            log.log(level, "rank %d has been waiting for data for %.0f s: %s", self._ranks.rank, seconds, self._data)

    def data_came(self) -> None:
        """Show the figures again after a stall."""
        if self._stalled:
            self._stalled = self._said = False
            self._line.set_postfix(self._figures)
