"""Load samples and real images for comparison: small grayscale vectors, or RGB at the encoder's size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from epg_fast.data import ImageFolder, ImageSource
from epg_fast.evaluation.npz import Npz


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
    features, labels = [], []
    for image, label in _open(source):
        features.append(_gray_vector(image, size))
        labels.append(label)
    return np.stack(features), np.array(labels, dtype=np.int64)


def gray_vectors(images: torch.Tensor, size: int) -> np.ndarray:
    """Images uint8 [N, 3, H, W] as `load_images` gives them: float64 [N, size*size] in [0, 1]."""
    return np.stack([_gray_vector(Image.fromarray(image), size) for image in images.permute(0, 2, 3, 1).numpy()])


def stored_size(source: str | os.PathLike) -> int:
    """Shorter side in pixels of the first image of `source` as stored. Raises ValueError as `load_images` does."""
    return min(next(_open(source))[0].size)


def round_trip(features: np.ndarray, through: int) -> np.ndarray:
    """Enlarge grayscale vectors [N, S*S] in [0, 1] to `through` x `through` and reduce them again, both BICUBIC.

    What `load_images` would see of a model that reproduces enlarged images perfectly.
    """
    size = round(features.shape[1] ** 0.5)
    levels = np.rint(features * 255).astype(np.uint8).reshape(-1, size, size)
    enlarged = (Image.fromarray(level).resize((through, through), Image.Resampling.BICUBIC) for level in levels)
    return np.stack([_gray_vector(image, size) for image in enlarged])


def read_image(files: ImageSource, i: int) -> Image.Image:
    """Image `i` of a folder as RGB. Raises ValueError that names the file when it cannot be decoded."""
    image, reason = files.examine(i)
    if image is None:
        raise ValueError(f"{files.root / files.paths[i]}: cannot be decoded ({reason}); restore or delete it")
    return image


def _gray_vector(image: Image.Image, size: int) -> np.ndarray:
    # Pillow's resize to the size that an image has already changes no pixel.
    image = ImageOps.fit(image.convert("L"), (size, size), method=Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float64).ravel() / 255


def _open(source: str | os.PathLike) -> Iterator[tuple[Image.Image, int]]:
    if not Path(source).exists():
        raise ValueError(f"{source}: no such file or folder")
    if not Path(source).is_dir():
        yield from _open_npz(Path(source))
        return
    files = ImageFolder(source)
    for i, label in enumerate(files.labels):
        yield read_image(files, i), label


def _open_npz(path: Path) -> Iterator[tuple[Image.Image, int]]:
    file = Npz(path)
    if "arr_0" not in file.names or "arr_1" not in file.names:
        raise ValueError(f"{path}: expected arr_0 (images) and arr_1 (labels), found {file.names}")
    num, labels = file.images()[0], file.array("arr_1")
    if labels.shape != (num,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path}: arr_1 must hold {num} integers, got {labels.dtype} {list(labels.shape)}")
    for (image,), label in zip(file.batches("arr_0", 1), labels, strict=True):
        yield Image.fromarray(image), int(label)
