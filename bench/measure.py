"""How every benchmark here measures: time, memory, and what the machine can do at most."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Ceilings:
    """products: FLOP/s of a large matrix product in 16 bits; memory: bytes/s of a large copy."""

    products: float
    memory: float

    def floor(self, flops: float, moved: float) -> float:
        """Least seconds of so many operations of matrix products and so many bytes."""
        return max(flops / self.products, moved / self.memory)


def synchronise(device: torch.device) -> None:
    """Wait for what `device` has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(20th percentile, median, 80th percentile), interpolated within the values."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return low, statistics.median(values), high


def rounds(
    call: Callable[[], object],
    device: torch.device,
    seconds: float,
    *,
    calls: int = 1,
    least: int = 3,
    most: int = 200,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds per call in each round of `calls` calls between two synchronisations.

    Rounds are made until `seconds` are over, but `least` of them at least and `most` at most.
    """
    found: list[float] = []
    synchronise(device)
    began = clock()
    while len(found) < least or (clock() - began < seconds and len(found) < most):
        start = clock()
        for _ in range(calls):
            call()
        synchronise(device)
        found.append((clock() - start) / calls)
    return found


def large_product(device: torch.device) -> float:
    """The ceiling of arithmetic: FLOP/s of a large bfloat16 matrix product of random values."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _median_seconds(lambda: a @ b, device)


def large_copy(device: torch.device) -> float:
    """The ceiling of memory: bytes/s of a large copy, reads and writes counted."""
    source = torch.rand((1 << 28) if device.type == "cuda" else (1 << 24), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


def _median_seconds(call: Callable[[], object], device: torch.device, repetitions: int = 20) -> float:
    """Of one call, after three to warm up; on a GPU by its own clock, so that launches do not count."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        return statistics.median(rounds(call, device, 0.0, least=repetitions))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    for mark in marks[:-1]:
        mark.record()
        call()
    marks[-1].record()
    synchronise(device)
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)) / 1e3


def longest_kernels(call: Callable[[], object], device: torch.device, typical: float, most: int = 12) -> dict:
    """Where the time of a call goes: the kernels that take longest (operators on a CPU), and what none of them fills.

    typical: seconds of a call without a profiler. Returns {"milliseconds": of such a call, "idle": of it, "kernels":
    [[name, milliseconds], ...]}. Raises RuntimeError if the profiler sees nothing.
    """
    cuda = device.type == "cuda"
    synchronise(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        call()
        synchronise(device)
    if cuda:
        found = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not _is_range(e)]
        times = alone((e.name, e.time_range.start, e.time_range.end) for e in found)
    else:
        times = {e.key: e.self_cpu_time_total for e in profiler.key_averages()}
    if not any(times.values()):
        raise RuntimeError("the profiler saw no kernel")
    names = sorted(times, key=times.get, reverse=True)[:most]
    busy, whole = sum(times.values()) / 1e3, 1e3 * typical
    kernels = [[name[:160], times[name] / 1e3] for name in names]
    return {"milliseconds": whole, "idle": max(whole - busy, 0.0), "kernels": kernels}


def alone(spans) -> dict[str, float]:
    """Time by name of (name, start, end); what overlaps counts once."""
    times: dict[str, float] = {}
    reached = -float("inf")
    for name, start, end in sorted(spans, key=lambda span: span[1:]):
        times[name] = times.get(name, 0.0) + max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return times


def _is_range(event) -> bool:
    """Annotations that the profiler draws on the GPU's time line above the kernels."""
    return event.is_user_annotation or event.name.startswith(("ProfilerStep", "## Call CompiledFxGraph"))


def start_afresh(device: torch.device) -> int | None:
    """Let go of compiled code and unused memory, and begin to look for the peak.

    Returns the bytes that are still allocated; None on a CPU, whose memory is not looked at.
    """
    torch.compiler.reset()
    gc.collect()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
