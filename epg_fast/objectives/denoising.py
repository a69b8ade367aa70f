"""Stage 2a: weighted denoising of the clean image (SPEC 5)."""

from __future__ import annotations

import torch

from epg_fast.diffusion import Denoiser, NoiseSchedule, shift
from epg_fast.diffusion.denoiser import spread
from epg_fast.objectives.loss import Loss, dropout_from
from epg_fast.ops.backends import accumulation_dtype


def denoising_loss(
    network: torch.nn.Module,
    x: torch.Tensor,
    noise: torch.Tensor,
    y: torch.Tensor | None,
    sigma: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    parameterization: str = "x0",
    dropout_seed: int | None = None,
) -> Loss:
    """mean((D(x + t n, t, y) - x)^2) / (sigma(i) - sigma(i+1)) per sample.

    network: EPGViT, whose output is compared patch by patch, or a function of the same arguments.
    x, noise: [B,C,H,W]; y: [B] labels (already dropped where they are to be) or None.
    sigma: [B] unshifted; it is snapped to the nearest of the schedule's levels, t = sigma(i) * H/64.
    dropout_seed: where the network's dropout is drawn from; None takes the global random state.
    Terms: `index` (i, int64) and `squared_error` (unweighted).
    """
    dtype = accumulation_dtype(x)
    index = schedule.nearest(sigma)
    level = schedule.sigma(index, dtype) * shift(x.shape[-1])
    weight = schedule.weight(index, dtype)
    noised, denoiser = x + spread(level, x) * noise, Denoiser(network, schedule, parameterization)
    with dropout_from(dropout_seed, x.device):
        per_sample, distance = denoiser.estimate(noised, level, y).loss(x, weight)
    squared_error = distance / x[0].numel()
    terms = {"index": index, "squared_error": squared_error}
    return Loss(per_sample.mean(), per_sample, terms, index / (schedule.num_scales - 1))
