"""Gradients of a batch, whole or in micro-batches, which need less memory.

With micro-batches the gradient is that of the whole batch, up to rounding: contrastive negatives and BatchNorm
statistics span the global batch as ever. A micro-batch is a range of this rank's samples; the random draws of a sample
are those of its place in the global batch (dropout alone is drawn per micro-batch).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epg_fast.config import RunConfig
from epg_fast.diffusion import PixelNormalization
from epg_fast.objectives import Loss
from epg_fast.training.draws import Draws
from epg_fast.training.loss_scale import LossScale
from epg_fast.training.parallel import Replicated
from epg_fast.training.stages import Stage


def check_batch_size(config: RunConfig, world_size: int) -> None:
    """Raise ValueError for a batch that is not the same number of images in every micro-batch of every rank."""
    count, size = config.gradient_accumulation, config.batch_size
    beyond = size % (world_size * count)
    if beyond:
        ranks = f"{world_size} rank{'s' * (world_size > 1)}"
        each = f" with {count} micro-batches each (gradient_accumulation)" if count > 1 else ""
        sizes = [f"{other}" for other in (size - beyond, size - beyond + world_size * count) if other]
        raise ValueError(
            f"batch_size {size} does not divide over {ranks}{each}; take --batch_size {' or '.join(sizes)}, or other "
            "numbers of GPUs and micro-batches"
        )


@dataclass
class MicroBatch:
    """Samples of this rank: images (uint8 ones are normalised on access) and labels, and their draws."""

    raw: dict[str, torch.Tensor]
    draws: Draws
    normalization: PixelNormalization

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        """Normalised images [B,C,H,W], made anew each time, and labels [B]."""
        return {k: self.normalization.normalize(v) if v.dtype == torch.uint8 else v for k, v in self.raw.items()}


def add_gradients(
    stage: Stage,
    parallel: Replicated,
    batch: dict[str, torch.Tensor],
    draws: Draws,
    iteration: int,
    loss_scale: LossScale,
) -> Loss:
    """Add the gradient of this rank's mean loss to the parameters, averaged over the ranks; returns the loss.

    batch: images [B,3,H,W], uint8 or normalised, and labels [B]; B is a multiple of `gradient_accumulation`.
    """
    count = stage.config.gradient_accumulation
    size = draws.count // count
    micro_batches = [
        MicroBatch({k: v[i : i + size] for k, v in batch.items()}, draws.part(i, size), stage.normalization)
        for i in range(0, draws.count, size)
    ]
    if count == 1:
        loss = parallel(stage.loss, micro_batches[0].batch, draws, iteration)
        loss_scale(loss.loss).backward()
        return loss
    return (_grad_cache if stage.grad_cache else _accumulate)(stage, parallel, micro_batches, iteration, loss_scale)


def _accumulate(stage, parallel, micro_batches, iteration, loss_scale) -> Loss:
    """A loss that is a mean over samples; the keys that it may compare them with are computed for all of them first."""
    pairs, keys_of = [None] * len(micro_batches), stage.keys_of(iteration)
    if keys_of:
        with torch.no_grad():
            keys = [parallel(keys_of, micro_batch.batch["x"]) for micro_batch in micro_batches]
        everyone = stage.ranks.gather_tensors(torch.cat(keys))()
        pairs = [(own, everyone) for own in keys]
    losses = []
    for micro_batch, pair in zip(micro_batches, pairs, strict=True):
        with parallel.averaged(now=micro_batch is micro_batches[-1]):
            loss = parallel(stage.loss, micro_batch.batch, micro_batch.draws, iteration, pair)
            loss_scale(loss.loss / len(micro_batches)).backward()
        losses.append(loss)
    return _merged(losses)


def _grad_cache(stage, parallel, micro_batches, iteration, loss_scale) -> Loss:
    """A contrastive loss of all samples together, exactly: GradCache.

    The encoders run per micro-batch without gradient; the losses and the projection head see the features of all
    samples; then the encoder runs once more per micro-batch, for the gradient that its features got.

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021, arXiv
    2101.06983).
    """
    objective = stage.objective(micro_batches[0].draws, iteration)

    def features_of(*views):
        return torch.stack(objective.features(*views))

    def keys_and_features(*views):
        return (*objective.keys(*views), features_of(*views))

    with torch.no_grad():
        found = [parallel(keys_and_features, *stage.views(m.batch, m.draws)) for m in micro_batches]
    *keys, features = (torch.cat(values, dim=-2) for values in zip(*found, strict=True))
    features.requires_grad_()
    with parallel.averaged(now=False):
        everyone = [wait() for wait in [stage.ranks.gather_tensors(key) for key in keys]]
        loss = parallel(objective.losses, features, keys, everyone)
        loss_scale(loss.loss).backward()
    for m, gradient in zip(micro_batches, features.grad.chunk(len(micro_batches), dim=-2), strict=True):
        last = m is micro_batches[-1]
        with parallel.averaged(now=last):
            again = parallel(features_of, *stage.views(m.batch, m.draws))
            if last:
                again = again + _zero_of(stage.network.projection_head)
            again.backward(gradient)
    return loss


def _merged(losses: list[Loss]) -> Loss:
    """The loss of the samples of all micro-batches, without gradient."""
    per_sample = torch.cat([loss.per_sample.detach() for loss in losses])
    terms = {name: torch.cat([loss.terms[name].detach() for loss in losses]) for name in losses[0].terms}
    return Loss(per_sample.mean(), per_sample, terms, torch.cat([loss.level for loss in losses]))


def _zero_of(module: torch.nn.Module) -> torch.Tensor:
    """0, [], whose gradient reaches every parameter of `module`, as zeros: DistributedDataParallel waits for all."""
    return sum(p.flatten()[:0].sum() for p in module.parameters())
