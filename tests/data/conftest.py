import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.images import noise

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and looked up in /proc")


@pytest.fixture
def make_folder(tmp_path):
    """Return a function that writes `count` random PNGs into three class folders and returns the root."""

    def make(count, size=(12, 10), name="images", suffix=".png"):
        for i in range(count):
            path = tmp_path / name / f"class{i % 3}" / f"{i:03d}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(*size, seed=1000 * count + i).save(path)
        return tmp_path / name

    return make


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def wait_until_gone():
    """Return a function that waits up to `seconds` for the processes `pids` to end and returns those that have not."""

    def wait(pids, seconds=20):
        deadline = time.monotonic() + seconds
        while any(map(is_running, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [pid for pid in pids if is_running(pid)]

    return wait


@pytest.fixture
def start_python():
    """Return a function that starts a program, code and arguments, in a session of its own; all end with the test."""
    programs = []

    def start(code, *arguments):
        # a shell may have started the tests with SIGINT ignored
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code
        programs.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
                cwd=Path(__file__).parents[2],
            )
        )
        return programs[-1]

    yield start
    for program in programs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.wait()
        program.stdout.close()
