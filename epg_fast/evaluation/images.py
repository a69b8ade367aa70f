"""Images of an npz file or a folder: streams of equally large RGB images, and small grayscale vectors."""

from __future__ import annotations

import abc
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from epg_fast.data import ImageFolder, ImageSource
from epg_fast.npz import Npz

_DECODERS, _BATCH = 4, 64


class ImageStream(abc.ABC):
    """Images of one size in a fixed order, of which a batch at a time is in memory.

    `path`: where they are. `num`: how many. `size`: (height, width) in pixels. `labels`: class indices int64 [N], or
    None where the source does not say.
    """

    path: Path
    num: int
    size: tuple[int, int]
    labels: np.ndarray | None

    @abc.abstractmethod
    def batches(self, batch_size: int, first: int = 0, step: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (which images, the images as uint8 [B, 3, H, W]) of batches first, first + step, ... in order.

        Raises ValueError for what cannot be read.
        """


class NpzStream(ImageStream):
    """`arr_0` of an npz file: uint8 [N, H, W, 3], the layout of ADM's evaluation and of `epg_fast sample`."""

    def __init__(self, path: str | os.PathLike):
        self.path, self._file = Path(path), Npz(path)
        shape, dtype = self._file.header("arr_0")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise ValueError(f"{path}: arr_0 must be uint8 [N, H, W, 3] with N > 0, got {dtype} {list(shape)}")
        self.num, self.size, self.labels = shape[0], shape[1:3], None
        if "arr_1" in self._file.names:
            labels = self._file.array("arr_1")
            if labels.shape != (self.num,) or not np.issubdtype(labels.dtype, np.integer):
                got = f"{labels.dtype} {list(labels.shape)}"
                raise ValueError(f"{path}: arr_1 must hold {self.num} integers, got {got}")
            self.labels = labels.astype(np.int64)

    def batches(self, batch_size, first=0, step=1):
        for number, batch in enumerate(self._file.batches("arr_0", batch_size)):
            if number % step == first:
                start = number * batch_size
                yield slice(start, start + len(batch)), torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())


class FolderStream(ImageStream):
    """The image files of a folder of class folders, or of one without images in subfolders, sorted by their paths."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        for name in ("samples.npz", "parts"):
            if (self.path / name).exists():
                raise ValueError(
                    f"{path} is an output folder of `sample` (it holds {name}); pass its samples.npz, or its png folder"
                )
        self.files = ImageFolder(self.path, flat=True)
        self.num, self.classes = len(self.files), self.files.classes
        self.size = read_image(self.files, 0).size[::-1]
        self.labels = np.array(self.files.labels, np.int64)

    def stamp(self) -> str:
        """A digest of the sizes and times of the files; their contents are not read."""
        digest = hashlib.sha256()
        for path in self.files.paths:
            found = os.stat(self.files.root / path)
            digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def batches(self, batch_size, first=0, step=1):
        with ThreadPoolExecutor(_DECODERS) as pool:
            for start in range(first * batch_size, self.num, step * batch_size):
                part = slice(start, min(start + batch_size, self.num))
                yield part, torch.stack(list(pool.map(self._pixels, range(part.start, part.stop))))

    def _pixels(self, i: int) -> torch.Tensor:
        image = read_image(self.files, i)
        if image.size != self.size[::-1]:
            raise ValueError(
                f"{self.files.root / self.files.paths[i]}: the image is {image.width}x{image.height}, the first one "
                f"{size_words(self.size)}; give images of one size (epg-fast prepare-data crops them)"
            )
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def size_words(size: tuple[int, int]) -> str:
    """(height, width) as people say it."""
    return f"{size[1]}x{size[0]}"


def open_stream(path: str | os.PathLike) -> ImageStream:
    """Return the images at `path`: an npz file, a folder of class folders, or a folder of image files.

    Raises ValueError for anything else, for no images, and for images beside class folders and an output folder of
    `sample` (which of them are meant?).
    """
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file or folder")
    return FolderStream(path) if Path(path).is_dir() else NpzStream(path)


def read_image(files: ImageSource, i: int) -> Image.Image:
    """Image `i` of a folder as RGB. Raises ValueError that names the file when it cannot be decoded."""
    image, reason = files.examine(i)
    if image is None:
        raise ValueError(f"{files.root / files.paths[i]}: cannot be decoded ({reason}); restore or delete it")
    return image


def load_images(source: str | os.PathLike, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Read images as grayscale vectors: (features float64 [N, size*size] in [0, 1], labels int64 [N]).

    `source`: an npz with `arr_0` (uint8 [N, H, W, 3]) and `arr_1` (labels), as `epg_fast sample` writes it, or a folder
    of class folders, where the index of a class is the rank of its folder's name (`epg_fast.data.ImageFolder`). Gray is
    Pillow's "L" (ITU-R 601 luma, which keeps gray pixels as they are); an image that is not `size` x `size` yet is
    reduced or enlarged with Pillow's BICUBIC, after a centre crop to a square. Raises ValueError for a missing or empty
    source, other arrays and images without a class.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1: {size}")
    if Path(source).is_dir():
        files = ImageFolder(source)
        vectors = [_gray_vector(read_image(files, i), size) for i in range(len(files))]
        return np.stack(vectors), np.array(files.labels, dtype=np.int64)
    stream = open_stream(source)
    if stream.labels is None:
        raise ValueError(f"{source}: expected arr_0 (images) and arr_1 (labels), found no arr_1")
    return np.concatenate([gray_vectors(batch, size) for _, batch in stream.batches(_BATCH)]), stream.labels


def gray_vectors(images: torch.Tensor, size: int) -> np.ndarray:
    """Images uint8 [N, 3, H, W] as `load_images` gives them: float64 [N, size*size] in [0, 1]."""
    return np.stack([_gray_vector(Image.fromarray(image), size) for image in images.permute(0, 2, 3, 1).numpy()])


def round_trip(features: np.ndarray, through: int) -> np.ndarray:
    """Enlarge grayscale vectors [N, S*S] in [0, 1] to `through` x `through` and reduce them again, both BICUBIC.

    What `load_images` would see of a model that reproduces enlarged images perfectly.
    """
    size = round(features.shape[1] ** 0.5)
    levels = np.rint(features * 255).astype(np.uint8).reshape(-1, size, size)
    enlarged = (Image.fromarray(level).resize((through, through), Image.Resampling.BICUBIC) for level in levels)
    return np.stack([_gray_vector(image, size) for image in enlarged])


def _gray_vector(image: Image.Image, size: int) -> np.ndarray:
    # Pillow's resize to the size that an image has already changes no pixel.
    image = ImageOps.fit(image.convert("L"), (size, size), method=Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float64).ravel() / 255
