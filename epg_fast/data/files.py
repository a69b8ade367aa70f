"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
