"""From a network and labels to images."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import numpy as np
import torch
from tqdm import tqdm

from epg_fast.config import ScheduleConfig
from epg_fast.data import PixelNormalization
from epg_fast.diffusion import SAMPLERS, STOCHASTIC, Denoiser, NoiseSchedule, autoguided, guided
from epg_fast.models import EPGViT
from epg_fast.runtime import autocast


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    labels: torch.Tensor | Sequence[int] | int,
    *,
    seed: int = 0,
    first: int = 0,
    sampler: str = "heun",
    steps: int = 32,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.19, 1.61),
    weak: torch.nn.Module | None = None,
    parameterization: str | None = None,
    normalization: str | None = None,
    noise_schedule: ScheduleConfig | None = None,
    clamp: str = "official",
    batch_size: int = 64,
    precision: str = "fp32",
    noise: torch.Tensor | None = None,
    progress: bool = False,
    **sampler_options,
) -> torch.Tensor:
    """Images of the given classes: float32 [N, 3, H, W] in [0, 1], on the CPU.

    model: EPGViT (its device is used, its training mode is restored). labels: [N] class indices, or the number of
    images for an unconditional model. seed: image i starts from noise that depends on (seed, first + i) only, so the
    batch size does not matter; `noise` [N, 3, H, W] (unit variance) replaces it.
    sampler, steps: see `epg_fast.diffusion.SAMPLERS`; `steps` noise levels. guidance: scale of interval guidance, 1 for
    none; with `weak`, a weaker model, the scale of autoguidance, 0 for none. interval: unshifted sigmas.
    parameterization, normalization, noise_schedule: None takes them from the checkpoint (`from_pretrained`), else x0,
    imagenet and the standard grid. clamp of the clean estimate: official ([-1, 1]), data (the true range), none.
    sampler_options: s_churn, s_min, s_max, s_noise of `edm_sde`.
    Raises ValueError for labels out of range, unknown names and options, too few steps, guidance without classes.
    """
    for network in filter(None, (model, weak)):
        if not isinstance(network, EPGViT):
            raise ValueError(
                f"sample: got a {type(network).__name__}, want an EPGViT (unwrap compiled or parallel models)"
            )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, want at least 1")
    metadata = getattr(model, "metadata", {})
    schedule = NoiseSchedule(**(asdict(noise_schedule) if noise_schedule else metadata.get("noise", {})))
    pixels = PixelNormalization(normalization or metadata.get("normalization") or "imagenet")
    y = _checked_labels(model, labels)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r}: want one of {', '.join(SAMPLERS)}")
    if sampler_options and sampler != "edm_sde":
        raise ValueError(f"{', '.join(sampler_options)}: options of edm_sde, not of {sampler}")
    if sampler != "onestep" and steps < 2:
        raise ValueError(f"steps is {steps}: {sampler} needs at least 2 noise levels")
    device = next(model.parameters()).device
    denoiser = Denoiser(_casting(model), schedule, parameterization or metadata.get("parameterization") or "x0")
    if weak is not None:
        denoiser = autoguided(denoiser, _casting(weak), guidance)
    elif guidance != 1.0:
        if not model.num_classes:
            raise ValueError("guidance needs a class-conditional network; this one is unconditional (num_classes=0)")
        denoiser = guided(denoiser, guidance, interval, model.num_classes)
    levels = schedule.levels(1 if sampler == "onestep" else steps, model.image_size)
    options = dict(sampler_options, clamp=_clamp(clamp, pixels, device))
    shape = (model.in_chans, model.image_size, model.image_size)
    if noise is not None and noise.shape != (len(y), *shape):
        raise ValueError(f"noise has shape {list(noise.shape)}, want {[len(y), *shape]}")
    images = []
    with _evaluation_mode(model, weak):
        starts = range(0, len(y), batch_size)
        for start in tqdm(starts, desc="sample", unit="batch", disable=not progress):
            part = y[start : start + batch_size]
            source = _ImageNoise(seed, range(first + start, first + start + len(part)), shape, device)
            begin = source.draw() if noise is None else noise[start : start + len(part)].to(device)
            begin = begin.to(torch.promote_types(torch.float32, model.pos_embed.dtype))
            if sampler in STOCHASTIC:
                options["step_noise"] = lambda _, source=source: source.draw()
            with autocast(device, precision):
                x = SAMPLERS[sampler](
                    denoiser, begin, levels, part.to(device) if model.num_classes else None, **options
                )
            images.append(pixels.denormalize(x.float()).cpu())
    return torch.cat(images)


@contextlib.contextmanager
def _evaluation_mode(*models: torch.nn.Module | None) -> Iterator[None]:
    """Eval mode inside; every module gets its own mode back."""
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _casting(model: torch.nn.Module) -> Callable:
    """The model with its image input in the dtype of its weights: the sampler's state stays at least float32."""
    dtype = model.pos_embed.dtype
    return lambda x, t, *y: model(x.to(dtype), t, *y)


class _ImageNoise:
    """Successive standard normal tensors for a batch of images, each image from its own generator."""

    def __init__(self, seed: int, indices: range, shape: tuple[int, ...], device: torch.device):
        # On the CPU whatever the device, so that a GPU starts from the same noise. Not torch's generator: that of the
        # CPU uses 32 bits of its seed, too few to keep (seed, image) pairs apart.
        self.generators = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in indices]
        self.shape, self.device = shape, device

    def draw(self) -> torch.Tensor:
        """[B, *shape]."""
        draws = np.stack([g.standard_normal(self.shape, dtype=np.float32) for g in self.generators])
        return torch.from_numpy(draws).to(self.device)


def _checked_labels(model, labels) -> torch.Tensor:
    number = isinstance(labels, (int, np.integer))
    if not model.num_classes:
        if not number or labels < 1:
            raise ValueError(f"this model is unconditional: pass the number of images (at least 1), got {labels}")
        return torch.zeros(operator.index(labels), dtype=torch.int64)
    if number:
        raise ValueError(f"this model is class-conditional: pass a list of labels in 0..{model.num_classes}")
    y = torch.as_tensor(labels).flatten().cpu()
    if y.is_floating_point() and len(y):
        raise ValueError(f"labels are {y.dtype}, want integers")
    y = y.to(torch.int64)
    wrong = y[(y < 0) | (y > model.num_classes)]
    if len(y) == 0 or len(wrong):
        got = f"label {wrong[0].item()}" if len(wrong) else "no labels"
        raise ValueError(f"got {got}, want labels in 0..{model.num_classes - 1} ({model.num_classes}: unconditional)")
    return y


def _clamp(name: str, pixels: PixelNormalization, device: torch.device):
    if name == "official":
        return (-1.0, 1.0)
    if name == "data":
        return tuple(bound.to(device) for bound in pixels.bounds())
    if name == "none":
        return None
    raise ValueError(f"clamp {name!r}: want official, data or none")
