"""Files that appear whole or not at all, and files that one process at a time holds."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

log = logging.getLogger("epg_fast")


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that a reader, or a run after a crash, sees the whole file or none."""
    # process ids repeat between the hosts of a shared file system
    temporary = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`; see `open_atomically`."""
    with open_atomically(path) as file:
        file.write(content)


def lock_file(path: Path, busy: str) -> IO:
    """Open the file for this process alone: the lock is held until it is closed, or the process ends.

    Raises ValueError, which says `busy`, when another process holds it. A file system without locks is warned of.
    """
    file = open(path, "ab")  # noqa: SIM115 (held until the end)
    try:
        # lockf, not flock: decoding processes would inherit the latter and hold it when this one has been killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(busy) from None
    except OSError as error:
        log.warning("%s cannot be locked (%s): do not start this command twice", path.parent, error)
    return file
