"""Any dataset on disk by its path."""

from __future__ import annotations

import os

from epg_fast.data.sources.folder import ImageFolder
from epg_fast.data.sources.names import is_tar
from epg_fast.data.sources.source import WANTED, ImageSource, existing
from epg_fast.data.sources.tars import ImageTars
from epg_fast.files import is_junk


def open_images(path: str | os.PathLike) -> ImageSource:
    """Return the images at `path`: a folder of class folders (`ImageFolder`), a tar or a folder of tars (`ImageTars`).

    Raises ValueError for anything else, and for a folder that has both tars and folders.
    """
    path = existing(path)
    if not path.is_dir():
        if not is_tar(path.name):
            remedy = "unzip it and pass the folder" if path.suffix.lower() == ".zip" else "pass the folder instead"
            raise ValueError(f"data path: {path} is a file, {WANTED}; {remedy}")
        return ImageTars(path)
    with os.scandir(path) as entries:
        visible = {entry.name: entry.is_dir() for entry in entries if not is_junk(entry.name)}
    tars = sorted(name for name, is_folder in visible.items() if is_tar(name) and not is_folder)
    folders = sorted(name for name, is_folder in visible.items() if is_folder)
    if tars and folders:
        raise ValueError(
            f"data path: {path} has both tars ({tars[0]}) and folders ({folders[0]}), wanted one kind; "
            f"pass {path / tars[0]} or {path / folders[0]}, or move one kind away"
        )
    return ImageTars(path) if tars else ImageFolder(path)
