"""What every objective returns, and dropout masks as an argument of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


@contextlib.contextmanager
def dropout_from(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw what happens inside from `seed` and put the global random state back; None leaves everything as it is."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
