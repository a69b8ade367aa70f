"""Kernel distance (KID) of two sets of features: unlike FID's its estimate is unbiased, however few the images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

_ROWS, _COLUMNS = 2048, 4096
_FEWEST = 3


@dataclass(frozen=True)
class KernelDistance:
    """Squared maximum mean discrepancy under KID's kernel, in no unit; published figures are often times 1000.

    `mean`, `std`: over `subsets` subsets of `size` images of either set. `effects`: first-order effect of each sample
    on `mean`, float64 [N]. `spread`: standard error of `mean`, see `kernel_distance`.
    """

    mean: float
    std: float
    effects: np.ndarray
    spread: float
    subsets: int
    size: int


def kernel_distance(
    samples: torch.Tensor,
    reference: torch.Tensor,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
    device: torch.device | str = "cpu",
) -> KernelDistance:
    """KID of features `samples` [N, D] against `reference` [M, D], in float64.

    The mean over `subsets` subsets of `size` images of the unbiased squared MMD with the kernel (x.y / D + 1)^3; below
    0 in half of the cases where both sets have one distribution. Subsets are drawn without repetition, and for one
    seed they are torch-fidelity's, which makes the figure its own up to its float32 rounding. `size` gives way where a
    set is smaller, which the result says. Memory beyond the features does not grow with N or M.

    `spread` is the error from drawing the samples anew, the reference held: its square is the variance of the complete
    U-statistic, 4/N of the variance of its projection on a sample (the mean of the kernel over other samples less that
    over the reference, of at most 4096 images each), plus what the choice of subsets adds, std^2 / subsets. Near 0,
    where that variance vanishes, it errs either way: a value of many spreads below 0 is chance. Images are not
    resampled for it: a pair of equal images is no pair.

    Raises ValueError for fewer than 3 images, for widths that differ and for subsets of fewer than 2. Sources:
    Binkowski et al., "Demystifying MMD GANs", 2018; of the variance: Hoeffding, "A class of statistics with
    asymptotically normal distribution", 1948, and Sutherland et al., "Generative models and model criticism via
    optimized maximum mean discrepancy", 2017.
    """
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(f"expected features [N, D] and [M, D], got {list(samples.shape)} and {list(reference.shape)}")
    fewest = min(len(samples), len(reference))
    if fewest < _FEWEST or subsets < 1 or size < 2:
        raise ValueError(
            f"KID needs at least {_FEWEST} images of either set and one subset of 2, got {len(samples)} samples, "
            f"{len(reference)} reference images and {subsets} subsets of {size}"
        )
    size = min(size, fewest)
    # The legacy generator, in torch-fidelity's order of calls.
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            rows[torch.from_numpy(rng.choice(len(rows), size, replace=False))].to(device, torch.float64)
            for rows in (samples, reference)
        )
        pairs = _off_diagonal_sum(x) + _off_diagonal_sum(y)
        values.append(float(pairs / (size * (size - 1)) - 2 * _kernel(x, y).mean()))
    std = float(np.std(values))
    projections = _projections(samples, reference, seed, device).numpy()
    effects = 2 * (projections - projections.mean())
    spread = math.sqrt(effects.var(ddof=1) / len(effects) + std**2 / subsets)
    return KernelDistance(float(np.mean(values)), std, effects, spread, subsets, size)


def _projections(samples: torch.Tensor, reference: torch.Tensor, seed: int, device) -> torch.Tensor:
    """Each sample's mean kernel [N] with other samples less that with reference images, on the CPU."""
    rng = np.random.RandomState(seed)
    chosen, other = (torch.from_numpy(rng.permutation(len(rows))[:_COLUMNS]) for rows in (samples, reference))
    x, y = samples[chosen].to(device, torch.float64), reference[other].to(device, torch.float64)
    itself = torch.zeros(len(samples), dtype=torch.float64)
    itself[chosen] = 1
    found = []
    for start in range(0, len(samples), _ROWS):
        rows = samples[start : start + _ROWS].to(device, torch.float64)
        own = itself[start : start + _ROWS].to(device)
        others = _kernel(rows, x).sum(dim=1) - own * _of_itself(rows)
        found.append((others / (len(x) - own) - _kernel(rows, y).mean(dim=1)).cpu())
    return torch.cat(found)


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)


def _of_itself(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().mean(dim=1).add_(1).pow_(3)


def _off_diagonal_sum(x: torch.Tensor) -> torch.Tensor:
    return _kernel(x, x).fill_diagonal_(0).sum()
