"""What samples are compared with: images, stored statistics of images, or both, as in ADM's reference files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from epg_fast.data import images_of
from epg_fast.distributed import Ranks
from epg_fast.evaluation.frechet import Gaussian, RunningMoments
from epg_fast.evaluation.images import FolderStream, ImageStream, NpzStream, open_stream, size_words
from epg_fast.files import file_sha256, open_atomically
from epg_fast.npz import Npz

MOST_COMPARED = 50_000
"""Precision, recall and KID keep all features: of larger sets they take images at even distances."""


@dataclass(frozen=True)
class Reference:
    """`statistics`: (mean float64 [D], covariance float64 [D, D]) of features, if the file has them; `images` likewise.

    At least one of the two is there.
    """

    path: str | os.PathLike
    statistics: tuple[np.ndarray, np.ndarray] | None
    images: ImageStream | None

    @functools.cached_property
    def identity(self) -> dict:
        """What tells it from other references, for JSON."""
        if isinstance(self.images, FolderStream):
            return {"path": str(self.path), "fingerprint": self.images.files.fingerprint()}
        return {"path": str(self.path), "sha256": file_sha256(self.path)}

    @property
    def stamp(self) -> str | None:
        """What changes with the contents of a folder's files, whose names alone are its identity; None for an npz."""
        return self.images.stamp() if isinstance(self.images, FolderStream) else None


@dataclass(frozen=True)
class Seen:
    """A reference as a network sees it: `gaussian` of all features, and `features` [M, D] of at most MOST_COMPARED."""

    gaussian: Gaussian
    features: torch.Tensor | None

    def keep(self, path: Path) -> None:
        """Write it, as `mu`, `sigma` and `features`."""
        arrays = {"mu": self.gaussian.mean.cpu().numpy(), "sigma": self.gaussian.covariance.cpu().numpy()}
        with open_atomically(path) as file:
            np.savez(file, **arrays, **({} if self.features is None else {"features": self.features.numpy()}))

    @staticmethod
    def kept(path: Path, device: torch.device) -> Seen | None:
        """What `keep` has written; None where there is nothing."""
        if not path.exists():
            return None
        file = Npz(path)
        found = {name: torch.from_numpy(file.array(name).copy()) for name in file.names}
        return Seen(Gaussian(found["mu"].to(device), found["sigma"].to(device)), found.get("features"))


def open_reference(path: str | os.PathLike, num_features: int | None, size: tuple[int, int]) -> Reference:
    """Open an npz with `mu` and `sigma`, with `arr_0` (uint8 [M, H, W, 3]) or with all, or a folder of images.

    `num_features`: width D that statistics must have; None for a network other than Inception, whose they are: it takes
    images only. `size`: (height, width) that images must have, the samples'.
    ADM's files hold statistics of the whole dataset and 10000 images for precision and recall; the former are used as
    they are. `mu_s` and `sigma_s` (sFID) are not used. Raises ValueError for other files, shapes, sizes and values.
    Source: https://github.com/openai/guided-diffusion/tree/main/evaluations
    """
    if Path(path).is_dir() or not Path(path).exists():
        with images_of("reference"):
            reference = Reference(path, None, open_stream(path))
    else:
        file = Npz(path)
        if not {"arr_0", "mu", "sigma"} & set(file.names):
            raise ValueError(f"{path}: expected arr_0 (images), or mu and sigma (statistics), found {file.names}")
        if num_features is None and "arr_0" not in file.names:
            raise ValueError(f"{path}: its statistics are Inception's, and DINOv2 needs images (arr_0); found none")
        stored = num_features is not None and {"mu", "sigma"} & set(file.names)
        statistics = _statistics(file, num_features) if stored else None
        reference = Reference(path, statistics, NpzStream(path) if "arr_0" in file.names else None)
    if reference.images and reference.images.size != size:
        got, wanted = map(size_words, (reference.images.size, size))
        raise ValueError(f"{path}: its images are {got}, the samples {wanted}; take a reference of the samples' size")
    return reference


def see(
    reference: Reference,
    features_of: Callable[[torch.Tensor], torch.Tensor],
    num_features: int,
    batch_size: int,
    ranks: Ranks,
) -> Seen | None:
    """Show the reference's images to a network, a share on each rank; the main rank alone returns what was seen.

    `features_of`: uint8 [B, 3, H, W] -> float32 [B, D] on the CPU. Moments are summed in float64 on the rank's device.
    """
    images, features, total = reference.images, None, RunningMoments(num_features, ranks.device)
    if images:
        kept = evenly(images.num, MOST_COMPARED)
        places = np.full(images.num, -1)
        places[kept] = np.arange(len(kept))
        moments = RunningMoments(num_features, ranks.device)
        own: list[tuple[np.ndarray, torch.Tensor]] = []
        batches = images.batches(batch_size, ranks.rank, ranks.world_size)
        number = -(-images.num // batch_size // ranks.world_size)
        for part, batch in tqdm(batches, total=number, desc="reference", unit="batch", leave=False, disable=ranks.rank):
            found = features_of(batch)
            moments.update(found)
            chosen = places[part] >= 0
            own.append((places[part][chosen], found[torch.from_numpy(chosen)]))
        everyone = ranks.gather_to_main((moments.num, moments.mean.cpu(), moments.scatter.cpu(), own))
        features = torch.empty(len(kept), num_features)
        for *theirs, parts in everyone or []:
            if parts:  # a rank may have had no batch
                total.merge(*theirs)
            for where, found in parts:
                features[torch.from_numpy(where)] = found
    if not ranks.main:
        return None
    if reference.statistics is None:
        return Seen(total.gaussian(), features)
    mean, covariance = (torch.from_numpy(array).to(ranks.device) for array in reference.statistics)
    return Seen(Gaussian(mean, covariance), features)


def evenly(num: int, most: int) -> np.ndarray:
    """All of `num` images, or `most` of them at even distances: rising numbers, int64."""
    return np.linspace(0, num - 1, min(num, most)).round().astype(int)


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
    mean, covariance = found
    if not all(np.isfinite(array).all() for array in found):
        wrong = "mu or sigma holds values that are not finite"
    elif not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max()):
        wrong = "sigma is not symmetric, so it is no covariance"
    elif np.diagonal(covariance).min() < 0:
        wrong = "sigma has variances below 0, so it is no covariance"
    else:
        return mean, covariance
    raise ValueError(f"{file.path}: {wrong}; fetch or compute it again")
