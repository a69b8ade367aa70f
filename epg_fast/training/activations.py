"""What autograd keeps between the forward and the backward pass, counted on tensors that hold no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from epg_fast.models.encoder import is_recomputed
from epg_fast.runtime import autocast
from epg_fast.training.stages import Stage


class SavedTensors:
    """Bytes of the distinct storages that autograd saves for the backward pass, without parameters and buffers."""

    def __init__(self, *networks: torch.nn.Module):
        self.bytes = 0
        tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
        # Held, so that no address is used twice.
        self._seen = {t.untyped_storage()._cdata: t for t in tensors}

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is saved inside."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor
            self.bytes += storage.nbytes()
        return tensor


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank, autocast's 16-bit copies of the weights included."""

    plain: int
    """Saved for the backward pass without checkpointing."""
    checkpointed: int
    """Saved with it in all blocks, and what the largest block saves when it is computed again."""
    chosen: int
    """Saved with it in as many blocks as the run's configuration says."""


class _NoDraws:
    """Draws of a rank, as far as shapes go."""

    def __init__(self, count: int):
        self._count = count

    def normal(self, stream: str, *shape: int) -> torch.Tensor:
        return torch.empty(self._count, *shape)

    def uniform(self, stream: str) -> torch.Tensor:
        return torch.empty(self._count)

    def integer(self, stream: str, high: int) -> int:
        return 0

    def per_rank_seed(self, stream: str) -> None:
        return None


def activation_bytes(stage: Stage, images: int, step: int) -> Activations:
    """What the update at `step` keeps for `images` on one rank, by running its forward pass on shapes alone.

    stage: its networks are on the meta device, and are left as fake CPU tensors. Counted is plain PyTorch in the
    run's precision; what torch.compile and fused kernels save differs.
    """
    networks = [n for n in (stage.network, stage.ema, getattr(stage, "perceptual", None)) if n is not None]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in networks:
            network.to_empty(device="cpu")
        plain, blocks = _saved(stage, networks, images, step, share=0)
        kept = {0: plain}
        for share in (1, stage.network.use_checkpoint):
            if share not in kept:
                again = [size for i, size in blocks if is_recomputed(i, share)]
                kept[share] = _saved(stage, networks, images, step, share)[0] + max(again, default=0)
    return Activations(plain, kept[1], kept[stage.network.use_checkpoint])


def _saved(stage: Stage, networks: list, images: int, step: int, share: float) -> tuple[int, list[tuple[int, int]]]:
    """Bytes saved by one forward pass, and (index, what it adds to them) of the blocks, if none is computed again."""
    network, found = stage.network, []
    wanted, network.use_checkpoint = network.use_checkpoint, share
    saved = SavedTensors(*networks)
    hooks = [] if share else _on_blocks(network, saved, found)
    size = network.image_size
    batch = {name: torch.empty(images, 3, size, size) for name in ("x", "view1", "view2")}
    batch["label"] = torch.empty(images, dtype=torch.int64)
    with saved.counted(), autocast(torch.device("cpu"), stage.config.precision):
        stage.loss(batch, _NoDraws(images), step)
    for hook in hooks:
        hook.remove()
    network.use_checkpoint = wanted
    return saved.bytes, found


def _on_blocks(network: torch.nn.Module, saved: SavedTensors, found: list[tuple[int, int]]) -> list:
    """Hooks that append to `found` each block's index and what it adds to `saved`."""
    before, hooks = [], []
    for i, block in enumerate([*network.blocks, *getattr(network, "decoder_blocks", ())]):
        hooks.append(block.register_forward_pre_hook(lambda *_: before.append(saved.bytes)))
        hooks.append(block.register_forward_hook(lambda *_, i=i: found.append((i, saved.bytes - before.pop()))))
    return hooks
