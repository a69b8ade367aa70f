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

from epg_fast.tuning.candidates import Variant
from epg_fast.tuning.tuner import Failed
from epg_fast.tuning.worker import Job

# What torchrun tells a rank; the worker has none beside it.
_OF_RANKS = ("RANK", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
_COMMAND = (sys.executable, "-m", "epg_fast.tuning.worker")


class Client:
    """Checks and times in a process of its own. command: of the worker, for tests."""

    def __init__(self, job: Job, command: Sequence[str] = _COMMAND):
        self._job, self._command = job, command
        self._process: subprocess.Popen | None = None
        self._messages = None

    def check(self, unit: str, variant: Variant, seconds: float) -> dict[str, float]:
        """Errors of a variant. Raises Failed for one that is wrong, crashes or takes longer."""
        return self._ask("check", unit, [variant], seconds)

    def times(self, unit: str, variants: list[Variant], seconds: float) -> list[list[float]]:
        """Seconds of a step of each variant. Raises Failed as `check`."""
        return self._ask("times", unit, variants, seconds)

    def memory(self, seconds: float) -> list[int]:
        """[free, all] bytes of the GPU before anything is measured, [] on a CPU."""
        return self._ask("memory", "", [], seconds)

    def close(self) -> None:
        """End the worker, whatever it does."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()
        self._messages.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _ask(self, kind: str, unit: str, variants: list[Variant], seconds: float):
        request = {"kind": kind, "unit": unit, "variants": [asdict(variant) for variant in variants]}
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(seconds)
        except BrokenPipeError:
            line = b""
        if line is None:
            self.close()
            raise Failed("hung", f"no answer in {seconds:.0f} s")
        if not line.endswith(b"\n"):
            raise Failed("crashed", self._last_words())
        found = json.loads(line)
        if "failed" in found:
            raise Failed(found["failed"], found["why"])
        return found["answer"]

    def _start(self) -> None:
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (until the worker ends)
        # a group of its own, so that its compilers end with it, and Ctrl-C is the tuner's to handle
        alone = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        self._process = subprocess.Popen(
            self._command,
            env=alone,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            start_new_session=True,
        )
        self._process.stdin.write(self._job.line().encode() + b"\n")

    def _line(self, seconds: float) -> bytes | None:
        """The next line; None when the time is over, an unfinished one when the worker has gone."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        return self._process.stdout.readline()

    def _last_words(self) -> str:
        """How the worker has ended, and what it said last."""
        code = self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        self.close()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}: {lines[-1][:300]}" if lines else how
