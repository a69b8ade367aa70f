"""Kernel distance (KID) of two sets of features: unlike FID's its estimate is unbiased, however few the images."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from epg_fast.evaluation.figures import Figure

_ROWS, _COLUMNS = 2048, 4096
_FEWEST = 3


class Kernel(Figure):
    """KID of features `samples` [N, D] against `reference` [M, D], in float64 on `device`.

    The mean over `subsets` subsets of `size` images of the unbiased squared maximum mean discrepancy with the kernel
    (x.y / D + 1)^3, in no unit; published figures are often times 1000. It is below 0 in half of the cases where both
    sets have one distribution. Subsets are drawn without repetition, and for one seed they are torch-fidelity's, which
    makes the figure its own up to its float32 rounding. `size` gives way where a set is smaller. `facts`: number and
    size of the subsets, and the deviation over them, `std`. Memory beyond the features does not grow with N or M.

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

    def __init__(
        self,
        samples: torch.Tensor,
        reference: torch.Tensor,
        device: torch.device | str = "cpu",
        subsets: int = 100,
        size: int = 1000,
        seed: int = 2020,
    ):
        if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
            got = f"{list(samples.shape)} and {list(reference.shape)}"
            raise ValueError(f"expected features [N, D] and [M, D], got {got}")
        fewest = min(len(samples), len(reference))
        if fewest < _FEWEST or subsets < 1 or size < 2:
            raise ValueError(
                f"KID needs at least {_FEWEST} images of either set and one subset of 2, got {len(samples)} samples, "
                f"{len(reference)} reference images and {subsets} subsets of {size}"
            )
        self._sets, self._device, self._seed = (samples, reference), device, seed
        self._subsets, self._size = subsets, min(size, fewest)

    @functools.cached_property
    def _values(self) -> list[float]:
        """Of each subset."""
        # The legacy generator, in torch-fidelity's order of calls.
        rng, size, values = np.random.RandomState(self._seed), self._size, []
        for _ in range(self._subsets):
            x, y = (
                rows[torch.from_numpy(rng.choice(len(rows), size, replace=False))].to(self._device, torch.float64)
                for rows in self._sets
            )
            pairs = _off_diagonal_sum(x) + _off_diagonal_sum(y)
            values.append(float(pairs / (size * (size - 1)) - 2 * _kernel(x, y).mean()))
        return values

    @functools.cached_property
    def value(self) -> float:
        return float(np.mean(self._values))

    @property
    def facts(self) -> dict:
        return {"std": float(np.std(self._values)), "subsets": self._subsets, "subset_size": self._size}

    @functools.cached_property
    def effects(self) -> np.ndarray:
        projections = _projections(*self._sets, self._seed, self._device).numpy()
        return 2 * (projections - projections.mean())

    @functools.cached_property
    def spread(self) -> float:
        return math.sqrt(self.effects.var(ddof=1) / len(self.effects) + self.facts["std"] ** 2 / self._subsets)


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
        others = _kernel(rows, x).sum(dim=1) - own * rows.square().mean(dim=1).add_(1).pow_(3)  # those of a row itself
        found.append((others / (len(x) - own) - _kernel(rows, y).mean(dim=1)).cpu())
    return torch.cat(found)


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)


def _off_diagonal_sum(x: torch.Tensor) -> torch.Tensor:
    return _kernel(x, x).fill_diagonal_(0).sum()
