"""Noise levels, denoiser, guidance and samplers (SPEC 2 and 7): pixels in, images in host memory out.

A sigma is shifted (times H/64) unless it says not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

# ImageNet's mean and twice its standard deviation (SPEC 1).
_MEAN, _SCALE = (0.485, 0.456, 0.406), (0.458, 0.448, 0.45)

SIGMA_MIN, SIGMA_MAX, RHO, SIGMA_DATA = 0.002, 80.0, 7.0, 0.5


def sigma_at(index: torch.Tensor, num_scales: int) -> torch.Tensor:
    """Unshifted level of a grid of `num_scales`, 0 the noisiest: float64 of index's shape."""
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return (high + index.double() / (num_scales - 1) * (low - high)) ** RHO


def levels(steps: int, image_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A sampler's levels, noisiest first: [steps] in float32."""
    if steps == 1:
        return torch.tensor([SIGMA_MAX * image_size / 64], device=device)
    return (sigma_at(torch.arange(steps, device=device), steps) * image_size / 64).float()


def per_image(values: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]


def network_input(x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(c_in x [B, C, H, W], 250 ln sigma [B]) for x [B, C, H, W] and sigma [B]."""
    c_in = 1 / (sigma**2 + SIGMA_DATA**2).sqrt()
    return per_image(c_in) * x, 250 * sigma.log()


class Denoiser:
    """`denoiser(x, sigma, y)`: x [B, C, H, W], sigma [B], y [B] -> the clean estimate; `x0` or `edm` (SPEC 2)."""

    def __init__(self, network: Callable, parameterization: str = "x0"):
        self.network, self.parameterization = network, parameterization

    def network_output(self, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.network(*network_input(x, sigma), y).float()

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        output = self.network_output(x, sigma, y)
        if self.parameterization == "x0":
            return output
        above = sigma - SIGMA_MIN * x.shape[-1] / 64
        c_skip = SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2)
        c_out = above * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()
        return per_image(c_skip) * x + per_image(c_out) * output


class IntervalGuidance(Denoiser):
    """u + scale (c - u) for low < sigma <= high, unshifted; c and u are two calls of the network (SPEC 7)."""

    def __init__(self, network, uncond_label: int, parameterization="x0", scale=2.5, interval=(0.19, 1.61)):
        super().__init__(network, parameterization)
        self.uncond_label, self.scale, self.interval = uncond_label, scale, interval

    def network_output(self, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        cond = super().network_output(x, sigma, y)
        low, high = (end * x.shape[-1] / 64 for end in self.interval)
        if not low < sigma[0].item() <= high:
            return cond
        uncond = super().network_output(x, sigma, torch.full_like(y, self.uncond_label))
        return uncond + self.scale * (cond - uncond)


def clean_estimate(denoiser: Denoiser, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """At one level, sigma [], for all images, clamped to what pixels can be."""
    return denoiser(x, sigma * torch.ones(len(x), device=x.device), y).clamp(-1, 1)


def slope_at(denoiser: Denoiser, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """dx/dsigma of the probability-flow ODE."""
    return (x - clean_estimate(denoiser, x, sigma, y)) / sigma


@torch.no_grad()
def sample_onestep(denoiser: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """noise: [B, C, H, W] of unit variance, sigmas: [S] -> images [B, C, H, W]."""
    return clean_estimate(denoiser, noise * sigmas[0], sigmas[0], y)


@torch.no_grad()
def sample_heun(denoiser: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Two evaluations in every interval, the last included."""
    x = noise * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = slope_at(denoiser, x, sigma, y)
        ahead = x + (sigma_next - sigma) * slope
        x = x + (sigma_next - sigma) * (slope + slope_at(denoiser, ahead, sigma_next, y)) / 2
    return x


class Sampler:
    """`sampler(noise, labels)`: images [B, 3, H, W] in [0, 1], float32 in host memory.

    network: PlainGenerator. steps: levels of Heun's method with interval guidance on an x0 network; 1: one step of an
    edm network. dtype: of autocast, None for float32.
    """

    def __init__(self, network: torch.nn.Module, steps: int, dtype: torch.dtype | None, scale: float, interval):
        self.network, self.dtype, self.interval = network, dtype, interval
        self.device = network.pos_embed.device
        self.levels = levels(steps, network.image_size, self.device)
        if steps == 1:
            self.denoiser = Denoiser(network, "edm")
        else:
            self.denoiser = IntervalGuidance(network, network.num_classes, "x0", scale, interval)

    def __call__(self, noise: torch.Tensor, labels: torch.Tensor, sigmas: torch.Tensor | None = None) -> torch.Tensor:
        """sigmas: other levels than all, of which a trajectory in part is made."""
        sigmas = self.levels if sigmas is None else sigmas
        method = sample_onestep if len(self.levels) == 1 else sample_heun
        products = torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()
        with products:
            x = method(self.denoiser, noise, sigmas, labels.to(self.device))
        mean, scale = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (_MEAN, _SCALE))
        return (x * scale + mean).clamp(0, 1).cpu()

    def network_calls(self, sigmas: torch.Tensor) -> int:
        """Of a trajectory through these levels."""
        if len(sigmas) == 1:
            return 1
        low, high = (end * self.network.image_size / 64 for end in self.interval)
        ends = [sigma for pair in zip(sigmas.tolist(), sigmas[1:].tolist(), strict=False) for sigma in pair]
        return sum(2 if low < sigma <= high else 1 for sigma in ends)

    def part(self, intervals: int) -> torch.Tensor:
        """Neighbouring levels around so many intervals, with a share of guided ones that is nearest to all levels'."""
        wanted = self.network_calls(self.levels) / (len(self.levels) - 1) * intervals
        windows = [self.levels[i : i + intervals + 1] for i in range(len(self.levels) - intervals)]
        return min(windows, key=lambda window: abs(self.network_calls(window) - wanted))
