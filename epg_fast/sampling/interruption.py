"""Signals and full disks: what ends a command that can be given again."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

# Schedulers send SIGTERM when they take a machine back, Slurm's --signal=USR1@120 two minutes before the time is up.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """A signal has ended the command; what was finished is on disk."""

    def __init__(self, number: int, outdir: Path):
        super().__init__(f"{signal.Signals(number).name}: stopped; {outdir} is unfinished, the same command goes on")
        self.code = 128 + number
        """Exit code, as shells give it."""


class _Signal(KeyboardInterrupt):
    pass


@contextlib.contextmanager
def resumable(outdir: Path) -> Iterator[None]:
    """Turn signals into `Interrupted` and let an OSError say that the same command goes on.

    The first signal raises in the body, where Python next gets control; later ones are ignored, since a scheduler and
    torchrun may both send them, but a second Ctrl-C does not wait for what is being finished. Outside the main thread,
    where Python allows no handlers, signals do what they did before.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, _raise) for number in _SIGNALS}
    try:
        yield
    except _Signal as stop:
        raise Interrupted(stop.args[0], outdir) from None
    except OSError as error:
        raise OSError(f"{error}; what is finished stays in {outdir}, and the same command goes on") from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _raise(number: int, frame) -> None:
    for other in _SIGNALS:
        signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_IGN)
    raise _Signal(number)
