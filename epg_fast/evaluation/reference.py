"""What samples are compared with: images, stored statistics of images, or both, as in ADM's reference files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from epg_fast.evaluation.npz import Npz
from epg_fast.evaluation.sources import ImageStream, NpzStream, open_stream


@dataclass(frozen=True)
class Reference:
    """`statistics`: (mean float64 [D], covariance float64 [D, D]) of features, if the file has them; `images` likewise.

    At least one of the two is there.
    """

    statistics: tuple[np.ndarray, np.ndarray] | None
    images: ImageStream | None


def open_reference(path: str | os.PathLike, num_features: int, size: tuple[int, int]) -> Reference:
    """Open an npz with `mu` and `sigma`, with `arr_0` (uint8 [M, H, W, 3]) or with all, or a folder of images.

    `num_features`: width D that statistics must have. `size`: (height, width) that images must have, the samples'.
    ADM's files hold statistics of the whole dataset and 10000 images for precision and recall; the former are used as
    they are. `mu_s` and `sigma_s` (sFID) are not used. Raises ValueError for other files, shapes, sizes and values.
    Source: https://github.com/openai/guided-diffusion/tree/main/evaluations
    """
    if Path(path).is_dir() or not Path(path).exists():
        reference = Reference(None, open_stream(path))
    else:
        file = Npz(path)
        if not {"arr_0", "mu", "sigma"} & set(file.names):
            raise ValueError(f"{path}: expected arr_0 (images), or mu and sigma (statistics), found {file.names}")
        stored = "mu" in file.names or "sigma" in file.names
        reference = Reference(
            _statistics(file, num_features) if stored else None, NpzStream(path) if "arr_0" in file.names else None
        )
    if reference.images and reference.images.size != size:
        got, wanted = ("x".join(map(str, (w, h))) for h, w in (reference.images.size, size))
        raise ValueError(f"{path}: its images are {got}, the samples {wanted}; take a reference of the samples' size")
    return reference


def _statistics(file: Npz, dim: int) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for name, wanted in (("mu", (dim,)), ("sigma", (dim, dim))):
        shape, dtype = file.header(name)
        if shape != wanted or not np.issubdtype(dtype, np.floating):
            raise ValueError(
                f"{file.path}: {name} must be floating point {list(wanted)}, as wide as the network's features, got "
                f"{dtype} {list(shape)}; take statistics of this network"
            )
        found.append(file.array(name).astype(np.float64))
        if not np.isfinite(found[-1]).all():
            raise ValueError(f"{file.path}: {name} holds values that are not finite; fetch or compute it again")
    mean, covariance = found
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max()):
        raise ValueError(f"{file.path}: sigma is not symmetric, so it is no covariance; fetch or compute it again")
    return mean, covariance
