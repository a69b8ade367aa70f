"""Finds and loads the compiled C++/CUDA extension, once, when it is first needed."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_extension.abi3.so")
_REBUILD = (
    "`pip install --force-reinstall --no-deps .` in the source tree (with torch, cmake and a C++ compiler installed)"
)


@functools.cache
def extension_status() -> tuple[bool, str]:
    """Load the extension if it is there; returns (available, one line that says what was loaded or why nothing was)."""
    if not _LIBRARY.is_file():
        return False, f"not built: {_LIBRARY} does not exist; to build it, run {_REBUILD}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        reason = str(error).splitlines()[0]
        return False, f"cannot be loaded with torch {torch.__version__}: {reason}; to rebuild it, run {_REBUILD}"
    devices = "CPU and CUDA" if extension_has_cuda() else "CPU only"
    return True, f"{devices}, loaded from {_LIBRARY}"


def extension_has_cuda() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("epg_fast::euler_step_out", "CUDA")


def prefers_extension(tensors: Sequence[torch.Tensor], dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether backend="auto" takes the extension: on a CPU, where it was measured to be faster, if it can.

    Not while torch.compile traces: the plain path is what the compiler fuses.
    """
    if torch.compiler.is_compiling() or not extension_status()[0]:
        return False
    return all(t.device.type == "cpu" and t.dtype in dtypes and t.is_contiguous() for t in tensors)


def require_one_device(op: str, x: torch.Tensor, **lists: Sequence[torch.Tensor]) -> None:
    """Raise ValueError for a tensor that is not on x's device."""
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if tensor.device != x.device:
                raise ValueError(
                    f"{op}: got {name}[{i}] on {tensor.device} and others on {x.device}, wanted one device; "
                    "move it there"
                )


def require_extension(op: str, x: torch.Tensor, remedy: str = "backend='reference'") -> None:
    """Raise ValueError unless the extension can run `op` on x's device, saying how to build it or to do without."""
    available, reason = extension_status()
    if not available:
        raise ValueError(f"{op}: wants the extension, which is {reason}; or use {remedy}")
    if x.is_cuda and not extension_has_cuda():
        raise ValueError(
            f"{op}: got a tensor on {x.device}, but the extension was built without CUDA; put nvcc on PATH and run "
            f"`EPG_BUILD_CUDA=1 pip install --force-reinstall --no-deps .` in the source tree, or use {remedy}"
        )
