"""Commands given in this process, what stands in their way, and what they leave."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from epg_fast.__main__ import main


def run(*arguments):
    assert main([str(word) for word in arguments]) == 0


def fails(capsys, arguments, *expected, code=2):
    """The command fails with one line that holds all of `expected`."""
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == code
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert line.startswith("epg-fast: error: ") and "Traceback" not in error
    for text in expected:
        assert text in line, line


def snapshot(root):
    """Bytes of all files but the lock."""
    files = [path for path in Path(root).rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


class Kept(list):
    """What a command keeps, in order; `stop[n]` is done when there are n."""

    def __init__(self):
        super().__init__()
        self.stop = {}

    def append(self, item):
        super().append(item)
        self.stop.pop(len(self), lambda: None)()


def ask_to_stop(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def full_disk(limit):
    """Inside, no file takes more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def environment():
    """Of another process of these tests."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def python(*arguments):
    """What another process prints, and says, which succeeds."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def on_two_ranks(arguments):
    """The same for a command under torchrun."""
    # the dashes, because torchrun would take --num for the beginning of one of its own
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    return python(*launch, "epg_fast", *arguments)


@contextlib.contextmanager
def held_by_another_process(folder):
    """The lock of this output folder."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
    code += "print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        yield
        other.communicate("\n")
