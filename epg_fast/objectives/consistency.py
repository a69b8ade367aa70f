"""Stage 2b: consistency of the denoiser between two noise levels, for one-step generation (SPEC 6)."""

from __future__ import annotations

import torch

from epg_fast.diffusion import Denoiser, NoiseSchedule, shift
from epg_fast.diffusion.denoiser import per_sample, precondition, spread
from epg_fast.objectives.contrastive import Gather, info_nce, own_keys
from epg_fast.objectives.loss import Loss, dropout_from
from epg_fast.ops.backends import accumulation_dtype


def consistency_loss(
    network: torch.nn.Module,
    x: torch.Tensor,
    noise: torch.Tensor,
    y: torch.Tensor | None,
    t: torch.Tensor,
    r: torch.Tensor,
    stage: int,
    schedule: NoiseSchedule,
    *,
    huber_c: float = 0.06,
    perceptual: torch.nn.Module | None = None,
    temperature: float = 0.1,
    dropout_seed: int | None = None,
    keys: tuple[torch.Tensor, torch.Tensor] | None = None,
    gather: Gather = own_keys,
) -> Loss:
    """Weighted pseudo-Huber distance of D(x + t n, t) and D(x + r n, r), plus a contrastive term in a frozen encoder.

    network: EPGViT in the `edm` parameterisation, whose outputs are compared patch by patch, or a function of the same
    arguments. x, noise: [B,C,H,W]; y: [B] labels or None. t, r: [B] unshifted, t >= r; the weight is 1/(t - r) of the
    shifted levels, zero where they are equal.
    stage: e(s); at 0 the target is x itself and `perceptual` is ignored.
    perceptual: frozen RCMViT in eval mode, or None. dropout_seed: both passes draw their dropout from it, so that they
    share the mask; the global random state is left as it was.
    keys: what `perceptual_keys` makes of x [B,P], and of the images of the global batch [G,P]; None computes the former
    and takes the latter from `gather`: called with the former it starts to gather those of all ranks and returns a
    function that waits for them, which is called when the network has run.
    Terms: `consistency`, and `perceptual` when it counts. Raises ValueError for keys of other shapes.
    """
    dtype = accumulation_dtype(x)
    level = schedule.place(t)
    t, r = (sigma.to(dtype) * shift(x.shape[-1]) for sigma in (t, r))
    gap = t - r
    weight = torch.where(gap == 0, 0.0, 1 / torch.where(gap == 0, 1.0, gap))
    denoiser, with_image = Denoiser(network, schedule, "edm"), perceptual is not None and stage > 0
    if with_image:
        own, everyone = (perceptual_keys(perceptual, x, schedule), None) if keys is None else keys
        wait = gather(own) if everyone is None else lambda: everyone
    target = x
    if stage > 0:
        with torch.no_grad(), dropout_from(dropout_seed, x.device):
            target = denoiser.estimate(x + spread(r, x) * noise, r, y).patches()
    with dropout_from(dropout_seed, x.device):
        estimate = denoiser.estimate(x + spread(t, x) * noise, t, y)
    per_image = estimate.loss(target, weight, huber_c)[0]
    terms = {"consistency": per_image}
    if with_image:
        queries = perceptual(*_clean_input(estimate.image(), schedule))[0]
        terms["perceptual"] = info_nce(queries, own, temperature, wait())
        per_image = per_image + terms["perceptual"]
    return Loss(per_image.mean(), per_image, terms, level)


@torch.no_grad()
def perceptual_keys(encoder: torch.nn.Module, x: torch.Tensor, schedule: NoiseSchedule) -> torch.Tensor:
    """The frozen encoder's projections [B,P] of clean images [B,C,H,W], that the estimates' are to be near to."""
    return encoder(*_clean_input(x, schedule))[0]


def _clean_input(images: torch.Tensor, schedule: NoiseSchedule) -> tuple[torch.Tensor, torch.Tensor]:
    """What the frozen encoder takes: images [B,C,H,W] at t0 = sigma_min * H/64, without added noise."""
    return precondition(images, per_sample(schedule.sigma_min * shift(images.shape[-1]), images), schedule)
