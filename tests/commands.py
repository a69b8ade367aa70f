"""Commands given in this process, what stands in their way, and what they leave."""

import contextlib
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
    """Bytes of all files but the lock and how long drawing took."""
    left_out = (".lock", "drawn_in.json")
    files = [path for path in Path(root).rglob("*") if path.is_file() and path.name not in left_out]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


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
