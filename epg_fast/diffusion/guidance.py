"""Guidance: combinations of network outputs, taken before preconditioning and clamp (SPEC 7)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from epg_fast.config import GUIDANCE_INTERVAL
from epg_fast.diffusion.denoiser import Denoiser, per_sample
from epg_fast.diffusion.schedule import shift


def guided(
    denoiser: Denoiser,
    scale: float,
    interval: tuple[float, float] = GUIDANCE_INTERVAL,
    uncond_label: int | None = None,
) -> Denoiser:
    """Classifier-free guidance inside an interval: u + scale * (c - u) where low*H/64 < sigma <= high*H/64.

    interval: unshifted sigmas. uncond_label: default `network.num_classes`. Outside the interval the network is called
    once; inside, the conditional and unconditional halves go through it as one batch. Guided denoisers can be guided
    again. Raises ValueError for an unconditional network.
    """
    return _Guided(denoiser, scale, interval, uncond_label)


def autoguided(denoiser: Denoiser, weak: Denoiser | Callable, scale: float) -> Denoiser:
    """Autoguidance with a weaker network, or a denoiser of one: c + scale * (c - c_weak), at every noise level."""
    if not isinstance(weak, Denoiser):
        weak = Denoiser(weak, denoiser.schedule, denoiser.parameterization)
    return _Autoguided(denoiser, weak, scale)


class _Guided(Denoiser):
    def __init__(self, denoiser, scale, interval, uncond_label):
        super().__init__(denoiser.network, denoiser.schedule, denoiser.parameterization)
        self.inner = denoiser
        if uncond_label is None:
            uncond_label = getattr(denoiser.network, "num_classes", 0)
            if not uncond_label:
                raise ValueError(
                    "guidance needs a class-conditional network; this one is unconditional (num_classes=0)"
                )
        low, high = interval
        if not low <= high:
            raise ValueError(f"guidance interval: got ({low}, {high}), want low <= high (unshifted sigmas)")
        self.scale, self.low, self.high, self.uncond_label = scale, low, high, uncond_label

    def network_output(self, x, sigma, y=None):
        if y is None:
            raise ValueError("guidance: labels y are missing")
        factor = shift(x.shape[-2])
        inside = (sigma > self.low * factor) & (sigma <= self.high * factor)
        on_host = not isinstance(inside, torch.Tensor) or (inside.ndim == 0 and inside.device.type == "cpu")
        if on_host and not inside:
            return self.inner.network_output(x, sigma, y)
        if isinstance(sigma, torch.Tensor):
            sigma = per_sample(sigma, x).repeat(2)
        both = torch.cat([y, torch.full_like(y, self.uncond_label)])
        cond, uncond = self.inner.network_output(torch.cat([x, x]), sigma, both).chunk(2)
        mixed = uncond + self.scale * (cond - uncond)
        return mixed if on_host else torch.where(inside.expand(x.shape[0]).view(-1, 1, 1, 1), mixed, cond)


class _Autoguided(Denoiser):
    def __init__(self, denoiser, weak, scale):
        super().__init__(denoiser.network, denoiser.schedule, denoiser.parameterization)
        self.inner, self.weak, self.scale = denoiser, weak, scale

    def network_output(self, x, sigma, y=None):
        strong = self.inner.network_output(x, sigma, y)
        return strong + self.scale * (strong - self.weak.network_output(x, sigma, y))
