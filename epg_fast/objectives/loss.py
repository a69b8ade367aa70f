"""What every objective returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Loss:
    """loss: [] mean over the batch; per_sample: [B] of which it is the mean; terms: its named parts and other
    values useful in logs and tests, [B] each. level: [B], or [] for the whole batch, the noise level's place on the
    grid (`NoiseSchedule.place`) that the loss may be sorted by."""

    loss: torch.Tensor
    per_sample: torch.Tensor
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    level: torch.Tensor | None = None
