"""A process that answers requests one at a time, and may crash or hang doing so: whoever asks goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection

# What torchrun tells a rank; the child has none beside it.
_OF_RANKS = ("RANK", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


class Failed(Exception):
    """There is no answer; `kind`: "crashed", "hung", or what the asker knows besides."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


class Child(contextlib.AbstractContextManager):
    """Calls what `make` returns, in a process of its own, which is started again after it was lost.

    make: is pickled. shown: whether what the process writes to stderr is shown; else its last line says how it ended.
    """

    def __init__(self, make: Callable[[], Callable], shown: bool = False):
        self._make, self._shown = make, shown
        self._process: subprocess.Popen | None = None

    def ask(self, *request, seconds: float):
        """The answer to a request. Raises Failed for a crash and for more than so many seconds."""
        self.start(seconds)
        return self._exchange(request, seconds)

    def start(self, seconds: float) -> None:
        """Wait until the process can be asked. Raises Failed as `ask` does."""
        if self._process is not None:
            return
        self._connection, far = Pipe()
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (until the process ends)
        # a group of its own, so that its compilers end with it, and Ctrl-C is the asker's to handle
        self._process = subprocess.Popen(
            (sys.executable, "-m", "epg_fast.child", str(far.fileno())),
            env={name: value for name, value in os.environ.items() if name not in _OF_RANKS},
            stdin=subprocess.PIPE,
            stdout=None if self._shown else self._messages,
            stderr=None if self._shown else self._messages,
            pass_fds=[far.fileno()],
            start_new_session=True,
        )
        far.close()
        self._connection.send(sys.path)
        self._exchange(self._make, seconds)

    def end(self) -> None:
        """End the process, whatever it does."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, self._connection, self._messages):
            stream.close()

    def __exit__(self, *exception) -> None:
        self.end()

    def _exchange(self, message, seconds: float):
        try:
            self._connection.send(message)
            if self._connection.poll(max(seconds, 0)):
                return self._connection.recv()
        except (EOFError, ConnectionError):
            raise Failed("crashed", self._last_words()) from None
        self.end()
        raise Failed("hung", f"no answer in {seconds:.0f} s")

    def _last_words(self) -> str:
        """How the process has ended, and what it said last."""
        code = self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        self.end()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}: {lines[-1][:300]}" if lines else how


def _end_with_the_asker() -> None:
    """Nothing is ever written to stdin: when it ends, whoever asked is gone, and so are this process and its own."""
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


def _serve(connection: Connection) -> None:
    threading.Thread(target=_end_with_the_asker, daemon=True).start()
    sys.path[:] = connection.recv()
    call = connection.recv()()
    connection.send(None)
    while True:
        connection.send(call(*connection.recv()))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
