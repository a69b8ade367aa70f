"""Gradients of a batch, whole or in micro-batches, which need less memory, from compiled networks or plain ones.

With micro-batches the gradient is that of the whole batch, up to rounding: contrastive negatives and BatchNorm
statistics span the global batch as ever. A micro-batch is a range of this rank's samples; the random draws of a sample
are those of its place in the global batch (dropout alone is drawn per micro-batch).

In fp16 a scale keeps them in range.

torch.compile takes the networks block by block or whole, and with either the noised images of pre-training, which is
element-wise work in one pass; CUDA graphs record what it has made of whole ones, and share a
memory pool. A network may run several times before a backward pass, with and without gradient: each run of a step is
recorded as following the one before, and keeps its own memory until its results are gone. When the next step begins,
all memory of the step before is used again: nothing that a network, or its backward pass, returned may be read after
that. An update keeps to it: what it logs are copies, and it lets go of the gradients. Optimiser, losses and EMA are
outside.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from epg_fast.config import RunConfig
from epg_fast.diffusion import PixelNormalization
from epg_fast.distributed import Ranks
from epg_fast.models.compilation import compile_blocks, compile_network, compile_options
from epg_fast.objectives import Loss
from epg_fast.training.draws import Draws
from epg_fast.training.parallel import Replicated
from epg_fast.training.stages import Stage

log = logging.getLogger("epg_fast")


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


def check_compilation(config: RunConfig, ranks: Ranks) -> None:
    """Raise ValueError for CUDA graphs where they cannot be, or are known to fail."""
    if not config.cuda_graphs:
        return
    if ranks.device.type != "cuda":
        raise ValueError(f"cuda_graphs: got device {ranks.device.type}, wanted a CUDA device; leave out --cuda_graphs")
    if config.gradient_accumulation > 1:
        raise ValueError(
            f"cuda_graphs: got gradient_accumulation {config.gradient_accumulation}, wanted 1: the gradients of one "
            "micro-batch would lie in memory that the next one's graph writes; leave out --cuda_graphs"
        )
    if ranks.world_size > 1:
        raise ValueError(
            f"cuda_graphs: got {ranks.world_size} ranks, wanted 1: torch's CUDA graph trees are known to fail under "
            "DistributedDataParallel, whose backward pass enters them from a second thread; leave out --cuda_graphs"
        )


def compile_stage(stage: Stage, how: str | None = None, **options) -> None:
    """Compile the networks that the loss calls, in place, as the stage's configuration asks for.

    how: instead of the configuration's `compile`. options: further arguments of torch.compile.
    """
    how, more = how or stage.config.compile, stage.chosen.options
    networks = [network for network in (stage.network, stage.perceptual) if network is not None]
    how = ("blocks" if stage.ranks.device.type == "cuda" else "off") if how == "auto" else how
    if stage.name == "pretrain" and how != "off":
        # outside of the networks, and of CUDA graphs: images and noise are new ones in every step
        stage.noised = torch.compile(stage.noised, **{"fullgraph": True} | compile_options(more=more) | options)
    if how == "blocks":
        emas = [] if stage.ema is None else [stage.ema]
        for network in networks + emas:
            compile_blocks(network, more=more, sharded=stage.sharded, **options)
    elif how == "network":
        options = {"more": more, "cuda_graphs": stage.config.cuda_graphs} | options
        if stage.name == "pretrain":
            compile_network(stage.ema, **options)
            # the head of several ranks sums its statistics over them
            alone = ["projection_head"] if stage.ranks.world_size == 1 else []
            compile_network(stage.network, ["encode", *alone], **options)
        else:
            for network in networks:
                compile_network(network, **options)
    elif stage.config.fp8:
        log.warning("fp8 without torch.compile rounds in kernels of its own, which can cost more than FP8 saves")


class LossScale:
    """Dynamic loss scale of fp16 training, on the device: grows slowly, halved by a gradient that is not finite.

    The released configuration: 2^14 at first, times 2^(1/1000) per step; never below 1, from where nothing is gained.
    `value` is [] float32, None when switched off.
    """

    def __init__(self, device: torch.device, enabled: bool):
        self.value = torch.full((), 2.0**14, device=device) if enabled else None

    def __call__(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call backward on."""
        return loss if self.value is None else loss * self.value

    def update(self, found_inf: torch.Tensor) -> None:
        """Adapt to the outcome of a step."""
        if self.value is not None:
            value = self.value.double()
            changed = torch.where(found_inf > 0, value * 0.5, value * 2.0**0.001)
            self.value.copy_(changed.clamp(1.0, torch.finfo(torch.float32).max / 2))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The live tensor; empty when switched off."""
        return {} if self.value is None else {"scale": self.value}


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
