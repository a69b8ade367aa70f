"""Stage 1: contrastive term on two augmented views, and representation consistency along the noise (SPEC 4).

`pretraining_loss` is the whole of it. `PretrainingObjective` has its parts, with which a batch can go through the
encoders in pieces: `keys` and `features` look at each sample alone; only `losses` looks at the batch as a whole, for
the negatives and for the BatchNorm of the projection head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from epg_fast.diffusion import NoiseSchedule, shift
from epg_fast.diffusion.denoiser import precondition
from epg_fast.objectives.contrastive import Gather, info_nce, interpolated_temperature, own_keys
from epg_fast.objectives.loss import Loss
from epg_fast.ops.backends import autocast_dtype


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
    gather: Gather = own_keys,
) -> Loss:
    """Loss of one pre-training step.

    online, target: RCMViT; the gradient reaches `online` only. x, view1, view2, noise: [B,C,H,W], the noise shared by
    all of them. index: one grid level i in 0..K-2 for the whole batch (K = schedule.num_scales).
    temperature: of the consistency term; a pair (tau_min, tau_max) interpolates it in sigma (paper).
    gather: called with this rank's keys (views 1 and 2 [B,P], x_r [B,E]), it starts to gather those of all ranks, the
    negatives, and returns a function that waits for them, which is called when the online network has run.
    Terms: `contrastive` (sum of both directions) and `consistency`.
    Raises ValueError for a number `index` that is not one of these.
    """
    objective = PretrainingObjective(online, target, index, schedule, contrastive_temperature, temperature)
    return objective.loss(x, view1, view2, noise, gather)


def noised_inputs(
    noise: torch.Tensor, images: Sequence[torch.Tensor], sigmas: Sequence[torch.Tensor], schedule: NoiseSchedule
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an encoder takes for a stack of noised images: (images, time conditions).

    noise, each of images: [B,C,H,W]; each of sigmas: [], unshifted. Under autocast the images are in its dtype, which
    is that of the first product.
    """
    factor = shift(noise.shape[-1])
    stack = torch.cat([image + sigma * factor * noise for image, sigma in zip(images, sigmas, strict=True)])
    levels = torch.cat([(sigma * factor).expand(len(noise)) for sigma in sigmas])
    stack, time = precondition(stack, levels, schedule)
    return stack.to(autocast_dtype(stack) or stack.dtype), time


class PretrainingObjective:
    """`pretraining_loss`, whose arguments these are, in parts. noised: `noised_inputs` or what computes the same."""

    def __init__(
        self,
        online: torch.nn.Module,
        target: torch.nn.Module,
        index: torch.Tensor | int,
        schedule: NoiseSchedule,
        contrastive_temperature: float = 0.2,
        temperature: float | tuple[float, float] = 0.1,
        noised: Callable = noised_inputs,
    ):
        if not isinstance(index, torch.Tensor):
            last = schedule.num_scales - 2
            if not 0 <= index <= last:
                raise ValueError(f"index: got {index}, wanted 0 to {last}, because x_r is one level further")
            # a copy from the host would wait for the device
            index = torch.full((), index, device=next(online.parameters()).device)
        self.online, self.target, self.index, self.schedule = online, target, index, schedule
        self.contrastive_temperature, self.temperature = contrastive_temperature, temperature
        self._noised = noised

    def loss(self, x, view1, view2, noise, gather: Gather = own_keys) -> Loss:
        """All of it."""
        keys = self.keys(x, view1, view2, noise)
        waiting = [gather(key) for key in keys]
        features = self.features(x, view1, view2, noise)
        return self.losses(features, keys, [wait() for wait in waiting])

    @torch.no_grad()
    def keys(self, x, view1, view2, noise) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What queries are compared with: the target's projections of view 1 and 2 [B,P], the feature of x_r [B,E]."""
        _, r, clean = self._levels(x.dtype)
        feature_r = self.online.encode(*self._inputs(noise, (x, r)))
        key1, key2 = self.target(*self._inputs(noise, (view1, clean), (view2, clean)))[0].chunk(2)
        return key1, key2, feature_r

    def features(self, x, view1, view2, noise) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The online network's features of view 1, view 2 and x_t, [B,E] each, in one pass."""
        t, _, clean = self._levels(x.dtype)
        return self.online.encode(*self._inputs(noise, (view1, clean), (view2, clean), (x, t))).chunk(3)

    def clean_features(self, view1, view2, noise) -> torch.Tensor:
        """The online network's features of view 1, then of view 2, [2B,E], as the contrastive term has them."""
        clean = self._levels(view1.dtype)[2]
        return self.online.encode(*self._inputs(noise, (view1, clean), (view2, clean)))

    def losses(
        self, features: Sequence[torch.Tensor], keys: Sequence[torch.Tensor], everyone: Sequence[torch.Tensor]
    ) -> Loss:
        """The loss of what `features` and `keys` returned; everyone: the keys of all ranks, [G,P], [G,P] and [G,E].

        The projection head runs view by view, in the order of the released code (view1, view2, x_t, x_r), because its
        BatchNorm statistics belong to single views.
        """
        feature1, feature2, feature_t = features
        key1, key2, feature_r = keys
        head = self.online.projection_head
        projection1, projection2 = head(feature1), head(feature2)
        if self.online.training:
            # Nothing uses these outputs; the running statistics of the perceptual model of stage 2b include them.
            with torch.no_grad():
                head(feature_t)
                head(feature_r)
        contrastive = info_nce(projection1, key2, self.contrastive_temperature, everyone[1])
        contrastive = contrastive + info_nce(projection2, key1, self.contrastive_temperature, everyone[0])
        consistency = info_nce(feature_t, feature_r, self._consistency_temperature(feature_t.dtype), everyone[2])
        per_sample = contrastive + consistency
        terms = {"contrastive": contrastive, "consistency": consistency}
        return Loss(per_sample.mean(), per_sample, terms, self.index / (self.schedule.num_scales - 1))

    def _levels(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unshifted (t, r, cleanest), [] each, in at least float32."""
        last = torch.full_like(self.index, self.schedule.num_scales - 1)
        dtype = torch.promote_types(dtype, torch.float32)
        return tuple(self.schedule.sigma(index, dtype) for index in (self.index, self.index + 1, last))

    def _consistency_temperature(self, dtype: torch.dtype) -> float | torch.Tensor:
        if not isinstance(self.temperature, tuple):
            return self.temperature
        t, schedule = self._levels(dtype)[0], self.schedule
        return interpolated_temperature(t, *self.temperature, schedule.sigma_min, schedule.sigma_max)

    def _inputs(self, noise: torch.Tensor, *images_and_sigmas) -> tuple[torch.Tensor, torch.Tensor]:
        images, sigmas = zip(*images_and_sigmas, strict=True)
        return self._noised(noise, images, sigmas, self.schedule)
