"""Ranks: what the launcher says, the process group, what ranks agree on, and the signals that end them.

Nothing here imports torch before it is needed, so that the command line answers at once.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Store

T = TypeVar("T")
log = logging.getLogger("epg_fast")

# How long a rank waits for the others: twice as long as a loader waits for its disk.
TIMEOUT = datetime.timedelta(minutes=20)
_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.02, 1.0
# What gloo and NCCL say when a rank is gone or silent.
_LOST = re.compile("connection (closed|reset|refused)|broken pipe|timed out|timeout|NCCL", re.IGNORECASE)
# Schedulers send SIGTERM when they take a machine back, Slurm's --signal=USR1@120 two minutes before the time is up.
_SCHEDULER = (signal.SIGTERM, signal.SIGUSR1)


def number(name: str, default: int) -> int:
    """The environment variable as a number; some launchers set to nothing what they do not mean to set."""
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise ValueError(f"environment variable {name} is {text!r}, want a number; start with torchrun, or unset it")
    return int(text) if text else default


def is_main() -> bool:
    """Whether this process talks to the user."""
    return number("WORLD_SIZE", 1) < 2 or number("RANK", 0) == 0


def place() -> tuple[int, int]:
    """(rank, number of ranks). Raises ValueError for several ranks of which this one cannot tell which it is."""
    rank, world_size = number("RANK", 0), number("WORLD_SIZE", 1)
    if world_size < 2:
        return 0, 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name, "").strip()]
    if missing or rank >= world_size:
        got = f"no {missing[0]}" if missing else f"RANK={rank}"
        raise ValueError(f"got WORLD_SIZE={world_size} with {got} in the environment; start with torchrun, or unset it")
    return rank, world_size


def resolve_device(name: str = "auto") -> torch.device:
    """`auto`: this process's GPU, or the CPU if there is none (said). Raises ValueError for a missing GPU."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {name!r}: want auto, cpu or cuda")
    if name != "cpu" and torch.cuda.is_available():
        index, present = number("LOCAL_RANK", 0), torch.cuda.device_count()
        if index >= present:
            raise ValueError(f"local rank {index} has no GPU, torch sees {present}; start at most {present} per node")
        return torch.device("cuda", index)
    if name == "cuda":
        raise ValueError(
            f"device cuda: torch {torch.__version__} sees no CUDA GPU; use --device cpu or mend the driver"
        )
    if name == "auto":
        log.info("no CUDA GPU visible to torch %s: running on the CPU", torch.__version__)
    return torch.device("cpu")


class Ranks:
    """This process's place among the ranks, and its device; alone, it needs no torch.distributed."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device,
        store: Store | None = None,
        group: ProcessGroup | None = None,
    ):
        """store: where `count` counts. group: in which the ranks meet, instead of the default one."""
        self.rank, self.world_size, self.device = rank, world_size, device
        self._store, self._group, self._counted, self._awaited = store, group, 0, 0

    @property
    def main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def gather(self, value: T, while_waiting: Callable[[], None] = lambda: None) -> list[T]:
        """The picklable `value` of every rank, in rank order, once all have come here."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        # Polled, because Python handles no signal inside a call that waits.
        arrived = dist.barrier(self._group, async_op=True)
        while not arrived.is_completed():
            while_waiting()
            time.sleep(_POLL_SECONDS)
        arrived.wait()
        values = [None] * self.world_size
        dist.all_gather_object(values, value, self._group)
        return values

    def together(self, act: Callable[[], T]) -> list[T]:
        """What `act` returns on every rank, in rank order; a ValueError or OSError of one is raised on all of them."""
        value = error = None
        try:
            value = act()
        except (ValueError, OSError) as problem:
            error = problem
        everyone = self.gather((value, error))
        for _, problem in everyone:
            if problem is not None:
                raise problem
        return [value for value, _ in everyone]

    def gather_to_main(self, value: T) -> list[T] | None:
        """The picklable `value` of every rank, in rank order, on the main rank; None on the others."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.world_size if self.main else None
        dist.gather_object(value, values, group=self._group)
        return values

    def gather_tensors(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start to gather [B, ...] of this rank; the result waits for [world_size * B, ...], without a gradient."""
        tensor = tensor.detach().contiguous()
        if self.world_size == 1:
            return lambda: tensor
        import torch
        import torch.distributed as dist

        shares = [torch.empty_like(tensor) for _ in range(self.world_size)]
        work = dist.all_gather(shares, tensor, self._group, async_op=True)

        def wait() -> torch.Tensor:
            work.wait()
            return torch.cat(shares)

        return wait

    def decide(self, choose: Callable[[], T]) -> T:
        """Return on every rank what `choose` returns on the main one, or raise the ValueError or OSError it raises.

        It may take longer than the ranks wait for each other otherwise.
        """

        def act() -> T | None:
            try:
                return choose() if self.main else None
            finally:
                self._await_main()

        return self.together(act)[0]

    def _await_main(self) -> None:
        """Wait, the other ranks, until the main rank comes here: for as long as it takes, unlike a collective."""
        if self._store is None or self.world_size == 1:
            return
        self._awaited += 1
        here, pause = f"main/{self._awaited}", _POLL_SECONDS
        if self.main:
            self._store.set(here, "")
            self._store.delete_key(f"main/{self._awaited - 1}")  # which all have seen
            return
        while not self._store.check([here]):
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)

    def count(self, number: int) -> int:
        """Add `number` to a count that all ranks share, and return it."""
        if self._store is not None:
            return self._store.add("count", number)
        self._counted += number
        return self._counted

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)


@contextlib.contextmanager
def joined(
    device: str,
    backend: str | None = None,
    timeout: datetime.timedelta = TIMEOUT,
    group_for_one: bool = False,
    remedy: str = "the same command goes on",
) -> Iterator[Ranks]:
    """Join the ranks that torchrun describes, or be the only one.

    device: see `resolve_device`; it becomes torch's current one. backend: of the process group; NCCL for GPUs and gloo
    for CPUs by default. timeout: how long to wait for others. group_for_one: a single rank needs a group, too. remedy:
    what the message says when another rank is lost.

    Raises ValueError where torch cannot do that, RuntimeError when another rank is lost.
    """
    rank, world_size = place()
    here = resolve_device(device)
    import torch

    if here.type == "cuda":
        torch.cuda.set_device(here)
    if world_size == 1 and not group_for_one:
        yield Ranks(rank, world_size, here)
        return
    import torch.distributed as dist

    if not dist.is_available():
        raise ValueError(
            f"torch {torch.__version__} is built without torch.distributed: start one process, no torchrun"
        )
    store = torchrun_store(TIMEOUT) if world_size > 1 else dist.HashStore()
    backend = backend or ("nccl" if here.type == "cuda" else "gloo")
    if not dist.is_initialized():
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        yield Ranks(rank, world_size, here, store)
    except RuntimeError as error:
        if world_size == 1 or not _LOST.search(str(error)):
            raise
        raise RuntimeError(
            f"rank {rank} has lost another of the {world_size} ranks, whose own message says why "
            f"({str(error).splitlines()[0]}); {remedy}"
        ) from error
    # Not after an error: it would wait for what the other ranks have not done.
    dist.destroy_process_group()


def torchrun_store(timeout: datetime.timedelta) -> Store:
    """The store that torchrun describes, apart for each of its restarts. timeout: how long to wait for other ranks.

    torchrun keeps one store over all restarts, and a rank that reads the address of a rank of before waits for it. On
    several nodes the count of restarts may differ between them, so that all share the store.
    """
    import torch.distributed as dist  # some builds of torch have none

    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    one_node = number("LOCAL_WORLD_SIZE", 0) == number("WORLD_SIZE", 1)
    attempt = number("TORCHELASTIC_RESTART_COUNT", 0) if one_node else 0
    return dist.PrefixStore(f"attempt_{attempt}", store)


@contextlib.contextmanager
def _handled(signals: tuple[signal.Signals, ...], handler: Callable) -> Iterator[None]:
    """Outside the main thread, where Python allows no handlers, signals do what they did before."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class StopSignals(contextlib.ExitStack):
    """While entered, SIGTERM and SIGUSR1 set `asked` instead of ending the process.

    Further ones change nothing: a scheduler and torchrun may both send one.
    """

    asked: str | None = None
    """Name of the signal that has come."""

    def __enter__(self) -> StopSignals:
        self.enter_context(_handled(_SCHEDULER, self._ask))
        return super().__enter__()

    def _ask(self, number: int, frame) -> None:
        self.asked = signal.Signals(number).name


class Interrupted(Exception):
    """A signal has ended the command; what was finished is on disk."""

    def __init__(self, number: int, outdir: Path):
        super().__init__(f"{signal.Signals(number).name}: stopped; {outdir} is unfinished, the same command goes on")
        self.code = 128 + number
        """Exit code, as shells give it."""


class _Signal(KeyboardInterrupt):
    pass


@contextlib.contextmanager
def resumable(outdir: Path) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into `Interrupted`; an OSError says that the same command goes on.

    The first signal raises in the body, where Python next gets control; later ones are ignored, but a second Ctrl-C
    does not wait for what is being finished.
    """
    signals = (signal.SIGINT, *_SCHEDULER)

    def stop(number: int, frame) -> None:
        for other in signals:
            signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_IGN)
        raise _Signal(number)

    try:
        with _handled(signals, stop):
            yield
    except _Signal as stopped:
        raise Interrupted(stopped.args[0], outdir) from None
    except OSError as error:
        raise OSError(f"{error}; what is finished stays in {outdir}, and the same command goes on") from error
