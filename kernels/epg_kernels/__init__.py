"""Triton kernels and their launchers, one file per operation, with the same stem as in `epg_fast.ops`.

Importing this package does not import Triton; importing one of its modules does. A kernel file offers `aot_cases()`, so
that `python -m bench.resources` can compile each kernel in each configuration of its table without a GPU.
"""

import os
from dataclasses import dataclass, field
from typing import Any

# Triton 3.9 warns that from 3.10 on it fuses a * b + c only where asked to. These kernels are to stay as they are.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@dataclass(frozen=True)
class AotCase:
    """One kernel in one configuration, described well enough to be compiled without a GPU."""

    kernel: Any  # a triton.JITFunction
    signature: dict[str, str]  # Triton's type of every run-time argument, in the kernel's order
    constexprs: dict[str, Any]
    num_warps: int
    shape: str  # what distinguishes the case in the table, e.g. "D=1584"
    dtype: str
    num_stages: int = 3
    gemm: bool = False  # a kernel that must use wgmma on sm_90
    vectorized: bool = True  # a kernel that must access global memory 16 bytes at a time, or through TMA, on sm_90
    archs: tuple[int, ...] = (80, 90, 100)  # where the kernel exists
    divisible_by_16: tuple[str, ...] = field(default=())  # arguments that the launcher's callers align in practice
