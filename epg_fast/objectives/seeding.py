"""Dropout masks as an argument."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def dropout_from(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw what happens inside from `seed` and put the global random state back; None leaves everything as it is."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
