"""Averages of the weights in host memory, updated there for every update while the device goes on.

After an update the weights are copied, on a stream of their own, into a staging buffer in pinned memory; a thread of
the host waits for the copy and takes them into the averages, which are at most one update behind. Three things wait:
    the next update on the device  until the weights that it changes are copied;
    the host, before the next copy until the thread is done with the staging buffer, so that averaging that takes
                                   longer than a step of training slows it down;
    a reader of the averages       for `HostAverages.wait`.

With several ranks, whose weights are the same, only the main rank keeps such averages. The arithmetic is torch.lerp's
in float32, as on the device. On a CPU, where only tests need it, the copy is made at once.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from epg_fast.distributed import Ranks

# Averaging reads and writes memory, which more cores do not make faster; others decode images.
_MOST_THREADS = 8


def follower(network: torch.nn.Module, ranks: Ranks, offload: bool) -> torch.nn.Module | None:
    """A copy of `network` to average its weights in: on its device or, with `offload`, in the main rank's host memory.

    None on the other ranks with `offload`.
    """
    if offload and not ranks.main:
        return None
    average = copy.deepcopy(network).eval().requires_grad_(False)
    return average.cpu() if offload else average


class HostAverages:
    """The updates of `averages`, networks in host memory, by a thread; without any, every method does nothing.

    Around each update of the network call `before_update` and `after_update`; call `wait` before the averages are read.

    Args:
        network: what is averaged, on any device.
        averages: networks of the same structure in host memory.
    """

    def __init__(self, network: torch.nn.Module, averages: Sequence[torch.nn.Module]):
        self._averages = [list(average.parameters()) for average in averages]
        if not averages:
            return
        self._weights = list(network.parameters())
        self._device = self._weights[0].device
        cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if cuda else None
        self._copied: torch.cuda.Event | None = None
        self._staging = [torch.empty(p.shape, dtype=p.dtype, pin_memory=cuda) for p in self._weights]
        self._found_inf = torch.zeros((), pin_memory=cuda)
        self._job: Future | None = None
        threads = torch.get_num_threads()
        self._executor = ThreadPoolExecutor(1, "epg-average")
        self._executor.submit(self._start).result()
        # what the thread has set for itself is also what threads begin with
        torch.set_num_threads(threads)

    def before_update(self) -> None:
        """Let the device's next work, which may change the weights, wait until they are copied; the host does not."""
        if self._averages and self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    @torch.no_grad()
    def after_update(self, decays: Sequence[float], found_inf: torch.Tensor) -> None:
        """Take the weights into the averages with these decays, unless found_inf, [] on their device, is 1.

        Returns at once, or when the averaging of the update before is done; raises what that raised.
        """
        if not self._averages:
            return
        self.wait()
        # on the main stream, which may use this tensor's memory again
        self._found_inf.copy_(found_inf, non_blocking=True)
        if self._stream is None:
            torch._foreach_copy_(self._staging, self._weights)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                torch._foreach_copy_(self._staging, self._weights, non_blocking=True)
            self._copied = self._stream.record_event()
        self._job = self._executor.submit(self._average, list(decays), self._copied)

    def wait(self) -> None:
        """Wait until the newest update is in the averages; raises what the thread raised, once."""
        if self._averages and self._job is not None:
            job, self._job = self._job, None
            job.result()

    def _start(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, min(_MOST_THREADS, cores // 2)))
        # the first call in a thread takes over what any thread has set last: now, before the other sets it back
        torch.get_num_threads()
        if self._stream is not None:
            torch.cuda.set_device(self._device)  # threads begin on device 0

    def _average(self, decays: list[float], copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        if self._found_inf > 0:
            return
        for average, decay in zip(self._averages, decays, strict=True):
            torch._foreach_lerp_(average, self._staging, 1 - decay)
