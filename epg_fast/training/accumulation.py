"""Gradients of an update's batch, whole or in parts, which need less memory.

In parts the gradient is that of the whole batch, up to rounding: contrastive negatives and BatchNorm statistics span
the global batch as ever. A part is a range of this rank's samples; the random draws of a sample are those of its place
in the global batch (dropout alone is drawn part by part).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from epg_fast.config import RunConfig
from epg_fast.data import PixelNormalization
from epg_fast.objectives import Loss
from epg_fast.runtime import autocast
from epg_fast.training.draws import Draws
from epg_fast.training.loss_scale import LossScale
from epg_fast.training.sharding import without_gradient_sync


def check_parts(config: RunConfig, world_size: int) -> None:
    """Raise ValueError for a batch that is not the same number of images in every part of every rank."""
    parts = config.gradient_accumulation
    if parts > 1 and config.batch_size % (world_size * parts):
        ranks = f"{world_size} rank{'s' * (world_size > 1)}"
        size = -(-config.batch_size // (world_size * parts)) * world_size * parts
        raise ValueError(
            f"batch_size {config.batch_size} does not divide over {ranks} with {parts} parts each "
            f"(gradient_accumulation); take --batch_size {size} or other parts"
        )


@dataclass
class Part:
    """Samples of this rank: images (uint8 ones are normalised on access) and labels, and their draws."""

    raw: dict[str, torch.Tensor]
    draws: Draws
    normalization: PixelNormalization

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        """Normalised images [B,C,H,W], made anew each time, and labels [B]."""
        return {k: self.normalization.normalize(v) if v.dtype == torch.uint8 else v for k, v in self.raw.items()}


class Gradients:
    """Forward and backward passes of a stage, through `step_module`, which averages the gradients over the ranks."""

    def __init__(self, stage, step_module: torch.nn.Module, normalization: PixelNormalization, loss_scale: LossScale):
        self._stage, self._step_module = stage, step_module
        self._normalization, self._scale = normalization, loss_scale

    def __call__(self, batch: dict[str, torch.Tensor], draws: Draws, step: int) -> Loss:
        """Add the gradient of this rank's mean loss at `step` to the parameters, averaged over the ranks.

        batch: images [B,3,H,W], uint8 or normalised, and labels [B]; B is a multiple of `gradient_accumulation`.
        """
        parts = self._stage.config.gradient_accumulation
        if parts == 1:
            part = Part(batch, draws, self._normalization)
            loss = self.forward(self._stage.loss, part.batch, draws, step)
            self.backward(loss.loss)
            return loss
        size = draws.count // parts
        starts = range(0, draws.count, size)
        split = [
            Part({k: v[i : i + size] for k, v in batch.items()}, draws.part(i, size), self._normalization)
            for i in starts
        ]
        return self._stage.accumulate(self, split, step)

    def forward(self, compute, *arguments):
        """`compute(*arguments)`, a method of the stage, in the run's precision and inside the module that averages."""
        # A sharded block that ran without gradient gets none from a later run with the copies that autocast has kept.
        cache = not self._stage.sharding
        with autocast(self._stage.ranks.device, self._stage.config.precision, cache):
            return self._step_module(compute, *arguments)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, []."""
        self._scale(loss).backward()

    def averaged(self, now: bool) -> contextlib.AbstractContextManager:
        """Inside, for forward and backward passes: whether gradients are averaged over the ranks, or only added up."""
        return contextlib.nullcontext() if now else without_gradient_sync(self._step_module)


def merged(losses: list[Loss]) -> Loss:
    """The loss of the parts' samples together, without gradient."""
    per_sample = torch.cat([loss.per_sample.detach() for loss in losses])
    terms = {name: torch.cat([loss.terms[name].detach() for loss in losses]) for name in losses[0].terms}
    return Loss(per_sample.mean(), per_sample, terms, torch.cat([loss.level for loss in losses]))


def nothing_of(module: torch.nn.Module) -> torch.Tensor:
    """0, [], whose gradient reaches every parameter of `module`, as zeros: DistributedDataParallel waits for all."""
    return sum(p.flatten()[:0].sum() for p in module.parameters())
