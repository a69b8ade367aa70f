"""Noise levels: the Karras grid (SPEC 2), the curriculum of stage 1 and the shrinking steps of stage 2b.

Sigmas here are unshifted; what reaches the image is multiplied by `shift(H)` = H/64. Levels are evaluated in float64
and rounded once, because the weights of the denoising loss are differences of neighbouring levels.
"""

from __future__ import annotations

import math

import torch


def shift(image_size: int) -> float:
    """Factor H/64 between unshifted sigmas and those that reach an image of height H pixels."""
    return image_size / 64


class NoiseSchedule:
    """Grid of `num_scales` (K) noise levels: index 0 is sigma_max, index K-1 is sigma_min; unshifted (SPEC 2)."""

    def __init__(
        self,
        num_scales: int = 1280,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
    ):
        if num_scales < 2:
            raise ValueError(f"NoiseSchedule: num_scales is {num_scales}, want at least 2")
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"NoiseSchedule: want 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        if not (rho > 0 and sigma_data > 0):
            raise ValueError(f"NoiseSchedule: want positive rho and sigma_data, got {rho} and {sigma_data}")
        self.num_scales, self.sigma_min, self.sigma_max = num_scales, sigma_min, sigma_max
        self.rho, self.sigma_data = rho, sigma_data

    def sigma(self, index: torch.Tensor | int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Unshifted level of any index (int or real, also K, one step below sigma_min): the shape of `index`."""
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        position = torch.as_tensor(index).to(torch.float64) / (self.num_scales - 1)
        return ((high + position * (low - high)) ** self.rho).to(dtype)

    def sigmas(self, device=None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """All K unshifted levels, from sigma_max down to sigma_min: [K]."""
        return self.sigma(torch.arange(self.num_scales, device=device), dtype)

    def nearest(self, sigma: torch.Tensor) -> torch.Tensor:
        """Index of the grid level nearest to each unshifted sigma: int64 of the same shape; ties take the noisier."""
        grid = self.sigmas(sigma.device)
        return (sigma.to(torch.float32)[..., None] - grid).abs().argmin(dim=-1)

    def place(self, sigma: torch.Tensor) -> torch.Tensor:
        """Where unshifted levels lie on the grid, from 0 (sigma_max) to 1 (sigma_min): `sigma`'s inverse over K-1."""
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (high - sigma.to(torch.float64) ** (1 / self.rho)) / (high - low)

    def weight(self, index: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Weight of the denoising loss, 1 / (sigma(i) - sigma(i+1)) (SPEC 5): the shape of `index`."""
        step = self.sigma(index, torch.float64) - self.sigma(index + 1, torch.float64)
        return (1 / step).to(dtype)

    def levels(self, steps: int, image_size: int) -> list[float]:
        """The `steps` SHIFTED levels of a sampler for images of `image_size` pixels, noisiest first (SPEC 7)."""
        if steps == 1:
            return [self.sigma_max * shift(image_size)]
        grid = NoiseSchedule(steps, self.sigma_min, self.sigma_max, self.rho, self.sigma_data)
        return (grid.sigmas(dtype=torch.float64) * shift(image_size)).tolist()


def curriculum_scales(step: int, total_steps: int, start_scales: int = 20, end_scales: int = 1280) -> int:
    """Number of noise levels K of stage 1 at a step (SPEC 4, curriculum of K)."""
    stage_length = math.ceil(total_steps / math.log2(math.ceil(end_scales / start_scales) + 1))
    return min(start_scales * 2 ** math.ceil(step / stage_length), end_scales) + 1


def consistency_stage(
    step: int,
    first_stage: int = 100_000,
    stage_length: int = 100_000,
    delta: int = 1,
    inclusive: bool = True,
) -> int:
    """Stage number e(s) of SPEC 6. `inclusive`: step d0 itself belongs to the second stage, as in the released sampler
    of (t, r); the released training loop moves on one step later when it decides whether e is 0."""
    if step < first_stage or (step == first_stage and not inclusive):
        return delta
    return (step - (first_stage - stage_length)) // stage_length + delta


def consistency_r(
    t: torch.Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0, sigma_min: float = 0.002
) -> torch.Tensor:
    """The lower level r of the pair (t, r), unshifted: max(t (1 - (1 + k sigmoid(-b t)) / q^e), sigma_min) (SPEC 6)."""
    # beyond a float the power is infinite, where Python raises
    power = q**stage if stage * math.log(q) < 700 else math.inf
    return (t * (1 - (1 + k * torch.sigmoid(-b * t)) / power)).clamp_min(sigma_min)
