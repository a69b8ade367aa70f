import sys
import time
from pathlib import Path

import pytest

from tests.data.images import noise

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and looked up in /proc")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder, of the indices of tars, of this test alone."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "epg_fast"


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


def left_of(pids, seconds=20):
    """Wait until the processes `pids` have ended; returns those that have not."""
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if is_running(pid)]
