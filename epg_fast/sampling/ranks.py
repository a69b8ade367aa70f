"""The processes of a torchrun that share the images, and what they agree on."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch

from epg_fast import launcher
from epg_fast.runtime import resolve_device, torchrun_store

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
_START = datetime.timedelta(minutes=20)
# Ranks meet only before the first image and after the last, and a slow one may have hours more to do. A rank that dies
# closes its connections, which the others notice at once.
_PATIENCE = datetime.timedelta(days=30)
_POLL_SECONDS = 0.1


class Ranks:
    """This process's place among those that share the work; alone, it needs no torch.distributed."""

    def __init__(self, rank: int = 0, world_size: int = 1, store: Store | None = None):
        self.rank, self.world_size = rank, world_size
        self._store, self._counted = store, 0

    @property
    def main(self) -> bool:
        """Whether this rank looks after the folder and talks to the user."""
        return self.rank == 0

    def gather(self, value: T, while_waiting: Callable[[], None] = lambda: None) -> list[T]:
        """Return the picklable `value` of every rank, in rank order, once all have come here."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.world_size
        try:
            # Polled, because Python handles no signal inside a call that waits.
            arrived = dist.barrier(async_op=True)
            while not arrived.is_completed():
                while_waiting()
                time.sleep(_POLL_SECONDS)
            arrived.wait()
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} has lost another of the {self.world_size} ranks, whose own message says why "
                f"({str(error).splitlines()[0]}); the same command goes on"
            ) from error
        return values

    def decide(self, choose: Callable[[], T]) -> T:
        """Return on every rank what `choose` returns on the main one, or raise the ValueError or OSError it raises."""
        result, error = None, None
        if self.main:
            try:
                result = choose()
            except (ValueError, OSError) as problem:
                error = problem
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return result

    def count(self, number: int) -> int:
        """Add `number` to a count that all ranks share, and return it."""
        if self._store is not None:
            return self._store.add("images", number)
        self._counted += number
        return self._counted


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the ranks that torchrun describes, or be the only one. Raises ValueError where torch cannot do that."""
    rank, world_size = launcher.place()
    if world_size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    if not dist.is_available():
        raise ValueError(
            f"torch {torch.__version__} is built without torch.distributed: start one process, no torchrun"
        )
    store = torchrun_store(_START)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_PATIENCE)
    yield Ranks(rank, world_size, store)
    # Not after an error: it would wait for what the other ranks have not done.
    dist.destroy_process_group()


def own_device(name: str) -> torch.device:
    """Return `resolve_device(name)`, as torch's current one. Raises ValueError when the node has too few GPUs."""
    device = resolve_device(name)
    if device.type == "cuda":
        present = torch.cuda.device_count()
        if device.index >= present:
            raise ValueError(
                f"local rank {device.index} has no GPU, torch sees {present}; start at most {present} per node"
            )
        torch.cuda.set_device(device)
    return device
