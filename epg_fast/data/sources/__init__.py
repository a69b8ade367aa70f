"""Any dataset on disk by its path."""

from __future__ import annotations

import os

from epg_fast.data.sources.folder import ImageFolder
from epg_fast.data.sources.names import is_parquet, is_tar
from epg_fast.data.sources.parquet import ImageParquet, is_pattern
from epg_fast.data.sources.source import WANTED, ImageSource, existing, images_of
from epg_fast.data.sources.tars import ImageTars
from epg_fast.files import is_junk


@images_of("data path")
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
        reader = _reader(path.name)
        if reader is None:
            remedy = "unzip it and pass the folder" if path.suffix.lower() == ".zip" else "pass the folder instead"
            raise ValueError(f"{path} is a file, {WANTED}; {remedy}")
        return reader(path)
    first = {}
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            reader = ImageFolder if entry.is_dir() else _reader(entry.name)
            if reader is not None and not is_junk(entry.name):
                first.setdefault(reader, entry.name)
    if len(first) > 1:
        found = " and ".join(f"{_KINDS[reader]} ({first[reader]})" for reader in _KINDS if reader in first)
        raise ValueError(f"{path} has both {found}, wanted one kind; pass one of these, or move the others away")
    return next(iter(first), ImageFolder)(path)


_KINDS = {ImageTars: "tars", ImageParquet: "parquet files", ImageFolder: "folders"}


def _reader(name: str) -> type[ImageSource] | None:
    """Of a file of this name."""
    return ImageTars if is_tar(name) else ImageParquet if is_parquet(name) else None
