"""What a caller asks of the sampling engine, checked: every error says what was got and what is wanted."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch

from epg_fast.config import ScheduleConfig
from epg_fast.data import PixelNormalization
from epg_fast.diffusion import SAMPLERS, NoiseSchedule
from epg_fast.models import EPGViT

_CHURN = ("s_churn", "s_min", "s_max", "s_noise")


def check_networks(networks: list[torch.nn.Module], guidance: float) -> None:
    """Raise ValueError unless all are EPGViTs and can be guided by this scale, the second being a weaker model."""
    for network in networks:
        if not isinstance(network, EPGViT):
            raise ValueError(
                f"sample: got a {type(network).__name__}, want an EPGViT (unwrap compiled or parallel models)"
            )
    model, *others = networks
    if model.in_chans != 3:
        raise ValueError(f"sample: the model has {model.in_chans} channels, want 3: red, green and blue")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance is {guidance}, want a finite number")
    if not others and guidance != 1 and not model.num_classes:
        raise ValueError(
            f"guidance is {guidance}, which needs a class-conditional network; this one is unconditional "
            "(num_classes=0): leave guidance at 1, or guide with a weaker model"
        )
    for weak in others:
        for name in ("num_classes", "image_size", "in_chans"):
            got, wanted = getattr(weak, name), getattr(model, name)
            if got != wanted:
                raise ValueError(f"autoguidance: the weaker model has {name} {got}, want {wanted} as the model has")


def check_agreement(weak: EPGViT, parameterization: str, normalization: str, schedule: NoiseSchedule) -> None:
    """Raise ValueError when the checkpoint of a weaker model says that its output means something else."""
    metadata = getattr(weak, "metadata", {})
    wanted = {"parameterization": parameterization, "normalization": normalization}
    for name, value in wanted.items():
        if metadata.get(name, value) not in (value, None):
            raise ValueError(
                f"autoguidance: the weaker model has {name} {metadata[name]}, want {value} as the model has"
            )
    if "noise" in metadata and vars(schedule_of(metadata)) != vars(schedule):
        raise ValueError("autoguidance: the weaker model has another noise schedule than the model, want the same")


def schedule_of(metadata: dict, given: ScheduleConfig | None = None) -> NoiseSchedule:
    """The noise schedule that is given, else that of a checkpoint's metadata, else the standard one."""
    found = asdict(given) if given else metadata.get("noise", {})
    try:
        return NoiseSchedule(**found)
    except TypeError:
        raise ValueError(
            f"the checkpoint's noise schedule is {found!r}, want a mapping of sigma_min, sigma_max, rho and sigma_data"
        ) from None


def sampler_arguments(sampler: str, steps: int, options: dict) -> dict:
    """Further arguments of the sampler of that name. Raises ValueError for what does not go together."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r}: want one of {', '.join(SAMPLERS)}")
    if options and sampler != "edm_sde":
        raise ValueError(f"{', '.join(options)}: options of edm_sde, not of {sampler}")
    for name in options:
        if name not in _CHURN:
            raise ValueError(f"{name}: no option of edm_sde, want {', '.join(_CHURN)}")
    if not isinstance(steps, int | np.integer):
        raise ValueError(f"steps is {steps!r}, want an integer")
    if sampler != "onestep" and steps < 2:
        raise ValueError(f"steps is {steps}: {sampler} needs at least 2 noise levels")
    return options


def checked_labels(model: EPGViT, labels: torch.Tensor | Sequence[int] | int) -> torch.Tensor:
    """Labels as int64 [N] on the CPU; for an unconditional model as many zeros. Raises ValueError for wrong ones."""
    number = isinstance(labels, (int, np.integer))
    if not model.num_classes:
        if not number or labels < 1:
            raise ValueError(f"this model is unconditional: pass the number of images (at least 1), got {labels}")
        return torch.zeros(operator.index(labels), dtype=torch.int64)
    if number:
        raise ValueError(f"this model is class-conditional: pass a list of labels in 0..{model.num_classes - 1}")
    y = torch.as_tensor(labels).flatten().cpu()
    if y.is_floating_point() and len(y):
        raise ValueError(f"labels are {y.dtype}, want integers")
    y = y.to(torch.int64)
    wrong = y[(y < 0) | (y > model.num_classes)]
    if len(y) == 0 or len(wrong):
        got = f"label {wrong[0].item()}" if len(wrong) else "no labels"
        raise ValueError(f"got {got}, want labels in 0..{model.num_classes - 1} ({model.num_classes}: unconditional)")
    return y


def image_numbers(indices: Sequence[int] | None, first: int, count: int) -> torch.Tensor:
    """Numbers of `count` images: `indices`, or first, first+1, ...: int64 [N]. Raises ValueError for wrong ones."""
    if indices is not None and first:
        raise ValueError(f"got first={first} and indices, want one of them")
    numbers = torch.arange(first, first + count) if indices is None else torch.as_tensor(list(indices))
    if len(numbers) != count or int(numbers.min()) < 0:
        raise ValueError(f"got {len(numbers)} numbers of images from {numbers.min()}, want {count} numbers from 0")
    return numbers


def clamp_bounds(name: str, pixels: PixelNormalization, device: torch.device) -> tuple | None:
    """(low, high) of the clean estimate, numbers or tensors on `device`; None for no clamp."""
    if name == "official":
        return (-1.0, 1.0)
    if name == "data":
        return tuple(bound.to(device) for bound in pixels.bounds())
    if name == "none":
        return None
    raise ValueError(f"clamp {name!r}: want official, data or none")
