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


def pictures(seed: int, num: int, size: int = 32, contrast: float = 40) -> np.ndarray:
    """uint8 [N, H, W, 3]: noise around colours that differ by `contrast`."""
    rng = np.random.default_rng(seed)
    base = rng.normal(128, contrast, size=(num, 1, 1, 3)) + rng.normal(0, 25, size=(num, size, size, 3))
    return base.clip(0, 255).astype(np.uint8)
