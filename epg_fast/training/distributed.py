"""Ranks: start-up under torchrun, gathering of contrastive keys, and BatchNorm over the global batch."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from epg_fast import launcher
from epg_fast.models.blocks import BatchNorm1d
from epg_fast.runtime import resolve_device, torchrun_store

# How long a rank waits for the others: twice as long as a loader waits for its disk.
TIMEOUT = datetime.timedelta(minutes=20)
# What gloo and NCCL say when a rank is gone or silent.
_LOST = re.compile("connection (closed|reset|refused)|broken pipe|timed out|timeout|NCCL", re.IGNORECASE)


@dataclass
class Ranks:
    """This process's place among the ranks, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def gather(self, keys: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start to gather [B, P] of this rank; the result waits for [world_size * B, P] in rank order, no gradient."""
        keys = keys.detach().contiguous()
        if self.world_size == 1:
            return lambda: keys
        parts = [torch.empty_like(keys) for _ in range(self.world_size)]
        work = dist.all_gather(parts, keys, async_op=True)

        def wait() -> torch.Tensor:
            work.wait()
            return torch.cat(parts)

        return wait

    def gather_objects(self, value) -> list:
        """The picklable `value` of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def start(device: str, parallelism: str = "ddp") -> Ranks:
    """Join the process group that torchrun describes (NCCL on GPUs, gloo on CPUs), or be the only rank.

    parallelism: "fsdp" needs a process group for a single rank, too.
    """
    place = resolve_device(device)
    rank, world_size = launcher.place()
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        backend = "nccl" if place.type == "cuda" else "gloo"
        if world_size > 1:
            dist.init_process_group(
                backend, store=torchrun_store(TIMEOUT), rank=rank, world_size=world_size, timeout=TIMEOUT
            )
        elif parallelism == "fsdp":
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(rank, world_size, place)


def explained(error: RuntimeError, ranks: Ranks) -> RuntimeError:
    """Return `error`, or one that says so when it means that another rank is gone."""
    if ranks.world_size == 1 or not _LOST.search(str(error)):
        return error
    return RuntimeError(
        f"rank {ranks.rank} has lost another of the {ranks.world_size} ranks, whose own message says why "
        f"({str(error).splitlines()[0]}); the same command resumes from the last checkpoint"
    )


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


class SyncBatchNorm1d(BatchNorm1d):
    """BatchNorm1d whose training statistics are those of the global batch; works on CPU, unlike torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, C] of this rank (equal B on every rank) -> the same shape and dtype."""
        if not self.training:
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        count = x.shape[0] * dist.get_world_size()
        mean = _AllReduceSum.apply(values.sum(dim=0)) / count
        centred = values - mean
        variance = _AllReduceSum.apply(centred.square().sum(dim=0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return (centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias).to(x.dtype)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total


def synchronize_batch_norm(module: torch.nn.Module) -> None:
    """Turn every BatchNorm1d of `module` into SyncBatchNorm1d in place; names, parameters and buffers stay."""
    for child in module.modules():
        if type(child) is BatchNorm1d:
            child.__class__ = SyncBatchNorm1d
