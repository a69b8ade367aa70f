"""Where and in which precision to compute: choices that training, sampling and evaluation share."""

from __future__ import annotations

import contextlib
import logging
import os

import torch

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
log = logging.getLogger("epg_fast")


def resolve_device(name: str = "auto") -> torch.device:
    """`auto`: this process's GPU, or the CPU if there is none (said). Raises ValueError for a missing GPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {name!r}: want auto, cpu or cuda")
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if name == "cuda":
        raise ValueError(
            f"device cuda: torch {torch.__version__} sees no CUDA GPU; use --device cpu or mend the driver"
        )
    if name == "auto":
        log.info("no CUDA GPU visible to torch %s: running on the CPU", torch.__version__)
    return torch.device("cpu")


def autocast(device: torch.device, precision: str, cache: bool = True) -> contextlib.AbstractContextManager:
    """Autocast context of `bf16` or `fp16`; nothing for `fp32`. cache: keep 16-bit copies of weights for its time."""
    if precision == "fp32":
        return contextlib.nullcontext()
    if precision not in _AUTOCAST:
        raise ValueError(f"precision {precision!r}: want fp32, bf16 or fp16")
    return torch.autocast(device.type, dtype=_AUTOCAST[precision], cache_enabled=cache)
