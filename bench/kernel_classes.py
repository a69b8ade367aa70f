"""Where the time of a call goes: matrix products, attention, element-wise work, optimiser, copies, and gaps.

On a GPU the profiler's kernels, which CUDA graphs launch too, are sorted by their names, and gaps are what they leave
of the time of a call that nobody profiles. On a CPU operators take the kernels' place, by the time they spend in
themselves, and gaps are what they leave of the profiled call: Python and the profiler.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.measure import synchronise

GEMM, ATTENTION, ELEMENTWISE = "matrix products", "attention", "normalise, element-wise"
OPTIMISER, COPIES, OTHER, GAPS = "optimiser", "copies", "other", "gaps"
CLASSES = (GEMM, ATTENTION, ELEMENTWISE, OPTIMISER, COPIES, OTHER, GAPS)

# The first that is found in a name decides. Compilers name a kernel after all that is fused in it; attention kernels
# are also called CUTLASS's, those of optimisers also element-wise.
_PATTERNS = (
    (GEMM, r"^triton_(tem|mm)"),
    (ELEMENTWISE, r"^triton_[a-z]+_fused|cpp_fused"),
    (ATTENTION, r"attention|attn|flash|fmha|sdpa|softmax"),
    (OPTIMISER, r"multi_tensor|adam|global_norm|_foreach|lpnorm|lerp|clip_grad"),
    (COPIES, r"^memcpy|^memset|catarray|direct_copy|::(copy_|cat|clone|contiguous|_to_copy|resize_|empty\w*)$"),
    (GEMM, r"gemm|gemv|cutlass|cublas|nvjet|wgmma|xmma|splitk|conv(?!ert)|scaled_mm|device_kernel|dot_kernel"),
    (
        GEMM,
        r"mkldnn_linear|::(addmm|mm|bmm|baddbmm|linear|matmul|dot|vdot)$|epg_fast::(linear|skip_linear|patch_embed)",
    ),
    (ELEMENTWISE, r"column_sums"),
    (GEMM, r"linear\w*_kernel"),
    (GEMM, r"patch_embed_(fwd|bwd_weight|bwd_image)_kernel"),
    (ELEMENTWISE, r"elementwise|reduce|norm|gelu|modulate|distribution|random|index|scatter|gather|embedding|patch_"),
    (ELEMENTWISE, r"heun_step|euler_step|quantize_rows|welford|fill|silu|_backward\d*$"),
    (ELEMENTWISE, r"::(add|sub|mul|div|sum|mean|neg|exp|log|sin|cos|sqrt|rsqrt|pow|clamp|where|sigmoid|relu)_?\b"),
    (ELEMENTWISE, r"::(normal_|uniform_|rand|zero_|ne|eq|lt|gt|le|ge|abs|arange|maximum|minimum|argmin|logsumexp)\b"),
)
_COMPILED = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in _PATTERNS)


def kernel_class(name: str) -> str:
    """Class of a kernel, or of an operator of a CPU, by its name."""
    return next((found for found, pattern in _COMPILED if pattern.search(name)), OTHER)


@dataclass(frozen=True)
class Split:
    """Milliseconds of a call by class, and the names that took most."""

    milliseconds: dict[str, float]
    longest: list[tuple[str, str, float]]
    """(name, its class, milliseconds), the longest first."""

    def as_json(self) -> dict:
        return {"milliseconds": self.milliseconds, "longest": [list(row) for row in self.longest]}


def split(call: Callable[[], object], device: torch.device, typical: float) -> Split:
    """Profile `call`, which takes `typical` seconds without a profiler. Raises RuntimeError if nothing is seen."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronise(device)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        call()
        synchronise(device)
        profiled = time.perf_counter() - start
    if cuda:
        found = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not _is_range(e)]
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in found]
        return of_spans(spans, 1e3 * typical)
    times = {e.key: e.self_cpu_time_total / 1e3 for e in profiler.key_averages()}
    return of_times(times, 1e3 * profiled)


def of_spans(spans: Iterable[tuple[str, float, float]], wall: float) -> Split:
    """(name, start, end) of kernels in microseconds, of a call of `wall` milliseconds; what overlaps counts once."""
    times: dict[str, float] = {}
    reached = -float("inf")
    for name, start, end in sorted(spans, key=lambda span: span[1:]):
        alone = end - max(start, reached)
        times[name] = times.get(name, 0.0) + max(alone, 0.0) / 1e3
        reached = max(reached, end)
    return of_times(times, wall)


def of_times(times: dict[str, float], wall: float) -> Split:
    """Milliseconds by name, of a call of `wall` milliseconds. Raises RuntimeError for none."""
    busy = sum(times.values())
    if not busy:
        raise RuntimeError("the profiler saw no kernel")
    milliseconds = dict.fromkeys(CLASSES, 0.0)
    for name, taken in times.items():
        milliseconds[kernel_class(name)] += taken
    milliseconds[GAPS] = max(wall - busy, 0.0)
    longest = sorted(times.items(), key=lambda item: -item[1])[:20]
    return Split(milliseconds, [(name[:160], kernel_class(name), taken) for name, taken in longest])


def _is_range(event) -> bool:
    """Annotations that the profiler draws on the GPU's time line above the kernels."""
    return event.is_user_annotation or event.name.startswith(("ProfilerStep", "## Call CompiledFxGraph"))
