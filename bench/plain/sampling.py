"""Sampling with the plain networks as someone would who writes it down: pixels in, images in host memory out."""

from __future__ import annotations

import contextlib

import torch

from bench.plain.diffusion import Denoiser, IntervalGuidance, levels, sample_heun, sample_onestep

# ImageNet's mean and twice its standard deviation (SPEC 1).
_MEAN, _SCALE = (0.485, 0.456, 0.406), (0.458, 0.448, 0.45)


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
