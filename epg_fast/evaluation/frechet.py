"""Frechet distance of two Gaussians: FID of an Inception network's features, FD-DINOv2, or of a PCA of pixels."""

from __future__ import annotations

import functools

import numpy as np
import torch

_CHUNK = 4096


class RunningMoments:
    """Moments of rows that come in batches, in float64 on `device`. `num`: rows so far; `mean`: [D]; `scatter`: [D, D].

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.num, self.mean = 0, torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, rows: torch.Tensor) -> None:
        """Add rows [B, D] of any device and float type."""
        rows = rows.to(self.mean)
        mean = rows.mean(dim=0)
        centred = rows - mean
        self.merge(len(rows), mean, centred.T @ centred)

    def merge(self, num: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """Add rows, one at least, of which these are the moments, on any device."""
        step, total = mean.to(self.mean) - self.mean, self.num + num
        self.scatter += scatter.to(self.scatter)
        self.scatter += torch.outer(step, step) * (self.num * num / total)
        self.mean = self.mean + step * (num / total)
        self.num = total

    def gaussian(self) -> Gaussian:
        """Mean, and covariance with divisor `num - 1`, as FID takes it. Raises ValueError for fewer than two rows."""
        if self.num < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.num}")
        return Gaussian(self.mean, self.scatter / (self.num - 1))


def gaussian_of(features: torch.Tensor, device: torch.device | str, chosen: np.ndarray | None = None) -> Gaussian:
    """The Gaussian of features [N, D], or of those `chosen` [n], which may name a row again and again."""
    moments = RunningMoments(features.shape[1], device)
    num = len(features) if chosen is None else len(chosen)
    for start in range(0, num, _CHUNK):
        part = slice(start, start + _CHUNK)
        moments.update(features[part] if chosen is None else features[torch.from_numpy(chosen[part])])
    return moments.gaussian()


class Gaussian:
    """Mean [D] and covariance [D, D], float64, on one device."""

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor):
        self.mean, self.covariance = mean, covariance

    @functools.cached_property
    def _root(self) -> torch.Tensor:
        values, vectors = torch.linalg.eigh((self.covariance + self.covariance.T) / 2)
        # Rounding makes the zero eigenvalues of a singular covariance slightly negative.
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, other: Gaussian) -> float:
        """Squared Frechet distance of the two; see `frechet_distance`. What costs most is kept for the next call."""
        roots = torch.linalg.eigvalsh(self._seen(other.covariance)).clamp(min=0).sqrt().sum()
        step = (other.mean - self.mean).square().sum()
        return float(step + other.covariance.trace() + self.covariance.trace() - 2 * roots)

    def effects(self, features: torch.Tensor, other: Gaussian) -> np.ndarray:
        """First-order effect of each row [N, D] on the distance of `other`, the rows' Gaussian: float64 [N], mean 0.

        With weights w_i = 1/N of the rows, effect i is the derivative by w_i. For the rows' mean m and covariance C,
        this one's mean n and covariance S, and R = S^(1/2):

            2 (m - n)(x - m) + (x - m)^T A (x - m),  A = 1 - R (R C R)^(-1/2) R.

        The derivative of the trace of a root is that of its eigenvalues. Directions without variance count as flat.
        """
        root = self._root
        values, vectors = torch.linalg.eigh(self._seen(other.covariance))
        flat = values <= len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)
        inverse = root @ ((vectors * torch.where(flat, 0.0, values.rsqrt())) @ vectors.T) @ root
        shape = torch.eye(len(values), dtype=values.dtype, device=values.device) - inverse
        found = []
        for part in features.split(_CHUNK):
            centred = part.to(other.mean) - other.mean
            linear = 2 * centred @ (other.mean - self.mean)
            found.append((linear + ((centred @ shape) * centred).sum(dim=1)).cpu())
        effects = torch.cat(found).numpy()
        return effects - effects.mean()

    def _seen(self, covariance: torch.Tensor) -> torch.Tensor:
        seen = self._root @ covariance @ self._root
        return (seen + seen.T) / 2


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, in squared units of the features.

    `|mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^(1/2))`; means [D], covariances [D, D]. The last trace
    is the sum of the roots of the eigenvalues of `cov2^(1/2) cov1 cov2^(1/2)`, which is symmetric: unlike a general
    matrix root of the product this never turns complex and accepts singular covariances (fewer samples than
    dimensions). Raises ValueError for shapes that do not match and for values that are not finite. Source: Dowson and
    Landau, "The Frechet distance between multivariate normal distributions", 1982.
    """
    mean1, cov1, mean2, cov2 = (torch.as_tensor(array, dtype=torch.float64) for array in (mean1, cov1, mean2, cov2))
    dim = mean1.numel()
    if [x.shape for x in (mean1, cov1, mean2, cov2)] != [(dim,), (dim, dim)] * 2:
        got = ", ".join(str(tuple(x.shape)) for x in (mean1, cov1, mean2, cov2))
        raise ValueError(f"expected means [D] and covariances [D, D], got {got}")
    if not all(x.isfinite().all() for x in (mean1, cov1, mean2, cov2)):
        raise ValueError("means and covariances must be finite")
    return Gaussian(mean2, cov2).distance(Gaussian(mean1, cov1))
