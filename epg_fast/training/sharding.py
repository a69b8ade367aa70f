"""Fully sharded training: every rank keeps a part of each weight, gradient, moment and average (PyTorch's FSDP2).

A tensor is split along its first axis as `Tensor.chunk` does. A transformer block's weights are put together from all
ranks right before the block computes, and let go right after; its gradients are averaged over the ranks and split in
the same step. What lies outside the blocks is kept together from the start of the forward pass to the end of the
backward pass. All numbers stay float32, and what the optimiser does to its parts needs no other rank.

A tensor that is split here is a DTensor; its part in this rank's memory is a plain tensor, `local(tensor)`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from epg_fast.distributed import TIMEOUT, Ranks
from epg_fast.training.batch_norm import synchronize_batch_norm


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this rank holds a part of `tensor` only."""
    return hasattr(tensor, "to_local")


@torch.no_grad()
def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of `tensor`, sharing its memory: a part, maybe an empty one, or all of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` put together on the device of every rank; all ranks call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part_of(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a `full` tensor that is split as `like`; a view."""
    if not is_sharded(like):
        return full
    parts, rank = full.chunk(like.device_mesh.size()), like.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else full[:0]


def load_parts(network: torch.nn.Module, parts: dict[str, torch.Tensor]) -> None:
    """`network.load_state_dict` where `parts` holds this rank's part of every tensor.

    Raises RuntimeError for other names or shapes.
    """
    own = network.state_dict()
    if own.keys() != parts.keys():
        raise RuntimeError(f"got other tensors than the network's: {sorted(own.keys() ^ parts.keys())[:4]}")
    for name, tensor in own.items():
        if local(tensor).shape != parts[name].shape:
            raise RuntimeError(f"got {name} of shape {list(parts[name].shape)}, want {list(local(tensor).shape)}")
        local(tensor).copy_(parts[name])


class Sharding:
    """The split networks of a stage. `shard` makes it; all ranks call its methods at the same point.

    `group` connects the ranks' host memories, apart from training: a thread that writes may use it meanwhile.
    """

    def __init__(self, root: torch.nn.Module, group: dist.ProcessGroup):
        from torch.distributed.device_mesh import DeviceMesh

        self.group, self._root = group, root
        self._mesh = DeviceMesh.from_group(group, "cpu")

    def running(self, module: torch.nn.Module) -> torch.nn.Module:
        """Module with `module`'s forward pass, around which the weights are put together and the gradients split."""
        self._root.run = module.forward  # not the module itself, which would hold the network a second time
        return self._root

    def on_host(self, part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """`part` in host memory as a DTensor that is split as `like`; as it is if that is not split."""
        if not is_sharded(like):
            return part
        from torch.distributed.tensor import DTensor

        layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
        return DTensor.from_local(part, self._mesh, like.placements, **layout)

    def gather(self, parts: dict | None, likes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """Tensors put together in the main rank's host memory from all ranks' parts there; None on the others.

        parts: None gives None. A name's end, after any slash, is that of the tensor in `likes` that it is split as.
        """
        if parts is None:
            return None
        likes = {name: likes[name.rpartition("/")[2]] for name in parts}
        rank, ranks = dist.get_rank(self.group), range(dist.get_world_size(self.group))
        found = {}
        for name, part in parts.items():
            if rank and is_sharded(likes[name]) and part.numel():
                dist.send(part.contiguous(), group=self.group, group_dst=0)
            elif not rank:
                found[name] = self._received(part, likes[name], ranks) if is_sharded(likes[name]) else part
        return found if rank == 0 else None

    def _received(self, part: torch.Tensor, like: torch.Tensor, ranks: range) -> torch.Tensor:
        full = torch.empty(like.shape, dtype=part.dtype)
        for source, target in zip(ranks, full.chunk(len(ranks)), strict=False):
            if source:
                dist.recv(target, group=self.group, group_src=source)
            else:
                target.copy_(part)
        return full

    def everyone(self, value) -> list:
        """The picklable `value` of every rank."""
        values = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values


class _Root(torch.nn.Module):
    """Both networks under one root: FSDP forgets at the end of the root's backward pass what it noted of the forward
    passes, the averaged network's included."""

    run: Callable

    def __init__(self, network: torch.nn.Module, average: torch.nn.Module):
        super().__init__()
        self.network, self.average = network, average

    def forward(self, *args, **kwargs):
        return self.run(*args, **kwargs)


def shard(
    network: torch.nn.Module, average: torch.nn.Module, others: Sequence[torch.nn.Module], ranks: Ranks
) -> Sharding:
    """Split a stage's `network`, its `average` and `others`, further averages, in place over all ranks.

    The networks may be in host memory: they come to the device part by part. State dicts keep their names, and hold
    DTensors. A frozen encoder is left whole. Parameters are new objects afterwards: an optimiser is made later.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    if ranks.world_size > 1:
        synchronize_batch_norm(network)
    blocks = _blocks(network)
    for block in [b for module in (average, *others) for b in _blocks(module)] + blocks:
        fully_shard(block, mesh=mesh)
    for module in (average, *others):
        # No backward pass would let go of what an update makes stale.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    root = fully_shard(_Root(network, average), mesh=mesh)
    # By default a module fetches what ran before it, which may belong to a pass without gradient.
    chain = [root, *blocks]
    for i, module in enumerate(chain):
        module.set_modules_to_backward_prefetch([chain[i - 1]])
    # FSDP takes what runs first for the root, which must not be the average for a preview; now parameters move no more.
    with torch.no_grad():
        root.run = lambda: None
        root()
    root.reshard()
    # Nothing writes to what a block returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return Sharding(root, dist.new_group(backend="gloo", timeout=TIMEOUT))


def _blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    return [*network.blocks, *getattr(network, "decoder_blocks", ())]


@contextlib.contextmanager
def without_gradient_sync(step_module: torch.nn.Module) -> Iterator[None]:
    """Add up the gradients of backward passes inside on each rank alone; those of a pass outside are averaged.

    step_module: what `make_step_module` returned. With sharding the gradients inside are kept whole.
    """
    if isinstance(step_module, DistributedDataParallel):
        with step_module.no_sync():
            yield
    elif isinstance(step_module, _Root):
        step_module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            step_module.set_requires_gradient_sync(True)
    else:
        yield
