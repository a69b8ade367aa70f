"""Write samples: one PNG to look at, one npz to measure, or a folder of PNG files.

Every file appears whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

from epg_fast.files import open_atomically

_LARGEST_ENLARGED_TILE = 96


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Convert float images [N, 3, H, W] in [0, 1] to uint8 [N, H, W, 3] the way torchvision's `save_image` does.

    `x * 255 + 0.5`, clamped to [0, 255], then truncated: rounding to the nearest level with ties going up.
    Raises ValueError for other shapes, for integers and for NaN (a NaN has no colour; truncating it is undefined).
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"expected float images [N, 3, H, W], got {images.dtype} {list(images.shape)}")
    images = images.detach()
    if images.isnan().any():
        raise ValueError("images contain NaN: the model or the sampler diverged")
    return quantize(images).cpu().numpy()


def quantize(images: torch.Tensor) -> torch.Tensor:
    """`to_uint8` on the device and without its checks: uint8 [N, H, W, 3], contiguous."""
    # float32 also for 16-bit inputs: bfloat16 cannot hold every level between 128 and 255.
    levels = images.float().mul(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()


def save_grid(
    images: torch.Tensor | np.ndarray,
    path: str | os.PathLike,
    columns: int | None = None,
    padding: int = 2,
    scale: int | None = None,
) -> None:
    """Write images as the tiles of one PNG, row by row, on white.

    `images`: float [N, 3, H, W] in [0, 1], or uint8 [N, H, W, 3] or [N, 3, H, W]. `columns`: tiles per row (default: a
    square grid). `padding`: white pixels around every tile. `scale`: whole-number enlargement by repeating pixels; by
    default tiles grow up to 96 pixels, and larger ones stay as they are. Raises ValueError for no images or another
    shape.
    """
    tiles = _as_nhwc(images)
    num, height, width, _ = tiles.shape
    if num == 0:
        raise ValueError("cannot draw a grid of no images")
    columns = min(columns or math.ceil(math.sqrt(num)), num)
    scale = scale or max(1, _LARGEST_ENLARGED_TILE // max(height, width))
    if columns < 1 or scale < 1 or padding < 0:
        raise ValueError(f"columns and scale must be at least 1 and padding at least 0: {columns}, {scale}, {padding}")
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    step_y, step_x = height * scale + padding, width * scale + padding
    rows = math.ceil(num / columns)
    canvas = np.full((rows * step_y + padding, columns * step_x + padding, 3), 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * step_y + padding, index % columns * step_x + padding
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    save_png(canvas, path)


# Positional-only, so that metadata may hold any name: a sampler's configuration has a `labels` of its own.
def save_npz(images: np.ndarray, labels: np.ndarray, path: str | os.PathLike, /, **metadata) -> None:
    """Write uint8 images [N, H, W, 3] and their integer labels [N] as `write_npz` does.

    Raises ValueError when shapes or dtypes differ from these.
    """
    images, labels = _checked(images, labels)
    write_npz(path, [images], labels, images.shape[1:], metadata)


def write_npz(
    path: str | os.PathLike,
    chunks: Iterable[np.ndarray],
    labels: np.ndarray,
    shape: tuple[int, int, int],
    metadata: dict,
) -> None:
    """Write samples in the layout of ADM's evaluation: `arr_0` images uint8 [N, H, W, 3], `arr_1` labels int64 [N].

    `chunks`: uint8 [n, H, W, 3], N images in all, one chunk in memory at a time. `labels`: [N]. `shape`: (H, W, 3).
    `metadata` (anything JSON holds) becomes one JSON text in the entry `metadata`; infinite numbers become the text
    "inf", since JSON has no word for them. Equal input gives equal bytes.
    Source: https://github.com/openai/guided-diffusion/tree/main/evaluations
    """
    text = json.dumps(finite(metadata), allow_nan=False)
    with open_atomically(path, sync=True) as file, zipfile.ZipFile(file, "w") as archive:
        with _member(archive, "arr_0") as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}
            np.lib.format.write_array_header_1_0(member, header)
            written = 0
            for chunk in chunks:
                assert chunk.dtype == np.uint8 and chunk.shape[1:] == tuple(shape)
                member.write(np.ascontiguousarray(chunk))
                written += len(chunk)
            assert written == len(labels)
        for name, array in (("arr_1", np.asarray(labels, np.int64)), ("metadata", np.array(text))):
            with _member(archive, name) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    # A ZipInfo of its own has a fixed date; ZIP64, because the size is not known to the format before it is written.
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def png_path(outdir: str | os.PathLike, label: int, index: int, classes: int = 0, images: int = 0) -> Path:
    """`outdir/<class, 4 digits>/<index, 6 digits>.png`; more digits, all names alike, for so many classes or images.

    Names then sort as numbers do, so that readers of the folder number its classes in the same order.
    """
    digits = max(4, len(str(classes - 1))), max(6, len(str(images - 1)))
    return Path(outdir) / f"{label:0{digits[0]}d}" / f"{index:0{digits[1]}d}.png"


def save_png(image: np.ndarray, path: str | os.PathLike) -> None:
    """Write one uint8 image [H, W, 3]."""
    with open_atomically(path) as file:
        Image.fromarray(image).save(file, format="PNG")


def save_pngs(images: np.ndarray, labels: np.ndarray, outdir: str | os.PathLike, start: int = 0) -> None:
    """Write uint8 images [N, H, W, 3] with integer labels [N] to their `png_path`.

    `start`: index of the first image, so that batches of one run can follow each other.
    Raises ValueError when shapes or dtypes differ from these.
    """
    images, labels = _checked(images, labels)
    for index, (image, label) in enumerate(zip(images, labels, strict=True), start):
        save_png(image, png_path(outdir, label, index))


def _as_nhwc(images: torch.Tensor | np.ndarray) -> np.ndarray:
    images = torch.as_tensor(images)
    if images.is_floating_point():
        return to_uint8(images)
    if images.dtype != torch.uint8 or images.ndim != 4 or 3 not in (images.shape[3], images.shape[1]):
        raise ValueError(f"expected float [N, 3, H, W] or uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
    images = images.cpu()
    return (images if images.shape[3] == 3 else images.permute(0, 2, 3, 1)).numpy()


def _checked(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"expected uint8 images [N, H, W, 3], got {images.dtype} {list(images.shape)}")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"expected {len(images)} integer labels, got {labels.dtype} {list(labels.shape)}")
    return images, labels.astype(np.int64)


def finite(value):
    """`value` with numbers that are not finite as text, since JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
