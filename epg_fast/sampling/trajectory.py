"""All network calls and steps of a batch of images as one function of tensors, without host synchronisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from epg_fast.diffusion import (
    SAMPLERS,
    STEPPED,
    STOCHASTIC,
    Denoiser,
    NoiseSchedule,
    PixelNormalization,
    autoguided,
    guided,
)
from epg_fast.diffusion.denoiser import time_condition
from epg_fast.models import EPGViT
from epg_fast.models.blocks import is_plain
from epg_fast.models.generator import Conditioning
from epg_fast.ops import philox_normal_of

SETTINGS = ("sampler", "steps", "guidance", "interval", "clamp")
"""What a trajectory is made with; further ones are options of its sampler."""


class Trajectory:
    """From labels and numbers of images to images: `trajectory(indices, seed, y)`.

    networks: the EPGViT that draws and, for autoguidance, a weaker one. settings: `SETTINGS` by name and options of the
    sampler, as `SamplingEngine` takes them. steps_backend: of samplers that have one. noise: `philox_normal_of`, or
    that compiled. `calls` are those of the networks, (noise level, 2 for a conditional and an unconditional evaluation,
    else 1); `evaluations` is the number of evaluations per image. Raises ValueError for another clamp.
    """

    def __init__(
        self,
        networks: list[EPGViT],
        settings: Mapping,
        schedule: NoiseSchedule,
        parameterization: str,
        normalization: str,
        steps_backend: str = "plain",
        noise: Callable[..., torch.Tensor] = philox_normal_of,
    ):
        self.network, self.noise = networks[0], noise
        self.sampler, steps, guidance, interval, clamp = (settings[name] for name in SETTINGS)
        self.pixels = PixelNormalization(normalization).to(self.network.device)
        self.shape = (self.network.in_chans, self.network.image_size, self.network.image_size)
        self.levels = schedule.levels(1 if self.sampler == "onestep" else steps, self.network.image_size)
        options = {name: value for name, value in settings.items() if name not in SETTINGS}
        self.options = options | {"clamp": _clamp(clamp, self.pixels)}
        if self.sampler in STEPPED:
            self.options["steps_backend"] = steps_backend

        def guide(denoiser: Denoiser, weak: Denoiser | None = None) -> Denoiser:
            if weak is not None:
                return autoguided(denoiser, weak, guidance)
            return denoiser if guidance == 1.0 else guided(denoiser, guidance, interval, self.network.num_classes)

        recorders = [_Recorder() for _ in networks]
        # on a strip of the image's height
        strip = torch.ones(1, 1, self.shape[1], 1)
        if self.sampler in STOCHASTIC:
            options["step_noise"] = lambda _: strip
        SAMPLERS[self.sampler](guide(*recorders), strip, self.levels, torch.zeros(1, dtype=torch.int64), **options)
        self.calls = [call for recorder in recorders for call in recorder.calls]
        self.evaluations = sum(times for _, times in self.calls)
        self._denoisers = [
            _Conditioned(network, schedule, parameterization, recorder.calls)
            for network, recorder in zip(networks, recorders, strict=True)
        ]
        self._denoiser = guide(*self._denoisers)

    def __call__(
        self,
        indices: torch.Tensor,
        seed: torch.Tensor,
        y: torch.Tensor,
        noise: torch.Tensor | None = None,
        watch: Callable[[float, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """indices, y: [B] int64, seed: [1] int64, noise: unit variance -> [B, 3, H, W] in [0, 1].

        Image number i depends on the seed, i and its label, and on nothing else but rounding. watch: is told the noise
        level and the clamped clean estimate, an image as those returned, of every evaluation.
        """
        labels = y if self.network.num_classes else None
        for denoiser in self._denoisers:
            denoiser.prepare(indices.shape[0], labels)

        def draw(number: int) -> torch.Tensor:
            # a tensor, for which compiled code is one
            return self.noise(indices, seed, self.shape, torch.full_like(seed, number))

        noise = draw(0) if noise is None else noise
        noise = noise.to(torch.promote_types(torch.float32, self.network.pos_embed.dtype))
        options = dict(self.options)
        if self.sampler in STOCHASTIC:
            options["step_noise"] = lambda i: draw(i + 1).to(noise.dtype)
        watched = self._denoiser if watch is None else self._watched(watch)
        x = SAMPLERS[self.sampler](watched, noise, self.levels, labels, **options)
        for denoiser in self._denoisers:
            denoiser.forget()
        return self.pixels.denormalize(x.float())

    def _watched(self, watch: Callable[[float, torch.Tensor], None]) -> Callable:
        """The denoiser, of whose estimates `watch` is told."""
        clamp = self.options["clamp"]

        def denoise(x, sigma, y):
            denoised = self._denoiser(x, sigma, y)
            seen = denoised if clamp is None else denoised.clamp(*clamp)
            watch(sigma, self.pixels.denormalize(seen.float()))
            return denoised

        return denoise


def _clamp(name: str, pixels: PixelNormalization) -> tuple | None:
    """(low, high) of the clean estimate, numbers or tensors; None for no clamp."""
    if name not in ("official", "data", "none"):
        raise ValueError(f"clamp {name!r}: want official, data or none")
    if name == "data":
        return pixels.bounds()
    return (-1.0, 1.0) if name == "official" else None


class _Conditioned(Denoiser):
    """Denoiser of an EPGViT that is told all noise levels and labels ahead of a trajectory, each level once.

    One whose call may not be `denoise` behind `conditioning`, being hooked or a subclass's, is called. Its image input
    is in the dtype of its weights: the sampler's state stays at least float32.
    """

    def __init__(self, network, schedule, parameterization, calls: list[tuple[float, int]]):
        super().__init__(network, schedule, parameterization)
        self._levels = list(dict.fromkeys(calls)) if is_plain(network, EPGViT, subclass=True) else []
        self._dtype = network.patch_embed.proj.weight.dtype
        self._ready: dict[tuple[float, int], Conditioning] = {}

    def prepare(self, batch: int, y: torch.Tensor | None) -> None:
        """Conditioning of every noise level for the labels y [batch], and for no label where guidance asks for it."""
        self.forget()  # of a trajectory that was broken off
        both = y
        if y is not None and any(times == 2 for _, times in self._levels):
            both = torch.cat([y, torch.full_like(y, self.network.num_classes)])
        like = {"dtype": torch.promote_types(self._dtype, torch.float32), "device": self.network.pos_embed.device}
        for sigma, times in self._levels:
            t = time_condition(torch.full((times * batch,), sigma, **like))
            self._ready[sigma, times * batch] = self.network.conditioning(t, y if times == 1 else both)

    def forget(self) -> None:
        """Let go of what `prepare` made."""
        self._ready.clear()

    def call_network(self, x_in, sigma, y):
        if not self._levels:
            return super().call_network(x_in.to(self._dtype), sigma, y)
        return self.network.denoise(x_in.to(self._dtype), self._ready[sigma, x_in.shape[0]])


class _Recorder(Denoiser):
    """Notes which noise levels a sampler asks for, and for how many times the batch; nothing is computed."""

    def __init__(self):
        super().__init__(None)
        self.calls: list[tuple[float, int]] = []

    def network_output(self, x, sigma, y=None):
        self.calls.append((sigma, x.shape[0]))
        return x
