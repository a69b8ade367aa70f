"""Samplers (SPEC 7). All take the shifted levels `sigmas` and unit-variance `noise`, and start at sigmas[0] * noise.

Common arguments
    denoiser: `Denoiser` (or any callable (x, sigma: float, y) -> clean estimate).
    noise: [B,C,H,W] standard normal; the state keeps its dtype.
    sigmas: shifted levels, noisiest first, without a final zero (`NoiseSchedule.levels`).
    y: [B] labels or None.
    clamp: (low, high) of the clean estimate, numbers or tensors that broadcast to it; None for no clamp.
    step_noise: what stochastic samplers add at interval i: a sequence of tensors (or one stacked tensor), or a
        callable i -> tensor; without it, draws from `generator`.
    trajectory: return all states after the intervals, [S-1,B,C,H,W], instead of the last.
    steps_backend: of `sample_euler` and `sample_heun`, the `backend` of `epg_fast.ops.euler_step` and `heun_step`. With
        "extension" each step is one pass, which overwrites the state that the denoiser saw; float32, no gradients.
Raises ValueError when there are too few levels, and for a `steps_backend` that cannot run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from inspect import signature

import torch

from epg_fast.ops import euler_step, euler_step_, heun_step, heun_step_

Clamp = tuple | None
StepNoise = Callable[[int], torch.Tensor] | Sequence[torch.Tensor] | torch.Tensor | None


def sample_euler(
    denoiser,
    noise: torch.Tensor,
    sigmas: Sequence[float],
    y: torch.Tensor | None = None,
    *,
    clamp: Clamp = (-1.0, 1.0),
    trajectory: bool = False,
    steps_backend: str = "plain",
) -> torch.Tensor:
    """Euler's method on the probability-flow ODE: one evaluation per interval."""
    estimate, bounds = _estimator(denoiser, y, clamp, steps_backend)
    advance = euler_step_ if _in_place(steps_backend, trajectory) else euler_step

    def step(i, x, sigma, sigma_next):
        return advance(x, estimate(x, sigma), sigma, sigma_next, bounds, steps_backend)

    return _integrate(step, noise, sigmas, "euler", trajectory)


def sample_heun(
    denoiser,
    noise: torch.Tensor,
    sigmas: Sequence[float],
    y: torch.Tensor | None = None,
    *,
    clamp: Clamp = (-1.0, 1.0),
    trajectory: bool = False,
    steps_backend: str = "plain",
) -> torch.Tensor:
    """Heun's method (EDM algorithm 2 without churn): two evaluations in every interval, the last included."""
    estimate, bounds = _estimator(denoiser, y, clamp, steps_backend, own=True)
    correct = heun_step_ if _in_place(steps_backend, trajectory) else heun_step

    def step(i, x, sigma, sigma_next):
        denoised = estimate(x, sigma)
        ahead = euler_step(x, denoised, sigma, sigma_next, bounds, steps_backend)
        denoised_next = estimate(ahead, sigma_next)
        return correct(x, denoised, denoised_next, sigma, sigma_next, bounds, steps_backend)

    return _integrate(step, noise, sigmas, "heun", trajectory)


def sample_onestep(
    denoiser,
    noise: torch.Tensor,
    sigmas: Sequence[float],
    y: torch.Tensor | None = None,
    *,
    clamp: Clamp = (-1.0, 1.0),
) -> torch.Tensor:
    """The clean estimate at sigmas[0]: one evaluation (consistency models)."""
    sigma = _levels(sigmas, "onestep", 1)[0]
    return _clamped(denoiser, noise * sigma, sigma, y, clamp)


def sample_euler_sde(
    denoiser,
    noise: torch.Tensor,
    sigmas: Sequence[float],
    y: torch.Tensor | None = None,
    *,
    clamp: Clamp = (-1.0, 1.0),
    step_noise: StepNoise = None,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
) -> torch.Tensor:
    """Euler-Maruyama on the reverse SDE: twice the ODE's drift plus noise of variance 2 sigma (sigma - sigma_next)."""
    draw = _noise_source(step_noise, generator, noise)

    def step(i, x, sigma, sigma_next):
        slope = (x - _clamped(denoiser, x, sigma, y, clamp)) / sigma
        return x + 2 * (sigma_next - sigma) * slope + math.sqrt(2 * sigma * (sigma - sigma_next)) * draw(i)

    return _integrate(step, noise, sigmas, "euler_sde", trajectory)


def sample_euler_ancestral(
    denoiser,
    noise: torch.Tensor,
    sigmas: Sequence[float],
    y: torch.Tensor | None = None,
    *,
    clamp: Clamp = (-1.0, 1.0),
    step_noise: StepNoise = None,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
) -> torch.Tensor:
    """Ancestral sampling: down to sigma_down, then noise sigma_up, where sigma_down^2 + sigma_up^2 = sigma_next^2."""
    draw = _noise_source(step_noise, generator, noise)

    def step(i, x, sigma, sigma_next):
        up = math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
        down = math.sqrt(sigma_next**2 - up**2)
        slope = (x - _clamped(denoiser, x, sigma, y, clamp)) / sigma
        return x + (down - sigma) * slope + up * draw(i)

    return _integrate(step, noise, sigmas, "euler_ancestral", trajectory)


def sample_edm_sde(
    denoiser,
    noise: torch.Tensor,
    sigmas: Sequence[float],
    y: torch.Tensor | None = None,
    *,
    clamp: Clamp = (-1.0, 1.0),
    step_noise: StepNoise = None,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> torch.Tensor:
    """Stochastic Heun (EDM algorithm 2): noise is added before each step while s_min <= sigma <= s_max (shifted).

    s_churn is divided by the number of levels; the correction is left out in the last interval (SPEC 7, golden data).
    """
    draw = _noise_source(step_noise, generator, noise)
    count = len(sigmas)

    def step(i, x, sigma, sigma_next):
        gamma = min(s_churn / count, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
        if gamma > 0:
            raised = sigma * (1 + gamma)
            x = x + math.sqrt(raised**2 - sigma**2) * s_noise * draw(i)
            sigma = raised
        slope = (x - _clamped(denoiser, x, sigma, y, clamp)) / sigma
        ahead = x + (sigma_next - sigma) * slope
        if i == count - 2:
            return ahead
        slope_ahead = (ahead - _clamped(denoiser, ahead, sigma_next, y, clamp)) / sigma_next
        return x + (sigma_next - sigma) * (slope + slope_ahead) / 2

    return _integrate(step, noise, sigmas, "edm_sde", trajectory)


SAMPLERS: dict[str, Callable] = {
    "euler": sample_euler,
    "heun": sample_heun,
    "onestep": sample_onestep,
    "euler_sde": sample_euler_sde,
    "euler_ancestral": sample_euler_ancestral,
    "edm_sde": sample_edm_sde,
}
STOCHASTIC = tuple(name for name, function in SAMPLERS.items() if "step_noise" in signature(function).parameters)
STEPPED = tuple(name for name, function in SAMPLERS.items() if "steps_backend" in signature(function).parameters)


def _integrate(step, noise, sigmas, name, trajectory):
    sigmas = _levels(sigmas, name, 2)
    x, states = noise * sigmas[0], []
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        x = step(i, x, sigma, sigma_next)
        if trajectory:
            states.append(x)
    return torch.stack(states) if trajectory else x


def _levels(sigmas, name, least) -> list[float]:
    sigmas = sigmas.tolist() if isinstance(sigmas, torch.Tensor) else [float(s) for s in sigmas]
    if len(sigmas) < least:
        raise ValueError(f"sampler {name}: got {len(sigmas)} noise level(s), want at least {least}; raise `steps`")
    falling = all(a > b for a, b in zip(sigmas, sigmas[1:], strict=False))
    if not falling or not all(math.isfinite(s) and s > 0 for s in sigmas):
        raise ValueError(f"sampler {name}: want positive noise levels that fall, without a final zero, got {sigmas}")
    return sigmas


def _clamped(denoiser, x, sigma, y, clamp):
    denoised = denoiser(x, sigma, y).to(x.dtype)
    return denoised if clamp is None else denoised.clamp(*clamp)


def _estimator(denoiser, y, clamp: Clamp, backend: str, own: bool = False):
    """(x, sigma) -> the clean estimate as the steps of this backend take it, and the clamp that is left to them.

    own: a further evaluation must not change the estimate, as one does whose network has one place for its output.
    """
    in_step = backend == "extension" and clamp is not None and not any(isinstance(b, torch.Tensor) for b in clamp)
    before = None if in_step else clamp

    def estimate(x, sigma):
        denoised = _clamped(denoiser, x, sigma, y, before)
        if own and before is None:
            denoised = denoised.clone()
        return denoised.contiguous() if backend == "extension" else denoised

    return estimate, clamp if in_step else None


def _in_place(backend: str, trajectory: bool) -> bool:
    """Plain PyTorch gains nothing by it, and a trajectory keeps every state."""
    return backend == "extension" and not trajectory


def _noise_source(step_noise: StepNoise, generator, like: torch.Tensor) -> Callable[[int], torch.Tensor]:
    if step_noise is None:
        return lambda i: torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return step_noise if callable(step_noise) else step_noise.__getitem__
