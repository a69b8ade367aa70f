"""Streams of equally large RGB images for a feature network, from an npz file or a folder."""

from __future__ import annotations

import abc
import functools
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from epg_fast.data import ImageFolder
from epg_fast.evaluation.images import read_image
from epg_fast.evaluation.npz import Npz
from epg_fast.files import file_sha256

_DECODERS = 4


class ImageStream(abc.ABC):
    """Images of one size in a fixed order, of which a batch at a time is in memory.

    `path`: where they are. `num`: how many. `size`: (height, width) in pixels. `labels`: class indices int64 [N], or
    None where the source does not say. `identity`: what tells it from other images, for JSON.
    """

    path: Path
    num: int
    size: tuple[int, int]
    labels: np.ndarray | None
    identity: dict

    @abc.abstractmethod
    def batches(self, batch_size: int, first: int = 0, step: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (which images, the images as uint8 [B, 3, H, W]) of batches first, first + step, ... in order.

        Raises ValueError for what cannot be read.
        """


class NpzStream(ImageStream):
    """`arr_0` of an npz file: uint8 [N, H, W, 3], the layout of ADM's evaluation and of `epg_fast sample`."""

    def __init__(self, path: str | os.PathLike):
        self.path, self._file = Path(path), Npz(path)
        self.num, *size = self._file.images()
        self.size = tuple(size)
        self.labels = self._read_labels() if "arr_1" in self._file.names else None

    @functools.cached_property
    def identity(self) -> dict:
        return {"path": str(self.path), "sha256": file_sha256(self.path)}

    def _read_labels(self) -> np.ndarray:
        labels = self._file.array("arr_1")
        if labels.shape != (self.num,) or not np.issubdtype(labels.dtype, np.integer):
            got = f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"{self.path}: arr_1 must hold {self.num} integers, got {got}")
        return labels.astype(np.int64)

    def batches(self, batch_size, first=0, step=1):
        for number, batch in enumerate(self._file.batches("arr_0", batch_size)):
            if number % step == first:
                start = number * batch_size
                yield slice(start, start + len(batch)), torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())


class FolderStream(ImageStream):
    """The image files of a folder of class folders, or of one without images in subfolders, sorted by their paths."""

    def __init__(self, path: str | os.PathLike):
        self.path, self._files = Path(path), _open_folder(Path(path))
        self.num = len(self._files)
        width, height = read_image(self._files, 0).size
        self.size = height, width
        self.labels = np.array(self._files.labels, np.int64)
        self.classes = self._files.classes

    @functools.cached_property
    def identity(self) -> dict:
        return {"path": str(self.path), "fingerprint": self._files.fingerprint()}

    @functools.cached_property
    def stamp(self) -> str:
        """A digest of the sizes and times of the files; their contents are not read."""
        digest = hashlib.sha256()
        for path in self._files.paths:
            found = os.stat(self._files.root / path)
            digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def batches(self, batch_size, first=0, step=1):
        with ThreadPoolExecutor(_DECODERS) as pool:
            for start in range(first * batch_size, self.num, step * batch_size):
                part = slice(start, min(start + batch_size, self.num))
                yield part, torch.stack(list(pool.map(self._pixels, range(part.start, part.stop))))

    def _pixels(self, i: int) -> torch.Tensor:
        image: Image.Image = read_image(self._files, i)
        if image.size != self.size[::-1]:
            raise ValueError(
                f"{self._files.root / self._files.paths[i]}: the image is {image.width}x{image.height}, the first one "
                f"{self.size[1]}x{self.size[0]}; give images of one size (epg-fast prepare-data crops them)"
            )
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def open_stream(path: str | os.PathLike) -> ImageStream:
    """Return the images at `path`: an npz file, a folder of class folders, or a folder of image files.

    Raises ValueError for anything else, for no images, and for images beside class folders and an output folder of
    `sample` (which of them are meant?).
    """
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file or folder")
    return FolderStream(path) if Path(path).is_dir() else NpzStream(path)


def _open_folder(path: Path) -> ImageFolder:
    for name in ("samples.npz", "parts"):
        if (path / name).exists():
            raise ValueError(
                f"{path} is an output folder of `sample` (it holds {name}); pass its samples.npz, or its png folder"
            )
    return ImageFolder(path, flat=True)
