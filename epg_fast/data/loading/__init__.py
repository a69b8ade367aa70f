"""Which loader makes the batches."""

from __future__ import annotations

import logging

import torch

from epg_fast.config import DataConfig
from epg_fast.data.loading.dali import DaliLoader, why_not_dali
from epg_fast.data.loading.loader import Loader, PillowLoader
from epg_fast.data.sources.source import ImageSource

logger = logging.getLogger("epg_fast")


def resolve_backend(name: str, device: torch.device | str = "cpu") -> str:
    """Return the loader that `name` ("auto", "dali" or "pillow") means for training on `device`: "dali" or "pillow".

    "auto" is DALI where it can run: where it can be imported and, on a CPU, the C++ extension is built. One log line
    says why "auto" took Pillow. Raises ValueError for another name, and for a "dali" that cannot run.
    """
    if name not in ("auto", "dali", "pillow"):
        raise ValueError(f"data.backend: got {name!r}, wanted auto, dali or pillow")
    if name == "pillow":
        return name
    lacking = why_not_dali(device)
    if lacking is None:
        return "dali"
    if name == "dali":
        raise ValueError(f"data.backend: got dali, but {lacking}; or use --data.backend pillow")
    logger.info("data.backend auto: Pillow instead of DALI, which is faster: %s", lacking)
    return "pillow"


def make_loader(
    source: ImageSource,
    config: DataConfig,
    *,
    backend: str,
    three_views: bool = False,
    device: torch.device | str = "cpu",
    **options,
) -> Loader:
    """Return the loader `backend` ("dali" or "pillow") of `source`; see `epg_fast.data` for what every loader keeps.

    Args:
        source: the images.
        config: flips, augmentations, workers, share of bad files.
        backend: what `resolve_backend` returned.
        three_views: also the two augmented views of pre-training.
        device: where training runs; DALI decodes there.
        options: image_size, batch_size, seed, rank and world_size of `Batches`; start, the first global iteration.
    """
    options |= {
        "flip_probability": config.flip_probability,
        "augment": config.augment if three_views else None,
        "max_bad_fraction": config.max_bad_fraction,
    }
    if source.slow_at_random:
        logger.warning("%s", source.slow_at_random)
    if backend == "pillow":
        return PillowLoader(source, workers=config.workers, **options)
    return DaliLoader(source, threads=max(config.workers, 1), readers=config.readers, device=device, **options)
