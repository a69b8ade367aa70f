"""Where and in which precision to compute: choices that training, sampling and evaluation share."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import Store

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


def torchrun_store(timeout: datetime.timedelta) -> Store:
    """The store that torchrun describes, apart for each of its restarts. timeout: how long to wait for other ranks.

    torchrun keeps one store over all restarts, and a rank that reads the address of a rank of before waits for it. On
    several nodes the count of restarts may differ between them, so that all share the store.
    """
    import torch.distributed as dist  # some builds of torch have none

    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"
    return dist.PrefixStore(f"attempt_{attempt}", store)
