"""Any dataset on disk by its path."""

from __future__ import annotations

import os

from epg_fast.data.sources.folder import ImageFolder
from epg_fast.data.sources.names import is_parquet, is_tar
from epg_fast.data.sources.parquet import ImageParquet, is_pattern
from epg_fast.data.sources.source import WANTED, ImageSource, existing
from epg_fast.data.sources.tars import ImageTars
from epg_fast.files import is_junk


def open_images(path: str | os.PathLike) -> ImageSource:
    """Return the images at `path`.

    A folder of class folders is an `ImageFolder`, a tar or a folder of tars an `ImageTars`, and a parquet file, a
    folder of them or a pattern of their names (`data/validation-*.parquet`) an `ImageParquet`.
    Raises ValueError for anything else, and for a folder with several kinds of these.
    """
    if is_pattern(path):
        return ImageParquet(path)
    path = existing(path)
    if not path.is_dir():
        if is_tar(path.name) or is_parquet(path.name):
            return ImageTars(path) if is_tar(path.name) else ImageParquet(path)
        remedy = "unzip it and pass the folder" if path.suffix.lower() == ".zip" else "pass the folder instead"
        raise ValueError(f"data path: {path} is a file, {WANTED}; {remedy}")
    kinds: dict[str, list[str]] = {"tars": [], "parquet files": [], "folders": []}
    with os.scandir(path) as entries:
        for entry in entries:
            if is_junk(entry.name):
                continue
            if entry.is_dir():
                kinds["folders"].append(entry.name)
            elif is_tar(entry.name) or is_parquet(entry.name):
                kinds["tars" if is_tar(entry.name) else "parquet files"].append(entry.name)
    first = {kind: min(names) for kind, names in kinds.items() if names}
    if len(first) > 1:
        found = " and ".join(f"{kind} ({name})" for kind, name in first.items())
        raise ValueError(
            f"data path: {path} has both {found}, wanted one kind; "
            f"pass {' or '.join(str(path / name) for name in first.values())}, or move the others away"
        )
    if kinds["tars"] or kinds["parquet files"]:
        return ImageTars(path) if kinds["tars"] else ImageParquet(path)
    return ImageFolder(path)
