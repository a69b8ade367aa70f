"""How a stage's networks lie on the ranks: a copy of everything on each, or a part.

`Replicated` (ddp, and a process alone): gradients are averaged by DistributedDataParallel.

`Sharded` (fsdp, PyTorch's FSDP2): every rank keeps a part of each weight, gradient, moment and EMA. A tensor is
split along its first axis as `Tensor.chunk` does. A transformer block's weights are put together from all ranks right
before the block computes, and let go right after; its gradients are averaged over the ranks and split in the same step.
What lies outside the blocks is kept together from the start of the forward pass to the end of the backward pass. All
numbers stay float32, and what the optimiser does to its parts needs no other rank.

A tensor that is split is a DTensor; its part in this rank's memory is a plain tensor, `local(tensor)`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from epg_fast.distributed import TIMEOUT, Ranks
from epg_fast.models.blocks import BatchNorm1d
from epg_fast.runtime import autocast
from epg_fast.training.stages import Stage

Tensors = dict[str, torch.Tensor]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this rank holds a part of `tensor` only."""
    return hasattr(tensor, "to_local")


@torch.no_grad()
def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of `tensor`, sharing its memory: a part, maybe an empty one, or all of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def split_as(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor of which ranks hold such parts as `part`, split as `like`; it shares the memory of the part."""
    from torch.distributed.tensor import DTensor

    layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(part, like.device_mesh, like.placements, **layout)


def rows_of(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """(first, end) of the rows of a rank when `count` rows are split over `ranks`."""
    size = -(-count // ranks)
    return min(rank * size, count), min((rank + 1) * size, count)


def parallelize(stage: Stage, others: Sequence[torch.nn.Module] = ()) -> Replicated:
    """Prepare a stage's networks, and `others`, further EMA, for the run's ranks, in place.

    With fsdp parameters are new objects afterwards: an optimiser is made later.
    """
    if stage.ranks.world_size > 1:
        for module in stage.network.modules():
            if type(module) is BatchNorm1d:
                module.__class__ = SyncBatchNorm1d
    return Sharded(stage, others) if stage.sharded else Replicated(stage)


class Replicated:
    """Every rank has a copy of everything, and the main rank alone saves."""

    def __init__(self, stage: Stage):
        self.ranks, self._precision = stage.ranks, stage.config.precision
        self._module = self._wrapped(stage)
        self.savers = Ranks(0, 1, self.ranks.device)
        """Those ranks that have a part in saving."""

    def _wrapped(self, stage: Stage) -> torch.nn.Module:
        module = _Networks(network=stage.network)
        if self.ranks.world_size == 1:
            return module
        # The argument's new name is not known to older versions, and means that buffers are still sent at first.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return DistributedDataParallel(
            module,
            device_ids=[self.ranks.device] if self.ranks.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,  # without a second copy of the gradients
        )

    def __call__(self, compute: Callable, *arguments):
        """`compute(*arguments)` in the run's precision; backward passes through it average gradients over the ranks."""
        with self._autocast():
            return self._module(compute, *arguments)

    @torch.no_grad()
    def observe(self, compute: Callable, *arguments):
        """`compute(*arguments)` beside training, without gradient; training goes on as if it had not been called.

        The networks run as written: what torch.compile has made for training stays the code of training. Their buffers,
        BatchNorm's statistics, come back. All ranks call this at the same point.
        """
        before = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        try:
            with torch.compiler.set_stance("force_eager"):
                return self(compute, *arguments)
        finally:
            for buffer, value in before:
                buffer.copy_(value)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.ranks.device, self._precision)

    def averaged(self, now: bool) -> contextlib.AbstractContextManager:
        """Inside, for forward and backward passes: whether gradients are averaged over the ranks, or only added up."""
        if now or self.ranks.world_size == 1:
            return contextlib.nullcontext()
        return self._module.no_sync()

    @property
    def saves(self) -> bool:
        """Whether this rank has a part in saving."""
        return self.ranks.main

    def parts(self, tensors: Tensors, copies: dict) -> Tensors:
        """What this rank writes of `tensors` to a checkpoint, in host memory.

        copies: those that were made before are in it, and are shared.
        """
        return {name: _copy(tensor, copies) for name, tensor in tensors.items()} if self.saves else {}

    def whole(self, tensors: Tensors, copies: dict) -> Tensors:
        """Complete `tensors` in the main rank's host memory, for other files; nothing on the others."""
        return self.parts(tensors, copies)


class Sharded(Replicated):
    """Every rank has a part of everything, and saves it. All ranks call the methods at the same point."""

    def __init__(self, stage: Stage, others: Sequence[torch.nn.Module]):
        self._others = others
        super().__init__(stage)
        # apart from training, for a thread that writes
        group, ranks = dist.new_group(backend="gloo", timeout=TIMEOUT), self.ranks
        self.savers = Ranks(ranks.rank, ranks.world_size, ranks.device, group=group)

    def _wrapped(self, stage):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.ranks.device.type, (self.ranks.world_size,))
        blocks, frozen = stage.network.all_blocks, (stage.ema, *self._others)
        for block in [b for module in frozen for b in module.all_blocks] + blocks:
            fully_shard(block, mesh=mesh)
        for module in frozen:
            # No backward pass would let go of what an update makes stale.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # Both networks under one root: FSDP forgets at the end of the root's backward pass what it noted of the
        # forward passes, those of the EMA included.
        root = fully_shard(_Networks(network=stage.network, ema=stage.ema), mesh=mesh)
        # By default a module fetches what ran before it, which may belong to a pass without gradient.
        chain = [root, *blocks]
        for i, module in enumerate(chain):
            module.set_modules_to_backward_prefetch([chain[i - 1]])
        # FSDP takes what runs first for the root, which must not be the EMA for a preview; now parameters move no
        # more.
        with torch.no_grad():
            root(lambda: None)
        root.reshard()
        # Nothing writes to what a block returns.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        return root

    def _autocast(self):
        # A block that ran without gradient gets none from a later run with the copies that autocast has kept.
        return autocast(self.ranks.device, self._precision, cache=False)

    @contextlib.contextmanager
    def averaged(self, now: bool) -> Iterator[None]:
        """As above; gradients that are only added up are kept whole."""
        self._module.set_requires_gradient_sync(now)
        try:
            yield
        finally:
            self._module.set_requires_gradient_sync(True)

    def observe(self, compute, *arguments):
        found = super().observe(compute, *arguments)
        self._module.reshard()  # which no backward pass does here
        return found

    saves = True

    def parts(self, tensors, copies):
        return {name: _copy(t, copies) for name, t in tensors.items() if is_sharded(t) or self.ranks.main}

    @torch.no_grad()
    def whole(self, tensors, copies):
        found = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if is_sharded(tensor) else tensor
            if self.ranks.main:
                found[name] = full.to("cpu", copy=True)
        return found


class Agreement:
    """Whether any rank wants to end, the same answer on all: with several ranks that to the question before this one.

    The hosts ask each other in the background of an iteration, and no device is waited for.
    """

    def __init__(self, ranks: Ranks):
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if ranks.world_size > 1 else None
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self, wish: bool) -> bool:
        if self._group is None:
            return wish
        answer = self.settle()
        wishes = torch.tensor([float(wish)])
        self._asked = wishes, dist.all_reduce(wishes, group=self._group, async_op=True)
        return answer

    def settle(self) -> bool:
        """The answer to the last question."""
        if self._asked is None:
            return False
        (wishes, work), self._asked = self._asked, None
        work.wait()
        return bool(wishes > 0)


class _Networks(torch.nn.Module):
    """A stage's networks, whose forward pass is what it is given: one for each backward pass, as wrappers want it."""

    def __init__(self, **networks: torch.nn.Module):
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)

    def forward(self, compute: Callable, *arguments):
        return compute(*arguments)


def _copy(tensor: torch.Tensor, copies: dict) -> torch.Tensor:
    tensor = local(tensor).detach()
    key = (tensor.data_ptr(), tensor.dtype, tensor.shape)
    if key not in copies:
        copies[key] = tensor.to("cpu", copy=True)
    return copies[key]


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

    backward = forward
