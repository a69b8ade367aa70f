"""Noise levels, denoiser, guidance and samplers (SPEC 2 and 7). A sigma is shifted (times H/64) unless it says not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

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


Noises = Sequence[torch.Tensor] | None
"""One tensor for each interval of a stochastic sampler; None draws them."""


def clean_estimate(denoiser: Denoiser, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """At one level, sigma [], for all images, clamped to what pixels can be."""
    return denoiser(x, sigma * torch.ones(len(x), device=x.device), y).clamp(-1, 1)


def slope_at(denoiser: Denoiser, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """dx/dsigma of the probability-flow ODE."""
    return (x - clean_estimate(denoiser, x, sigma, y)) / sigma


@torch.no_grad()
def sample_onestep(denoiser: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """noise: [B, C, H, W] of unit variance, sigmas: [S] -> images [B, C, H, W], as of all samplers here."""
    return clean_estimate(denoiser, noise * sigmas[0], sigmas[0], y)


@torch.no_grad()
def sample_euler(denoiser: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = noise * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (sigma_next - sigma) * slope_at(denoiser, x, sigma, y)
    return x


@torch.no_grad()
def sample_heun(denoiser: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Two evaluations in every interval, the last included."""
    x = noise * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = slope_at(denoiser, x, sigma, y)
        ahead = x + (sigma_next - sigma) * slope
        x = x + (sigma_next - sigma) * (slope + slope_at(denoiser, ahead, sigma_next, y)) / 2
    return x


@torch.no_grad()
def sample_euler_sde(denoiser, noise, sigmas, y, noises: Noises = None) -> torch.Tensor:
    x = noise * sigmas[0]
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        added = torch.randn_like(x) if noises is None else noises[i]
        x = x + 2 * (sigma_next - sigma) * slope_at(denoiser, x, sigma, y)
        x = x + (2 * sigma * (sigma - sigma_next)).sqrt() * added
    return x


@torch.no_grad()
def sample_euler_ancestral(denoiser, noise, sigmas, y, noises: Noises = None) -> torch.Tensor:
    x = noise * sigmas[0]
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        added = torch.randn_like(x) if noises is None else noises[i]
        up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2).sqrt()
        down = (sigma_next**2 - up**2).sqrt()
        x = x + (down - sigma) * slope_at(denoiser, x, sigma, y) + up * added
    return x


@torch.no_grad()
def sample_edm_sde(
    denoiser, noise, sigmas, y, noises: Noises = None, s_churn=0.0, s_min=0.0, s_max=math.inf, s_noise=1.0
) -> torch.Tensor:
    """EDM's algorithm 2; no correction in the last interval."""
    x = noise * sigmas[0]
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        added = torch.randn_like(x) if noises is None else noises[i]
        gamma = min(s_churn / len(sigmas), math.sqrt(2) - 1) if s_min <= sigma.item() <= s_max else 0.0
        raised = sigma * (1 + gamma)
        x = x + (raised**2 - sigma**2).sqrt() * s_noise * added
        slope = slope_at(denoiser, x, raised, y)
        ahead = x + (sigma_next - raised) * slope
        if i == len(sigmas) - 2:
            return ahead
        x = x + (sigma_next - raised) * (slope + slope_at(denoiser, ahead, sigma_next, y)) / 2
