"""Precision and recall of generated images from the features that a network has of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tqdm import tqdm

_ROWS, _COLUMNS = 2048, 8192


def precision_recall(
    real: torch.Tensor, fake: torch.Tensor, k: int = 3, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall of features `fake` [N, D] with respect to `real` [M, D].

    Precision is the share of fake features that lie in the ball of a real one, recall the share of real ones in the
    ball of a fake one; a ball reaches to the k-th nearest other feature of its own set, border included. Exact: all
    pairs, in float64 (ADM's evaluator takes float16 where it does not overflow). Distances that differ by less than
    float64's rounding of such a product count as equal, so that ties, as between duplicates, do not hang on it.
    Memory beyond the features does not grow with N M. Raises ValueError for sets of at most k features and for widths
    that differ. Source: Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models",
    2019.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"expected features [M, D] and [N, D], got {list(real.shape)} and {list(fake.shape)}")
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k is {k}, want at least 1 and fewer than the {len(real)} real and {len(fake)} fake images")
    precision = covered(fake, real, squared_radii(real, k, device), device).double().mean()
    recall = covered(real, fake, squared_radii(fake, k, device), device).double().mean()
    return float(precision), float(recall)


def squared_radii(points: torch.Tensor, k: int, device) -> torch.Tensor:
    """Squared distance [N] of each point to the k-th nearest other one, on the CPU."""
    radii = torch.empty(len(points), dtype=torch.float64)
    for rows in _shown(_slices(len(points), _ROWS), "neighbours"):
        nearest = torch.full((rows.stop - rows.start, k), torch.inf, dtype=torch.float64, device=device)
        for columns in _slices(len(points), _COLUMNS):
            distance, _ = _squared_distances(points[rows], points[columns], device)
            # A point is not its own neighbour, but a duplicate of it is.
            distance.diagonal(rows.start - columns.start).fill_(torch.inf)
            nearest = torch.cat([nearest, distance], dim=1).topk(k, dim=1, largest=False).values
        radii[rows] = nearest[:, -1].cpu()
    return radii


def covered(points: torch.Tensor, centres: torch.Tensor, squared_radii: torch.Tensor, device) -> torch.Tensor:
    """Whether each point [N] lies in the ball around any centre."""
    inside_any = torch.zeros(len(points), dtype=torch.bool)
    for rows in _shown(_slices(len(points), _ROWS), "coverage"):
        for columns in _slices(len(centres), _COLUMNS):
            distance, rounding = _squared_distances(points[rows], centres[columns], device)
            inside = distance <= squared_radii[columns].to(device) + rounding
            inside_any[rows] |= inside.any(dim=1).cpu()
    return inside_any


def _squared_distances(a: torch.Tensor, b: torch.Tensor, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances [A, B] in float64, and how far rounding may have moved each."""
    a, b = a.to(device, torch.float64), b.to(device, torch.float64)
    norms = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1)
    distance = torch.addmm(norms, a, b.T, alpha=-2).clamp_(min=0)
    return distance, norms * (4 * a.shape[1] * torch.finfo(torch.float64).eps)


def _shown(blocks: list[slice], name: str) -> Iterable[slice]:
    """The blocks, with a bar where there are several."""
    return tqdm(blocks, desc=name, unit="block", leave=False, disable=len(blocks) < 2)


def _slices(num: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]
