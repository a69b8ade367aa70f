"""The interface of every source of encoded images."""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from epg_fast.data.sources.decoding import decode_image
from epg_fast.data.sources.faults import ReadError, printable, read_error, whose_fault

WANTED = "wanted a folder of class folders with images, of tars or of parquet files, or a tar or parquet file"
NO_LABELS = ["all"]
"""`classes` of images of which no class is known."""
LABEL_KEYS = ("label", "cls", "class", "class_id", "class_index", "target")
"""Of a .json beside an image in a tar: where its class index is looked for."""
LABELS_WANTED = (
    f"wanted class folders, a dataset.json with labels, key.cls or key.json ({'/'.join(LABEL_KEYS)}) beside key.jpg in "
    "tars, tars of classes (cat.tar with cat_1.jpg; names that differ in digits alone are shards), or a column `label` "
    "of a parquet file"
)
MOST_CLASSES = 1_000_000
# Seconds to wait for a disk that is away, and after how many to say so.
_PATIENCE, _SILENCE = 600.0, 2.0

logger = logging.getLogger("epg_fast")


class ImageSource(abc.ABC):
    """A fixed list of labelled, encoded images with access to any of them.

    Attributes:
        root: the folder or file that was opened.
        paths: names of the images, relative to `root`, with `/`.
        labels: class index of each image.
        classes: names of all classes; the class index is the position in this list.
        slow_at_random: why reading in any order is slow, and what to do; empty where it is not.
    """

    root: Path
    paths: Sequence[str]
    labels: Sequence[int]
    classes: list[str]
    slow_at_random: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    @abc.abstractmethod
    def read(self, i: int) -> bytes:
        """Return the encoded image `i`. Raises OSError if it cannot be read."""

    def mixed(self, rng: np.random.Generator) -> np.ndarray:
        """Return the positions of all images, int64, in a random order in which they can be read fast."""
        return rng.permutation(len(self))

    def load(self, i: int) -> Image.Image:
        """Return image `i`, decoded: see `decode_image`."""
        return decode_image(self.read(i))

    def examine(self, i: int, make: Callable[[bytes], Any] = decode_image) -> tuple[Any, str | None]:
        """Return what `make` makes of the encoded image `i`, and None; or None, and why the image is bad.

        A disk that is away is waited for. What is not the image's fault raises `ReadError`.
        """
        started, pause, told = time.monotonic(), 0.1, False
        while True:
            try:
                return make(self.read(i)), None
            except Exception as error:
                fault = whose_fault(error, self.root)
                if fault == "image":
                    return None, f"{type(error).__name__}: {error}"
                name, waited = printable(str(self.root / self.paths[i])), time.monotonic() - started
                if fault == "machine":
                    raise read_error(error, f"read {name}") from error
                if waited > _PATIENCE:
                    message = f"{name} could not be read for {waited:.0f} s ({error.strerror}); is the disk there?"
                    raise ReadError(f"{message} Then give the same command again") from error
                if waited > _SILENCE and not told:
                    told = True
                    logger.warning("waiting for the disk: %s cannot be read (%s)", name, error.strerror)
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hexadecimal) of the relative paths and their labels; the contents are not read."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            digest.update(os.fsencode(path) + b"\0" + str(int(label)).encode() + b"\n")
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.root)!r}: {len(self)} images, {len(self.classes)} classes)"

    def __getstate__(self) -> dict:
        """Caches, which are made when they are used, stay with their process."""
        caches = {name for name in dir(type(self)) if isinstance(getattr(type(self), name), functools.cached_property)}
        return {name: value for name, value in vars(self).items() if name not in caches}


@contextlib.contextmanager
def images_of(option: str) -> Iterator[None]:
    """Errors name this option, which says where the images are; of two around each other, the outer one."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {str(error).removeprefix('data path: ')}") from None


def existing(path: str | os.PathLike) -> Path:
    """Return `path` as a `Path`. Raises ValueError if nothing is there."""
    if not os.fspath(path):
        raise ValueError(f"got an empty path, {WANTED}; set data.path")
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist, {WANTED}; check the spelling or prepare the data")
    return Path(path)


def warn_of_no_labels(where: object) -> None:
    """Say that the images at `where` are `NO_LABELS`."""
    logger.warning("%s: no image has a label: one class, '%s'", where, *NO_LABELS)
