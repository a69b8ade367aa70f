"""The table of all images in a set of tars, and its file."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from epg_fast.files import open_atomically

INDEX = "index.npz"
# 2: what counts as an image, a label and a class tar is another, and links are followed.
# 3: whole floats are labels, and splits beside each other are refused.
_VERSION = 3
# Nothing that `prepare-data` writes has changed.
_VERSION_OF_CHECKSUMS = 1
_ZIP = b"PK\3\4"
_DTYPES = {"shard": np.int32, "offset": np.int64, "size": np.int64, "label": np.int64, "crc32": np.uint32}


class ForeignIndex(ValueError):
    """A readable .npz that is no index of ours."""


def has_checksums(path: Path) -> bool:
    """Whether `path` is an index that `prepare-data` wrote, as far as the names of its columns tell."""
    try:
        with zipfile.ZipFile(path) as file:
            return {"version.npy", "tar_bytes.npy", "crc32.npy"} <= set(file.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False


class Names(Sequence[str]):
    """An immutable list of names in two arrays: no object per name, which forked workers would copy by touching it."""

    def __init__(self, names: Sequence[str] = (), *, packed: tuple[np.ndarray, np.ndarray] | None = None):
        if packed is None:
            encoded = [os.fsencode(name) for name in names]
            bounds = np.zeros(len(encoded) + 1, np.int64)
            np.cumsum([len(name) for name in encoded], out=bounds[1:])
            packed = np.frombuffer(b"".join(encoded), np.uint8), bounds
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed[1]) - 1

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]
        text, bounds = self.packed
        return os.fsdecode(text[bounds[i] : bounds[i + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        text, bounds = self.packed[0].tobytes(), self.packed[1].tolist()
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            yield os.fsdecode(text[start:stop])


@dataclass
class TarIndex:
    """Where the images lie: the columns have one value per image.

    Attributes:
        tars: file names of the tars.
        tar_bytes, tar_mtime: their sizes, and modification times in ns, int64.
        classes: class names.
        names: member names; of a tar inside a tar `<inner tar>/<member>`.
        shard: position in `tars`, int32.
        offset, size: of the content, in bytes from the tar's beginning, int64.
        label: class index, int64.
        crc32: of the content, uint32, if `prepare-data` wrote the tars; else None.
    """

    tars: list[str]
    tar_bytes: np.ndarray
    tar_mtime: np.ndarray
    classes: list[str]
    names: Names
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    crc32: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    def save(self, path: Path) -> None:
        """Write the index to `path`, at once. Raises OSError."""
        columns = {name: getattr(self, name) for name in _DTYPES if getattr(self, name) is not None}
        for name in ("tars", "classes", "names"):
            names = getattr(self, name)
            columns[f"{name}_text"], columns[f"{name}_bounds"] = (names if name == "names" else Names(names)).packed
        with open_atomically(path) as file:
            version = _VERSION if self.crc32 is None else _VERSION_OF_CHECKSUMS
            np.savez(file, version=version, tar_bytes=self.tar_bytes, tar_mtime=self.tar_mtime, **columns)

    @classmethod
    def load(cls, path: Path) -> TarIndex:
        """Return the index in `path`. Raises FileNotFoundError, `ForeignIndex` or, if it is damaged, ValueError."""
        try:
            with open(path, "rb") as file:
                if file.read(len(_ZIP)) != _ZIP:
                    # NumPy would speak of pickles
                    raise ValueError("not an .npz file")
            # the sums in the zip archive are checked on the way
            with np.load(path, allow_pickle=False) as file:
                columns = dict(file)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged ({error})") from None
        if "version" not in columns or "tar_bytes" not in columns:
            raise ForeignIndex(f"{path} is no index of tars")
        if columns.pop("version") != (_VERSION_OF_CHECKSUMS if "crc32" in columns else _VERSION):
            raise ValueError(f"{path} is of another version")
        try:
            for name in ("tars", "classes", "names"):
                columns[name] = Names(packed=(columns.pop(f"{name}_text"), columns.pop(f"{name}_bounds")))
            index = cls(**{**columns, "tars": list(columns["tars"]), "classes": list(columns["classes"])})
            index._check()
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error})") from None
        return index

    def _check(self) -> None:
        for name, dtype in _DTYPES.items():
            column = getattr(self, name)
            if column is not None and (column.dtype != dtype or column.shape != (len(self),)):
                raise ValueError(f"column {name} has the wrong shape or type")
        if not len(self.tars) == len(self.tar_bytes) == len(self.tar_mtime):
            raise ValueError("the columns of the tars have different lengths")
        if len(self) and not (
            0 <= self.shard.min() <= self.shard.max() < len(self.tars)
            and 0 <= self.label.min() <= self.label.max() < len(self.classes)
            and min(self.offset.min(), self.size.min()) >= 0
            and np.all(self.offset + self.size <= self.tar_bytes[self.shard])
        ):
            raise ValueError("values out of range")
