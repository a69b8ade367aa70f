"""Batches on the device before they are asked for, by one background thread."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator

import torch

Batch = dict[str, torch.Tensor]

# Seconds that close() gives a batch being drawn to become complete before the loader is closed under it.
_GRACE = 2.0


class Prefetcher(Iterator[Batch], contextlib.AbstractContextManager):
    """The batches of `loader`, in its order and bit for bit, drawn and copied to `device` ahead of time.

    One daemon thread draws; at most `depth` batches are held. On CUDA the thread copies through pinned memory on a
    stream of its own, which is also the current stream while the loader is called: what the loader puts on the device
    itself passes through and is ordered behind that stream. The consumer's current stream waits for the batch it gets,
    and memory from torch's allocator is not used again before that stream is done with it; memory of another library
    has no such protection, so that a loader must return copies of it. On the CPU nothing is copied.

    The thread starts with the first batch, while the consumer waits for it, so that a loader which forks processes does
    so while nothing else runs. An exception of the loader is raised, with its traceback, where its batch would have
    come, after the batches before it, and again by every later call.

    Attributes:
        waited: seconds that the consumer has waited for batches in total.

    Args:
        loader: see `epg_fast.data`; `close` closes it.
        device: where the batches go.
        depth: batches to hold, at least 1.
        on_stall: called with the seconds waited so far, in the waiting thread, every `patience` seconds of one wait.
        patience: seconds.

    Raises ValueError for a depth below 1.
    """

    def __init__(
        self,
        loader,
        device: torch.device | str,
        depth: int = 2,
        on_stall: Callable[[float], None] = lambda seconds: None,
        patience: float = 5.0,
    ):
        if depth < 1:
            raise ValueError(f"depth: got {depth}, wanted at least 1")
        self.waited = 0.0
        self._loader, self._batches, self._device = loader, iter(loader), torch.device(device)
        self._on_stall, self._patience = on_stall, patience
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._room = threading.Semaphore(depth)
        # batches with the event after which they are complete on the device; an error; None once closed
        self._ready: queue.SimpleQueue[tuple[Batch, torch.cuda.Event | None] | BaseException | None]
        self._ready = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("this prefetcher is closed; make a new one with a loader at start=iteration to go on")
        if self._error is not None:
            raise self._error
        item = self._take()
        if item is None:
            raise RuntimeError("this prefetcher was closed while it was waited for")
        if isinstance(item, BaseException):
            self._error = item
            raise item
        self._room.release()
        batch, copied = item
        if copied is not None:
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_event(copied)
            for tensor in batch.values():
                # the allocator knows the copy stream alone, and would reuse the memory while the consumer still reads
                tensor.record_stream(consumer)
        return batch

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and close the loader, even one that is blocked; closing twice does nothing.

        A thread that is still blocked seconds after its loader was closed is left behind; it draws nothing more.
        """
        self._closed = True
        self._room.release()
        self._ready.put(None)
        thread, self._thread = self._thread, None
        try:
            if thread is not None:
                thread.join(_GRACE)
        finally:
            self._loader.close()
        if thread is not None:
            thread.join(_GRACE)

    def _take(self):
        started = time.perf_counter()
        if self._thread is None:
            self._start()
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    return self._ready.get(timeout=self._patience)
                self._on_stall(time.perf_counter() - started)
        finally:
            self.waited += time.perf_counter() - started

    def _start(self) -> None:
        threads, started = torch.get_num_threads(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="epg-prefetch", daemon=True)
        self._thread.start()
        started.wait()
        # what the thread has set for itself is also what threads begin with
        torch.set_num_threads(threads)

    def _run(self, started: threading.Event) -> None:
        # a second team of OpenMP threads would fight with the training's for the cores
        torch.set_num_threads(1)
        # the first call in a thread takes over what any thread has set last: now, before the other sets it back
        torch.get_num_threads()
        started.set()
        try:
            if self._stream is not None:
                torch.cuda.set_device(self._stream.device)  # threads begin on device 0
            while self._room.acquire() and not self._closed:
                self._ready.put(self._draw())
        except BaseException as error:  # StopIteration included: whatever it is, it is the consumer's
            self._ready.put(error)

    def _draw(self) -> tuple[Batch, torch.cuda.Event | None]:
        """Return the next batch, on the device, and the event after which it is complete there."""
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            batch = next(self._batches)
            if self._stream is None:
                return batch, None
            # pinned memory is not handed out again before the copy is over: its allocator sees to that
            pinned = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in batch.items()}
            batch = {name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}
            return batch, self._stream.record_event()
