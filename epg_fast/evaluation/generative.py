"""Figures of generated images from what a network says of them: Inception Score, precision and recall."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from tqdm import tqdm

_ROWS, _COLUMNS = 2048, 8192


def inception_score(probabilities: np.ndarray, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation over `splits` of exp(E KL(p(y|x) || p(y))), in float64.

    `probabilities`: [N, C], rows that add up to 1. p(y) is the mean over the split, so a split of few classes scores
    too low: images are dealt to splits of N/splits each by a permutation drawn from `seed`, which is torch-fidelity's.
    ADM's evaluator takes 5000 at a time in the order of the file. Raises ValueError for fewer images than splits.
    Source: Salimans et al., "Improved techniques for training GANs", 2016.
    """
    scores, _ = split_scores(probabilities, splits, seed)
    return float(np.mean(scores)), float(np.std(scores))


def split_scores(probabilities: np.ndarray, splits: int = 10, seed: int = 2020) -> tuple[np.ndarray, np.ndarray]:
    """(score of each split [splits], first-order effect of each image on their mean [N]); see `inception_score`.

    The mean of p(y) moves with the images, but to first order that changes no score: an image's effect is the score
    times what its own divergence exceeds the mean by.
    """
    if np.ndim(probabilities) != 2 or not 1 <= splits <= len(probabilities):
        raise ValueError(
            f"splits is {splits}, want 1 to the number of images of probabilities [N, C], got "
            f"{list(np.shape(probabilities))}"
        )
    num = len(probabilities)
    order = np.random.RandomState(seed).permutation(num)
    scores, effects = np.empty(splits), np.empty(num)
    for number in range(splits):
        chosen = order[number * num // splits : (number + 1) * num // splits]
        p = np.asarray(probabilities[chosen], dtype=np.float64)
        # 0 log 0 = 0
        log_ratio = np.log(np.where(p > 0, p, 1.0)) - np.log(np.where(p > 0, p.mean(axis=0), 1.0))
        divergence = (p * log_ratio).sum(axis=1)
        scores[number] = np.exp(divergence.mean())
        effects[chosen] = scores[number] * (divergence - divergence.mean())
    return scores, effects


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
