"""Stage 2b: consistency of the denoiser between two noise levels, for one-step generation (SPEC 6)."""

from __future__ import annotations

import torch

from epg_fast.diffusion import Denoiser, NoiseSchedule, shift
from epg_fast.diffusion.denoiser import makes_patches, spread
from epg_fast.objectives.contrastive import Gather, info_nce, own_keys, start_gather
from epg_fast.objectives.loss import Loss
from epg_fast.objectives.seeding import dropout_from


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
    Terms: `consistency`, and `perceptual` when it counts.
    Raises TypeError for `keys` that are no pair and for a `gather` that returns no function, ValueError for keys of
    other shapes.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    level = schedule.place(t)
    t, r = (sigma.to(dtype) * shift(x.shape[-1]) for sigma in (t, r))
    gap = t - r
    weight = torch.where(gap == 0, 0.0, 1 / torch.where(gap == 0, 1.0, gap))
    distance = _distance_in_patches if makes_patches(network) else _distance
    denoiser, with_image = Denoiser(network, schedule, "edm"), perceptual is not None and stage > 0
    if isinstance(keys, torch.Tensor):
        raise TypeError("keys: got one tensor, wanted a pair: the keys of x [B,P], those of the global batch [G,P]")
    if with_image:
        own, everyone = (perceptual_keys(perceptual, x, schedule), None) if keys is None else keys
        wait = start_gather(gather, own) if everyone is None else lambda: everyone
    per_sample, prediction = distance(denoiser, x, noise, y, t, r, stage, weight, huber_c, dropout_seed, with_image)
    terms = {"consistency": per_sample}
    if with_image:
        queries = perceptual(*_clean_input(perceptual, prediction, schedule))[0]
        terms["perceptual"] = info_nce(queries, own, temperature, wait())
        per_sample = per_sample + terms["perceptual"]
    return Loss(per_sample.mean(), per_sample, terms, level)


@torch.no_grad()
def perceptual_keys(encoder: torch.nn.Module, x: torch.Tensor, schedule: NoiseSchedule) -> torch.Tensor:
    """The frozen encoder's projections [B,P] of clean images [B,C,H,W], that the estimates' are to be near to."""
    return encoder(*_clean_input(encoder, x, schedule))[0]


def _distance_in_patches(denoiser, x, noise, y, t, r, stage, weight, huber_c, dropout_seed, with_image):
    """(weighted pseudo-Huber distance [B], the estimate at t as an image if it is wanted)."""
    target = x
    if stage > 0:
        with torch.no_grad(), dropout_from(dropout_seed, x.device):
            target = denoiser.estimate_in_patches(x + spread(r, x) * noise, r, y).patches()
    with dropout_from(dropout_seed, x.device):
        estimate = denoiser.estimate_in_patches(x + spread(t, x) * noise, t, y)
    image = denoiser.network.unpatchify(estimate.patches()) if with_image else None
    return estimate.loss(target, weight, huber_c)[0], image


def _distance(denoiser, x, noise, y, t, r, stage, weight, huber_c, dropout_seed, with_image):
    """The same for any network, on images."""
    target = x
    if stage > 0:
        with torch.no_grad(), dropout_from(dropout_seed, x.device):
            target = denoiser(x + spread(r, x) * noise, r, y)
    with dropout_from(dropout_seed, x.device):
        prediction = denoiser(x + spread(t, x) * noise, t, y)
    distance = (prediction - target).square().flatten(1).sum(dim=1)
    return weight * distance / (distance.detach() + huber_c**2).sqrt(), prediction


def _clean_input(encoder, images, schedule):
    """What the frozen encoder takes: images [B,C,H,W] at t0 = sigma_min * H/64, without added noise."""
    dtype, level = torch.promote_types(images.dtype, torch.float32), schedule.sigma_min * shift(images.shape[-1])
    clean = torch.full((len(images),), level, dtype=dtype, device=images.device)
    return Denoiser(encoder, schedule).network_input(images, clean)  # only its input scaling is used
