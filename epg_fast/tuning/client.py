"""A worker from outside: asked for one thing at a time, with a time limit, and started again when it is lost."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict

from epg_fast.config import TuneConfig
from epg_fast.plans import Variant
from epg_fast.tuning.answers import Failed, unpacked
from epg_fast.tuning.job import Job

# What torchrun tells a rank; the worker has none beside it.
_OF_RANKS = ("RANK", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
_COMMAND = (sys.executable, "-m", "epg_fast.tuning.worker")


class Client(contextlib.AbstractContextManager):
    """Checks and times in a process of its own."""

    def __init__(self, job: Job, options: TuneConfig):
        self._line_of_job, self._limit = f"{job.line()} {options.seconds}\n", options.limit
        self._process: subprocess.Popen | None = None
        self._messages = None

    def ask(self, kind: str, unit: str = "", variants: Sequence[Variant] = ()):
        """What the method `kind` of `Worker` returns. Raises Failed as it does, or for a crash or too long a time."""
        request = {"kind": kind, "unit": unit, "variants": [asdict(variant) for variant in variants]}
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line()
        except BrokenPipeError:
            line = b""
        if line is None:
            self._end()
            raise Failed("hung", f"no answer in {self._limit:.0f} s")
        if not line.endswith(b"\n"):
            raise Failed("crashed", self._last_words())
        return unpacked(json.loads(line))

    def __exit__(self, *exception) -> None:
        self._end()

    def _start(self) -> None:
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (until the worker ends)
        # a group of its own, so that its compilers end with it, and Ctrl-C is the tuner's to handle
        self._process = subprocess.Popen(
            _COMMAND,
            env={name: value for name, value in os.environ.items() if name not in _OF_RANKS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            start_new_session=True,
        )
        self._process.stdin.write(self._line_of_job.encode())

    def _line(self) -> bytes | None:
        """The next line; None when the time is over, an unfinished one when the worker has gone."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(self._limit):
                return None
        return self._process.stdout.readline()

    def _last_words(self) -> str:
        """How the worker has ended, and what it said last."""
        code = self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        self._end()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}: {lines[-1][:300]}" if lines else how

    def _end(self) -> None:
        """End the worker, whatever it does."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, self._messages):
            stream.close()
