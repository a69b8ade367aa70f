"""Samples as the `sample` command writes them."""

from pathlib import Path

import numpy as np

from epg_fast.files import as_json
from epg_fast.npz import write_npz
from epg_fast.sampling.outputs import save_png


def save_npz(images: np.ndarray, labels: np.ndarray, path: Path, /, **note) -> None:
    """uint8 [N, H, W, 3] and labels [N] as samples.npz."""
    write_npz(path, [images], labels, images.shape[1:], as_json(note))


def save_pngs(images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """uint8 [N, H, W, 3] with labels [N] as folder/<class>/<index>.png."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        save_png(image, Path(folder) / f"{label:04d}" / f"{index:06d}.png")
