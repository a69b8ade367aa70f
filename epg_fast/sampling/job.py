"""The `sample` command: labels, network, images, files."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import torch

from epg_fast.config import SampleConfig
from epg_fast.models import EPGViT, from_pretrained
from epg_fast.runtime import resolve_device
from epg_fast.sampling.engine import sample
from epg_fast.sampling.writers import save_grid, save_npz, save_pngs, to_uint8

log = logging.getLogger("epg_fast")
_GRID = 100


def run(config: SampleConfig) -> None:
    """Draw `config.num` images and write samples.npz and grid.png (and PNGs) to `config.outdir`.

    Raises ValueError for a missing checkpoint or folder name, bad labels, and an output folder that already holds
    samples of other settings; the same settings find their work done.
    """
    if not config.checkpoint or not config.outdir:
        raise ValueError("sample: --checkpoint and --outdir are needed")
    if config.num < 1 or config.batch_size < 1:
        raise ValueError(f"sample: num is {config.num} and batch_size {config.batch_size}, want at least 1")
    outdir, settings = Path(config.outdir), _settings(config)
    if _already_done(outdir / "samples.npz", settings):
        log.info("%s already holds these samples", outdir)
        return
    device = resolve_device(config.device)
    model = _generator(config.checkpoint, device)
    weak = _generator(config.autoguidance, device) if config.autoguidance else None
    labels = choose_labels(config.labels, config.num, model.num_classes, config.seed)
    auto = {"auto": None}
    images = sample(
        model,
        labels if model.num_classes else config.num,
        seed=config.seed,
        sampler=config.sampler,
        steps=config.steps,
        guidance=config.guidance,
        interval=tuple(config.interval),
        weak=weak,
        parameterization=auto.get(config.parameterization, config.parameterization),
        normalization=auto.get(config.normalization, config.normalization),
        clamp=config.clamp,
        batch_size=config.batch_size,
        precision=config.precision,
        progress=True,
        **_churn(config),
    )
    outdir.mkdir(parents=True, exist_ok=True)
    pixels = to_uint8(images)
    if config.png:
        save_pngs(pixels, np.asarray(labels), outdir / "png")
    save_grid(images[:_GRID], outdir / "grid.png")
    save_npz(pixels, np.asarray(labels), outdir / "samples.npz", **settings)
    log.info("%d images in %s", len(pixels), outdir)


def choose_labels(how: str, num: int, num_classes: int, seed: int) -> list[int]:
    """Labels of `num` images: `balanced` (0, 1, ..., repeated), `random` (uniform, from the seed) or a list `3,7`.

    Raises ValueError for anything else and for labels outside 0..num_classes-1.
    """
    if not num_classes:
        return [0] * num
    if how == "balanced":
        return [i % num_classes for i in range(num)]
    if how == "random":
        return np.random.default_rng(seed).integers(num_classes, size=num).tolist()
    try:
        chosen = [int(part) for part in how.split(",")]
    except ValueError:
        raise ValueError(f"labels {how!r}: want balanced, random, or class indices such as 3 or 0,1,2") from None
    wrong = [label for label in chosen if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"label {wrong[0]} is out of range: the model has classes 0..{num_classes - 1}")
    return [chosen[i % len(chosen)] for i in range(num)]


def _generator(source: str, device: torch.device) -> EPGViT:
    model = from_pretrained(source, device=device)
    if not isinstance(model, EPGViT):
        raise ValueError(f"{source} holds a pre-trained encoder, which cannot draw images; fine-tune it first")
    return model


def _churn(config: SampleConfig) -> dict:
    if config.sampler != "edm_sde":
        return {}
    return {"s_churn": config.s_churn, "s_min": config.s_min, "s_max": config.s_max, "s_noise": config.s_noise}


def _settings(config: SampleConfig) -> dict:
    """What the images depend on, as JSON reads it back."""
    unrelated = ("outdir", "device", "batch_size", "png")
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in unrelated}
    settings |= {"s_max": str(config.s_max)} | ({"steps": 1} if config.sampler == "onestep" else {})
    return json.loads(json.dumps(settings))


def _already_done(path: Path, settings: dict) -> bool:
    if not path.exists():
        return False
    with np.load(path) as stored:
        before = json.loads(str(stored["metadata"])) if "metadata" in stored else {}
    differing = [k for k in settings if before.get(k) != settings[k]]
    if differing:
        shown = ", ".join(f"{k} was {before.get(k)!r}, now {settings[k]!r}" for k in differing[:3])
        raise ValueError(f"{path} holds samples of other settings ({shown}); choose another --outdir")
    return True
