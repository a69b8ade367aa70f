"""The handwritten digits inside scikit-learn as a folder of class folders: a data set without a download."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from epg_fast.files import is_junk, write_atomically


def prepare_digits(outdir: str | os.PathLike) -> dict[str, int]:
    """Write 1347 training and 450 test digits as `outdir`/{train,test}/<digit>/<index>.png and return these two counts.

    The files are RGB with the 8x8 original pixels (0..16 scaled to 0..255), not enlarged: the centre crop brings them
    to the training size, and evaluation compares samples with the originals. The stratified 75/25 split never changes;
    <index> is the position in scikit-learn's array. An earlier output is completed or left alone.
    Raises ValueError if `outdir` holds anything else, and ImportError without scikit-learn.
    """
    images = _digit_images()
    outdir = Path(outdir)
    if outdir.exists() and not outdir.is_dir():
        raise ValueError(f"outdir: {outdir} is a file, wanted a folder; choose another outdir")
    files = [path.relative_to(outdir) for path in outdir.rglob("*") if not path.is_dir()]
    present = {path.as_posix() for path in files if not any(map(is_junk, path.parts))}
    for path in sorted(present - images.keys()):
        wanted = "wanted an empty or new folder or an earlier output"
        raise ValueError(f"outdir: {outdir} holds {path}, no digit, {wanted}; choose another outdir")
    for path in images.keys() - present:
        buffer = io.BytesIO()
        Image.fromarray(images[path]).save(buffer, "PNG")
        write_atomically(outdir / path, buffer.getvalue())
    return {split: sum(path.startswith(split) for path in images) for split in ("train", "test")}


def _digit_images() -> dict[str, np.ndarray]:
    """Return relative path -> uint8 [8, 8, 3] of every digit."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error

    digits = load_digits()
    pixels = np.repeat(np.round(digits.images * 255 / 16).astype(np.uint8)[..., None], 3, axis=-1)
    train, test = train_test_split(np.arange(len(pixels)), test_size=0.25, random_state=0, stratify=digits.target)
    return {
        f"{split}/{digits.target[i]}/{i:04d}.png": pixels[i]
        for split, rows in (("train", train), ("test", test))
        for i in rows
    }
