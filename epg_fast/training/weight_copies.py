"""Copies in 16 bits of the large weights, which the products of an update read instead of casting the weights.

Under autocast in bf16 or fp16 every product casts its float32 weight, in the forward pass and where it is recomputed.
A copy holds the same 16-bit numbers, so that no result depends on it.

Which weights: those of `linears_with_operands`, in networks that a loss calls in every update: the trained network,
its EMA in pre-training, a frozen encoder. Sharded weights (fsdp) have none, and are cast once they are whole.
When they are used: inside `in_use` alone, which is around the gradients of an update. Every other call of a network
casts, and no copy of a network or checkpoint holds copies of weights.
When they are written: by the fused optimiser in the pass that updates the weights; by `in_use`, in one foreach call,
where a weight is not what it was then. PyTorch counts the changes of a tensor in place, but for writes through
`weight.data`.
torch.compile takes them as inputs that keep their addresses, which CUDA graphs read in place. A block that is
recomputed in the backward pass finds them there, and DistributedDataParallel does not see them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from epg_fast.models.encoder import ViTEncoder
from epg_fast.models.fused import linears_with_operands
from epg_fast.training.parallel import is_sharded


class WeightCopies:
    """The copies of the `networks`' weights in `dtype`; none at all if that is None.

    As mapping: the copy of a parameter, or None.
    """

    def __init__(self, networks: Iterable[ViTEncoder], dtype: torch.dtype | None):
        self._linears: list[torch.nn.Linear] = []
        self._copies: list[torch.Tensor] = []
        self._operands: dict[torch.nn.Module, dict[str, torch.Tensor]] = {}
        for network in networks if dtype else ():
            for module, name, linears in linears_with_operands(network):
                weights = [linear.weight for linear in linears]
                if any(weight.dtype in (dtype, torch.float64) or is_sharded(weight) for weight in weights):
                    continue
                rows = [len(weight) for weight in weights]
                operand = weights[0].new_empty(sum(rows), weights[0].shape[1], dtype=dtype, requires_grad=False)
                if operand.is_cuda:
                    torch._dynamo.mark_static_address(operand, guard=False)
                self._linears += linears
                self._copies += operand.split(rows)
                self._operands.setdefault(module, {})[name] = operand
        self._written: list[tuple[torch.Tensor, int] | None] = [None] * len(self._copies)
        """Per copy, the weight that it was made of and how often that had been changed then."""
        self._places = {linear.weight: i for i, linear in enumerate(self._linears)}

    def get(self, weight: torch.Tensor) -> torch.Tensor | None:
        place = self._places.get(weight)
        return None if place is None else self._copies[place]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the products of the networks read the copies of the weights as they are now."""
        self.refresh()
        for module, operands in self._operands.items():
            module.operands = operands
        try:
            yield
        finally:
            for module in self._operands:
                del module.operands

    @torch.no_grad()
    def refresh(self) -> None:
        """Make those copies anew whose weights have changed since."""
        stale = [i for i, linear in enumerate(self._linears) if not _is(self._written[i], linear.weight)]
        if stale:
            weights = [self._linears[i].weight for i in stale]
            torch._foreach_copy_([self._copies[i] for i in stale], weights)
            for i, weight in zip(stale, weights, strict=True):
                self._written[i] = weight, weight._version

    def updated(self, weights: Iterable[torch.Tensor]) -> None:
        """Take note that one call has changed `weights` and written their copies, if these were right before."""
        for weight in weights:
            place = self._places.get(weight)
            if place is not None:
                right = _is(self._written[place], weight, changes=1)
                self._written[place] = (weight, weight._version) if right else None


def _is(written: tuple[torch.Tensor, int] | None, weight: torch.Tensor, changes: int = 0) -> bool:
    """Whether `written` is `weight` as it was so many changes ago."""
    return written is not None and written[0] is weight and weight._version == written[1] + changes
