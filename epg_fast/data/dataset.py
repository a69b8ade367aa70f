"""Any dataset on disk by its path."""

from __future__ import annotations

import os
from pathlib import Path

from epg_fast.data.folder import ImageFolder
from epg_fast.data.names import is_compressed_tar, is_tar
from epg_fast.data.source import ImageSource
from epg_fast.data.tars import ImageTars
from epg_fast.files import is_junk

_WANTED = "wanted a folder of class folders with images, a folder of tars, or a tar"


def open_images(path: str | os.PathLike) -> ImageSource:
    """Return the images at `path`: a folder of class folders (`ImageFolder`), a tar or a folder of tars (`ImageTars`).

    Raises ValueError for anything else, and for a folder that has both tars and folders.
    """
    if not os.fspath(path):
        raise ValueError(f"data path: got an empty path, {_WANTED}; set data.path")
    path = Path(path)
    if not path.exists():
        raise ValueError(f"data path: {path} does not exist, {_WANTED}; check the spelling or prepare the data")
    if not path.is_dir():
        if not _is_tar(path.name):
            remedy = "unzip it and pass the folder" if path.suffix.lower() == ".zip" else "pass the folder instead"
            raise ValueError(f"data path: {path} is a file, {_WANTED}; {remedy}")
        return ImageTars(path)
    tars, folders = _tars_and_folders(path)
    if tars and folders:
        raise ValueError(
            f"data path: {path} has both tars ({tars[0]}) and folders ({folders[0]}), wanted one kind; "
            f"pass {path / tars[0]} or {path / folders[0]}, or move one kind away"
        )
    return ImageTars(path) if tars else ImageFolder(path)


def holds_tars(path: Path) -> bool:
    """Whether `open_images` takes `path` for a tar or a folder of tars, which may be compressed."""
    if not path.is_dir():
        return path.is_file() and _is_tar(path.name)
    tars, folders = _tars_and_folders(path)
    return bool(tars) and not folders


def _tars_and_folders(path: Path) -> tuple[list[str], list[str]]:
    """Return the names of the tars, compressed ones too, and of the folders in `path`, sorted."""
    with os.scandir(path) as entries:
        visible = sorted((entry for entry in entries if not is_junk(entry.name)), key=lambda entry: entry.name)
    folders = [entry.name for entry in visible if entry.is_dir()]
    return [entry.name for entry in visible if _is_tar(entry.name) and not entry.is_dir()], folders


def _is_tar(name: str) -> bool:
    return is_tar(name) or is_compressed_tar(name)
