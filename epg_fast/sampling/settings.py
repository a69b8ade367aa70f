"""What the images of a `sample` command depend on, as it is written beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import torch

from epg_fast.config import SampleConfig
from epg_fast.sampling.engine import SamplingEngine

_UNRELATED = ("outdir", "device", "batch_size", "npz", "png", "error_images", "compile", "cuda_graphs", "ops")
_CHOSEN = ("precision", "parameterization", "normalization")


def requested(config: SampleConfig) -> dict:
    """Return the settings that the command line alone tells, as JSON reads them back."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _UNRELATED}
    # what is done may be another one: a precision that the device has, and what `auto` stands for
    settings |= {f"wanted_{name}": settings.pop(name) for name in _CHOSEN}
    settings |= {"s_max": str(config.s_max)} | ({"steps": 1} if config.sampler == "onestep" else {})
    return json.loads(json.dumps(settings))


def resolved(
    config: SampleConfig,
    model: torch.nn.Module,
    weak: torch.nn.Module | None,
    labels: np.ndarray,
    engine: SamplingEngine,
) -> dict:
    """Return `requested`, with what the engine makes of it and checksums of weights and labels [N]."""
    return requested(config) | {
        **{name: getattr(engine, name) for name in _CHOSEN},
        "evaluations": engine.evaluations,
        "weights_sha256": weights_sha256(model),
        "autoguidance_sha256": None if weak is None else weights_sha256(weak),
        "labels_sha256": hashlib.sha256(np.asarray(labels, "<i8").tobytes()).hexdigest(),
    }


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 of the model's tensors, with names, dtypes and shapes, and of its checkpoint's metadata."""
    digest = hashlib.sha256(json.dumps(getattr(model, "metadata", {}), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def drawn_with(config: SampleConfig, engine: SamplingEngine, devices: list[str]) -> dict:
    """What the last bits of images may depend on: recorded, not compared. devices: the name of every rank's."""
    return {
        "compile": engine.compile,
        "cuda_graphs": engine.cuda_graphs,
        "plan": engine.chosen.plan,
        "ops": engine.chosen.record()["ops"],
        "torch": torch.__version__,
        "device": ", ".join(sorted(set(devices))),
        "processes": len(devices),
        "batch_size": config.batch_size,
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
