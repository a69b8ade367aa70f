"""Finds and loads the compiled C++/CUDA extension, once, when it is first needed."""

import functools
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
    devices += ", with CUTLASS" if extension_has_gemms() else ""
    return True, f"{devices}, loaded from {_LIBRARY}"


def extension_has_cuda() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("epg_fast::euler_step_out", "CUDA")


def require_extension(op: str, x: torch.Tensor) -> None:
    """Raise ValueError with the remedy unless the extension can run `op` on x's device."""
    available, reason = extension_status()
    if not available:
        raise ValueError(f"{op}: got backend='extension', but the extension is {reason}; or use backend='reference'")
    if x.is_cuda and not extension_has_cuda():
        raise ValueError(
            f"{op}: got a tensor on {x.device}, but the extension was built without CUDA; put nvcc on PATH and run "
            "`EPG_BUILD_CUDA=1 pip install --force-reinstall --no-deps .` in the source tree, or use "
            "backend='reference'"
        )


def extension_has_gemms() -> bool:
    """Whether the loaded extension holds the CUTLASS matrix products, which are for compute capability 9.0."""
    return torch._C._dispatch_has_kernel("epg_fast::linear_gelu_out")


@torch.compiler.assume_constant_result
def require_gemms(op: str, device: torch.device) -> None:
    """Raise ValueError with the remedy unless the extension's matrix products can run on the device."""
    available, reason = extension_status()
    if not available:
        raise ValueError(f"{op}: got backend='cuda', but the extension is {reason}; or use backend='reference'")
    if not extension_has_gemms():
        raise ValueError(
            f"{op}: got backend='cuda', but the extension was built without CUTLASS, without nvcc or not for sm_90a; "
            "put nvcc on PATH and run `pip install --no-deps nvidia-cutlass` and `EPG_BUILD_CUDA=1 "
            "TORCH_CUDA_ARCH_LIST=9.0a pip install --force-reinstall --no-deps .` in the source tree, or use "
            "backend='reference'"
        )
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else device
        raise ValueError(
            f"{op}: got backend='cuda' with tensors on {found}, wanted a GPU of compute capability 9.0 (H100, H200); "
            "use backend='reference'"
        )
