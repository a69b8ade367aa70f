"""Stage 1: contrastive term on two augmented views, and representation consistency along the noise (SPEC 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from epg_fast.diffusion import Denoiser, NoiseSchedule, shift
from epg_fast.objectives.contrastive import info_nce, interpolated_temperature
from epg_fast.objectives.loss import Loss


def pretraining_loss(
    online: torch.nn.Module,
    target: torch.nn.Module,
    x: torch.Tensor,
    view1: torch.Tensor,
    view2: torch.Tensor,
    noise: torch.Tensor,
    index: torch.Tensor | int,
    schedule: NoiseSchedule,
    *,
    contrastive_temperature: float = 0.2,
    temperature: float | tuple[float, float] = 0.1,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Loss:
    """Loss of one pre-training step.

    online, target: RCMViT; the gradient reaches `online` only. x, view1, view2, noise: [B,C,H,W], the noise shared by
    all of them. index: one grid level i in 0..K-2 for the whole batch (K = schedule.num_scales).
    temperature: of the consistency term; a pair (tau_min, tau_max) interpolates it in sigma (paper).
    gather: keys of this rank -> keys of all ranks (negatives over the global batch).
    Terms: `contrastive` (sum of both directions) and `consistency`.

    The passes that share weights and mode are stacked into one; the projection head runs view by view, in the order of
    the released code (view1, view2, x_t, x_r), because its BatchNorm statistics belong to single views.
    """
    factor = shift(x.shape[-1])
    device, dtype = x.device, torch.promote_types(x.dtype, torch.float32)
    if not isinstance(index, torch.Tensor):
        index = torch.full((), index, device=device)  # a copy from the host would wait for the device
    t, r = schedule.sigma(index, dtype), schedule.sigma(index + 1, dtype)
    clean = schedule.sigma(torch.full_like(index, schedule.num_scales - 1), dtype)
    noised = Denoiser(online, schedule)  # only its input scaling is used

    def network_input(*views_and_sigmas):
        images = torch.cat([image + sigma * factor * noise for image, sigma in views_and_sigmas])
        sigmas = torch.cat([(sigma * factor).expand(x.shape[0]) for _, sigma in views_and_sigmas])
        return noised.network_input(images, sigmas)

    feature1, feature2, feature_t = online.encode(*network_input((view1, clean), (view2, clean), (x, t))).chunk(3)
    projection1, projection2 = online.projection_head(feature1), online.projection_head(feature2)
    with torch.no_grad():
        feature_r = online.encode(*network_input((x, r)))
        if online.training:
            # Nothing uses these outputs; the running statistics of the perceptual model of stage 2b include them.
            online.projection_head(feature_t)
            online.projection_head(feature_r)
        key1, key2 = target(*network_input((view1, clean), (view2, clean)))[0].chunk(2)

    if isinstance(temperature, tuple):
        temperature = interpolated_temperature(t, *temperature, schedule.sigma_min, schedule.sigma_max)
    contrastive = info_nce(projection1, key2, contrastive_temperature, gather)
    contrastive = contrastive + info_nce(projection2, key1, contrastive_temperature, gather)
    consistency = info_nce(feature_t, feature_r, temperature, gather)
    per_sample = contrastive + consistency
    terms = {"contrastive": contrastive, "consistency": consistency}
    return Loss(per_sample.mean(), per_sample, terms, index / (schedule.num_scales - 1))
