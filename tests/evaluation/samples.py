"""Samples as the `sample` command writes them."""

from pathlib import Path

import numpy as np

from epg_fast.sampling.command import finite
from epg_fast.sampling.outputs import save_png, write_npz


def save_npz(images: np.ndarray, labels: np.ndarray, path: Path, /, **note) -> None:
    """uint8 [N, H, W, 3] and labels [N] as samples.npz."""
    write_npz(path, [images], labels, images.shape[1:], finite(note))


def save_pngs(images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """uint8 [N, H, W, 3] with labels [N] as folder/<class>/<index>.png."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        save_png(image, Path(folder) / f"{label:04d}" / f"{index:06d}.png")
