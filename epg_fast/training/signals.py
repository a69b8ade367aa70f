"""Signals that ask a run to save and end."""

from __future__ import annotations

import signal
import threading


class StopSignals:
    """While entered, SIGTERM and SIGUSR1 set `asked` instead of ending the process.

    Schedulers send SIGTERM when they take a machine back, Slurm's --signal=USR1@120 two minutes before the time is up.
    Further ones change nothing: a scheduler and torchrun may both send it. Outside the main thread, where Python allows
    no handlers, they do what they did before.
    """

    def __init__(self):
        self.asked: str | None = None
        """Name of the signal that has come."""
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _ask(self, number: int, frame) -> None:
        self.asked = signal.Signals(number).name
