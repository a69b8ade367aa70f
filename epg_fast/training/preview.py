"""The grid of samples that shows how training goes."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from epg_fast.sampling import sample
from epg_fast.sampling.writers import save_grid
from epg_fast.training.stages import Stage

log = logging.getLogger("epg_fast")


def write_preview(stage: Stage, outdir: Path, step: int) -> np.ndarray | None:
    """Sample from the averaged weights into previews/step_<step>.png; returns the picture, uint8 [H, W, 3].

    A disk that does not take it is reported, and None returned: a missing picture must not end a run. Sharded weights
    take all ranks, which all sample the same; the main rank alone writes, the others return None.

    The same labels and noise every time, so that grids of different steps can be compared.
    """
    p = stage.preview
    labels = torch.arange(p.num) % max(stage.average.num_classes, 1)
    images = sample(
        stage.average,
        labels if stage.average.num_classes else p.num,
        sampler=p.sampler,
        steps=p.steps,
        guidance=p.guidance if stage.average.num_classes else 1.0,
        interval=tuple(p.interval),
        parameterization=stage.parameterization,
        normalization=stage.config.data.normalization,
        noise_schedule=stage.config.noise,
        precision=stage.config.precision,
    )
    if not stage.ranks.main:
        return None
    if not images.isfinite().all():
        log.warning("step %d: some preview samples are not finite and are shown black", step)
    path = outdir / "previews" / f"step_{step:09d}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        save_grid(images.nan_to_num(0.0), path)
    except OSError as error:
        log.warning("could not write %s (%s); training goes on", path, error)
        return None
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
