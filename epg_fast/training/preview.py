"""The grid of samples that shows how training goes."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from epg_fast.runtime import autocast
from epg_fast.sampling import sample
from epg_fast.sampling.labels import choose_labels
from epg_fast.sampling.outputs import captions, quantize, save_grid
from epg_fast.training.stages import Stage

log = logging.getLogger("epg_fast")


def preview_is_due(stage: Stage, step: int) -> bool:
    """Whether this rank is to draw a preview at `step`: a multiple of `preview.every`, or the last."""
    p, draws = stage.preview, stage.ranks.main or stage.sharded
    return bool(p and p.every and draws) and (step % p.every == 0 or step == stage.config.steps)


def preview_path(outdir: Path, step: int) -> Path:
    """Where the preview of `step` is."""
    return outdir / "previews" / f"step_{step:09d}.png"


def sampling_options(stage: Stage) -> dict:
    """Arguments of `SamplingEngine` that say which images the run's samples are."""
    p = stage.preview
    return {
        "sampler": p.sampler,
        "steps": p.steps,
        "guidance": p.guidance if stage.network.num_classes else 1.0,
        "interval": tuple(p.interval),
        "parameterization": stage.parameterization,
        "normalization": stage.config.data.normalization,
        "noise_schedule": stage.config.noise,
    }


def write_preview(stage: Stage, outdir: Path, step: int) -> np.ndarray | None:
    """Sample from the EMA weights into previews/step_<step>.png; returns the picture, uint8 [H, W, 3].

    A disk that does not take it is reported, and None returned: a missing picture must not end a run. Sharded weights
    take all ranks, which all sample the same; the main rank alone writes, the others return None.

    The same labels and noise every time, so that grids of different steps can be compared. An EMA in host memory
    is copied to the device for as long as it takes.
    """
    p, network = stage.preview, stage.ema
    if stage.config.offload_ema:
        network = copy.deepcopy(network).to(stage.ranks.device)
    labels = choose_labels("balanced", p.num, network.num_classes, 0, stage.untrained_classes)
    # autocast, where the precisions of `sample` make a copy of the weights
    with autocast(stage.ranks.device, stage.config.precision):
        images = sample(
            network,
            torch.tensor(labels) if network.num_classes else p.num,
            **sampling_options(stage),
            ops=network.ops,  # of the run; a plan for sampling is not asked for
        )
    del network
    if not stage.ranks.main:
        return None
    if not images.isfinite().all():
        log.warning("step %d: some preview samples are not finite and are shown black", step)
    path = preview_path(outdir, step)
    try:
        path.parent.mkdir(exist_ok=True)
        save_grid(quantize(images.nan_to_num(0.0)).numpy(), path, captions(labels, stage.class_names))
    except OSError as error:
        log.warning("could not write %s (%s); training goes on", path, error)
        return None
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
