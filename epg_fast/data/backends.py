"""Which loader makes the batches."""

from __future__ import annotations

import torch

from epg_fast.config import DataConfig
from epg_fast.data.loader import PillowLoader
from epg_fast.data.source import ImageSource


def resolve_backend(name: str) -> str:
    """Return the loader that `name` ("auto", "dali" or "pillow") means here, "dali" or "pillow"."""
    return "pillow"


def make_loader(
    source: ImageSource,
    config: DataConfig,
    *,
    backend: str,
    image_size: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    three_views: bool = False,
    device: torch.device | str = "cpu",
) -> PillowLoader:
    """Return the loader `backend` ("dali" or "pillow") of `source`; see `epg_fast.data` for what every loader keeps.

    Args:
        source: the images.
        config: flips, augmentations, workers, share of bad files.
        backend: what `resolve_backend` returned.
        image_size, batch_size, seed, rank, world_size, start: see `PillowLoader`.
        three_views: also the two augmented views of pre-training.
        device: where training runs; DALI decodes there.
    """
    return PillowLoader(
        source,
        image_size=image_size,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        start=start,
        flip_probability=config.flip_probability,
        augment=config.augment if three_views else None,
        workers=config.workers,
        max_bad_fraction=config.max_bad_fraction,
    )
