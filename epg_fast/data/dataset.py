"""Any dataset on disk by its path."""

from __future__ import annotations

import os

from epg_fast.data.folder import ImageFolder
from epg_fast.data.source import ImageSource


def open_images(path: str | os.PathLike) -> ImageSource:
    """Return the images at `path`: a folder of class folders (`ImageFolder`). Raises ValueError for anything else."""
    return ImageFolder(path)
