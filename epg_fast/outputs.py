"""Whether a result can be written where it is to go, found out before the work that makes it."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_writable(path: Path, option: str) -> None:
    """Raise ValueError unless a file or folder can be made at `path`, or in the folder that is there; none is left."""
    above = path
    try:
        above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=above if above.is_dir() or above != path else above.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{option}: {path} cannot be written ({above}: {error.strerror}); choose another --{option}"
        ) from None
