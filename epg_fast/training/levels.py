"""The loss by noise level: sums and counts over equal parts of the Karras grid."""

from __future__ import annotations

import torch

LEVELS = 8


def sums_by_level(values: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Sums and counts of `values` [B] in LEVELS equal parts of the grid: [2, LEVELS], float32.

    level: [B], or [] for all, in 0..1: 0 is sigma_max and part 0, 1 is sigma_min and part LEVELS - 1. Nothing is read
    on the host, and there are no atomic additions: the same values give the same bits.
    """
    values = values.detach().float()
    part = (level * LEVELS).long().clamp(0, LEVELS - 1).expand_as(values)
    hit = part[:, None] == torch.arange(LEVELS, device=values.device)
    return torch.stack([torch.where(hit, values[:, None], 0.0).sum(0), hit.sum(0)])


def names_by_level(name: str) -> tuple[str, ...]:
    """("name_by_level/0", ...): what metrics call the parts."""
    return tuple(f"{name}_by_level/{i}" for i in range(LEVELS))
