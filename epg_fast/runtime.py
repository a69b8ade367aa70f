"""In which precision and with how many threads to compute: choices that training, sampling and evaluation share."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import torch

# Before any caller has chosen another number.
_DEFAULT_THREADS = torch.get_num_threads()
_SMALL_NETWORK = 4_000_000  # parameters
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions in which autocast computes."""
log = logging.getLogger("epg_fast")


def is_small(network: torch.nn.Module) -> bool:
    """Whether threads have so little to do that they mostly wait for each other."""
    return sum(p.numel() for p in network.parameters()) <= _SMALL_NETWORK


@contextlib.contextmanager
def suitable_threads(network: torch.nn.Module, planned: int | None = None) -> Iterator[None]:
    """Inside, one thread computes a small network on a CPU, unless the user has chosen a number of threads.

    planned: the number of a plan, which counts instead of that rule.

    Threads spin until the last one is done with an operation. Where operations take microseconds and another process
    needs a core, two are several times slower than one; on two idle cores they are only 1.3 times as fast.
    """
    threads = torch.get_num_threads()
    chosen = threads != _DEFAULT_THREADS or os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS")
    number = planned or (1 if is_small(network) else threads)
    elsewhere = next(network.parameters()).device.type != "cpu"
    del network  # whose memory the caller may need before the end
    if elsewhere or number == threads or chosen:
        yield
        return
    if planned is None:
        log.info("one thread, as the network is small; on idle cores, OMP_NUM_THREADS=%d is faster", threads)
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def autocast(device: torch.device, precision: str, cache: bool = True) -> contextlib.AbstractContextManager:
    """Autocast context of `bf16` or `fp16`; nothing for `fp32`. cache: keep 16-bit copies of weights for its time."""
    if precision == "fp32":
        return contextlib.nullcontext()
    if precision not in AUTOCAST:
        raise ValueError(f"precision {precision!r}: want fp32, bf16 or fp16")
    return torch.autocast(device.type, dtype=AUTOCAST[precision], cache_enabled=cache)


@contextlib.contextmanager
def float32_products(tf32: bool = False) -> Iterator[None]:
    """Inside, float32 matrix products and convolutions on a GPU are rounded to TF32, or to nothing.

    What was set before comes back, by whichever of PyTorch's two interfaces it was set: the older one refuses to tell
    what the newer one has set.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    older_matmul = older_cudnn = None
    with contextlib.suppress(RuntimeError):
        older_matmul = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        older_cudnn = cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        cudnn.allow_tf32 = tf32
        yield
    finally:
        if older_matmul is not None:
            torch.set_float32_matmul_precision(older_matmul)
        if older_cudnn is not None:
            cudnn.allow_tf32 = older_cudnn
        matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before
