"""The `sample` command: labels, network, images, files."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from epg_fast.config import SampleConfig
from epg_fast.data.manifest import load_class_frequencies
from epg_fast.models import EPGViT, from_pretrained
from epg_fast.runtime import resolve_device
from epg_fast.sampling.engine import sample
from epg_fast.sampling.writers import save_grid, save_npz, save_pngs, to_uint8

log = logging.getLogger("epg_fast")
_GRID = 100


def run(config: SampleConfig) -> None:
    """Draw `config.num` images and write samples.npz and grid.png (and PNGs) to `config.outdir`.

    Images are kept on disk batch by batch, so that the same command goes on where an interrupted one stopped; finished
    work is left alone. Raises ValueError for a missing checkpoint or folder name, bad labels, and an output folder of
    other settings.
    """
    if not config.checkpoint or not config.outdir:
        raise ValueError("sample: --checkpoint and --outdir are needed")
    outdir, settings = Path(config.outdir), _settings(config)
    _check_folder(outdir, settings)
    if (outdir / "samples.npz").exists():
        log.info("%s already holds these samples", outdir)
        return
    device = resolve_device(config.device)
    model = _generator(config.checkpoint, config, device)
    weak = _generator(config.autoguidance, config, device) if config.autoguidance else None
    labels = choose_labels(config.labels, config.num, model.num_classes, config.seed)
    _claim_folder(outdir, settings)
    pixels = np.empty((config.num, model.image_size, model.image_size, model.in_chans), np.uint8)
    for start in tqdm(range(0, config.num, config.batch_size), desc="sample", unit="batch"):
        stop = min(start + config.batch_size, config.num)
        part = outdir / "parts" / f"{start:08d}_{stop:08d}.npy"
        if not part.exists():
            _save_array(part, to_uint8(_draw(config, model, weak, labels[start:stop], start)))
        pixels[start:stop] = np.load(part)
    if config.png:
        save_pngs(pixels, np.asarray(labels), outdir / "png")
    save_grid(pixels[:_GRID], outdir / "grid.png")
    save_npz(pixels, np.asarray(labels), outdir / "samples.npz", **settings)
    shutil.rmtree(outdir / "parts")
    log.info("%d images in %s", len(pixels), outdir)


def _draw(config: SampleConfig, model: EPGViT, weak: EPGViT | None, labels: list[int], first: int) -> torch.Tensor:
    auto = {"auto": None}
    return sample(
        model,
        labels if model.num_classes else len(labels),
        seed=config.seed,
        first=first,
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
        **_churn(config),
    )


def choose_labels(how: str, num: int, num_classes: int, seed: int) -> list[int]:
    """Labels of `num` images: `balanced` (0, 1, ..., repeated), `random` (uniform, from the seed) or a list `3,7`.

    `frequencies:PATH` draws from the seed with the probabilities in PATH, a manifest.json of `prepare-data` or its
    folder. Raises ValueError for anything else, labels outside 0..num_classes-1 and another number of frequencies.
    """
    if not num_classes:
        return [0] * num
    if how == "balanced":
        return [i % num_classes for i in range(num)]
    if how == "random":
        return np.random.default_rng(seed).integers(num_classes, size=num).tolist()
    if how.startswith("frequencies:"):
        return _draw_labels(how.removeprefix("frequencies:"), num, num_classes, seed)
    try:
        chosen = [int(part) for part in how.split(",")]
    except ValueError:
        raise ValueError(
            f"labels {how!r}: want balanced, random, frequencies:PATH, or class indices such as 3 or 0,1,2"
        ) from None
    wrong = [label for label in chosen if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"label {wrong[0]} is out of range: the model has classes 0..{num_classes - 1}")
    return [chosen[i % len(chosen)] for i in range(num)]


def _draw_labels(path: str, num: int, num_classes: int, seed: int) -> list[int]:
    frequencies = load_class_frequencies(path)
    if len(frequencies) != num_classes:
        raise ValueError(
            f"labels: {path} has the frequencies of {len(frequencies)} classes, the model has {num_classes}; "
            "pass the manifest of the data it was trained on"
        )
    return np.random.default_rng(seed).choice(num_classes, size=num, p=frequencies).tolist()


def _generator(source: str, config: SampleConfig, device: torch.device) -> EPGViT:
    model = from_pretrained(source, device=device)
    if not isinstance(model, EPGViT):
        raise ValueError(f"{source} holds a pre-trained encoder, which cannot draw images; fine-tune it first")
    return model.use_ops(config.ops)


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


def _check_folder(outdir: Path, settings: dict) -> None:
    """Raise ValueError unless the folder is new, empty, or of these settings; nothing is written."""
    path = outdir / "settings.json"
    if path.exists():
        if not (outdir / "samples.npz").exists() and not any((outdir / "parts").glob("*.npy")):
            return  # nothing was drawn yet
        try:
            before = json.loads(path.read_text())
        except ValueError:
            before = {}
        differing = [k for k in settings if before.get(k) != settings[k]]
        if differing:
            shown = ", ".join(f"{k} was {before.get(k)!r}, now {settings[k]!r}" for k in differing[:3])
            raise ValueError(f"{outdir} holds samples of other settings ({shown}); choose another --outdir")
    elif outdir.exists() and (not outdir.is_dir() or any(outdir.iterdir())):
        raise ValueError(f"{outdir} is not an empty folder and not one of `sample` (no settings.json); choose another")


def _claim_folder(outdir: Path, settings: dict) -> None:
    (outdir / "parts").mkdir(parents=True, exist_ok=True)
    temporary = outdir / "settings.tmp"
    temporary.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(temporary, outdir / "settings.json")


def _save_array(path: Path, array: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        np.save(f, array)
    os.replace(temporary, path)
