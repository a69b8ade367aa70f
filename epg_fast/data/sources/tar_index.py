"""The table of all images in a set of tars, and its file."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from epg_fast.files import open_atomically

_TEXTS = ("tars", "classes", "paths")
_COLUMNS = ("shard", "offset", "size", "label", "crc32")


@dataclass
class TarIndex:
    """Where the images lie: `paths` and the columns have one value per image.

    Attributes:
        tars: file names of the tars.
        classes: class names.
        paths: `<tar>/<member>`, or `<tar>/<inner tar>/<member>`.
        shard: position in `tars`, int32.
        offset, size: of the content, in bytes from the tar's beginning, int64.
        label: class index, int64.
        crc32: of the content, uint32, if `prepare-data` wrote the tars; else None.
    """

    tars: list[str]
    classes: list[str]
    paths: list[str]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    crc32: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def save(self, path: Path) -> None:
        """Write the index to `path`, at once. Raises OSError."""
        # no name holds a zero byte
        texts = {name: "\0".join(getattr(self, name)).encode("utf-8", "surrogateescape") for name in _TEXTS}
        columns = {name: getattr(self, name) for name in _COLUMNS if getattr(self, name) is not None}
        with open_atomically(path) as file:
            np.savez(file, **{name: np.frombuffer(text, np.uint8) for name, text in texts.items()}, **columns)

    @classmethod
    def load(cls, path: Path) -> TarIndex:
        """Return the index in `path`. Raises OSError if it cannot be read, ValueError if it is damaged."""
        try:
            # the sums in the zip archive are checked on the way
            with np.load(path, allow_pickle=False) as file:
                columns = dict(file)
            texts = {name: columns.pop(name).tobytes().decode("utf-8", "surrogateescape") for name in _TEXTS}
            return cls(**{name: text.split("\0") if text else [] for name, text in texts.items()}, **columns)
        except (EOFError, KeyError, TypeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged ({error})") from None
