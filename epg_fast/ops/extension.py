"""Finds and loads the compiled C++/CUDA extension, once, when it is first needed."""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

OPERATORS = (
    "augment_view_out",
    "build_info",
    "euler_step_",
    "euler_step_out",
    "fused_adamw_ema_",
    "global_norm_out",
    "heun_step_",
    "heun_step_out",
    "resized_crop_out",
)
"""What this version of the package calls in torch.ops.epg_fast."""
INTERFACE = "2"
"""What those are and take, as kernels/csrc/register.cpp counts its changes."""

# EPG_EXTENSION chooses another build of the library, such as one with AddressSanitizer.
_CHOSEN = os.environ.get("EPG_EXTENSION")
_LIBRARY = Path(_CHOSEN) if _CHOSEN else Path(__file__).with_name("_extension.abi3.so")
_SOURCE_TREE = Path(__file__).resolve().parents[2]
_IN_PLACE = (_SOURCE_TREE / "setup.py").is_file()


def _rebuild(settings: str) -> str:
    """What to run to build the extension with these environment variables; it ends with an error where it cannot.

    Without build isolation, which may hide torch.
    """
    place = f"-e {_SOURCE_TREE}`" if _IN_PLACE else "--force-reinstall .` in the source tree"
    return (
        "run `pip install 'setuptools>=77' 'cmake>=3.24'` and "
        f"`{settings} pip install --no-build-isolation --no-deps {place}"
    )


_REBUILD = _rebuild("EPG_BUILD_EXTENSION=1")
_REMEDY = "correct EPG_EXTENSION, which chose it, or unset it" if _CHOSEN else f"to rebuild it, {_REBUILD}"


@functools.cache
def extension_status() -> tuple[bool, str]:
    """Load the extension if it is there; returns (available, one line that says what was loaded or why nothing was)."""
    if not _LIBRARY.is_file():
        if _CHOSEN:
            return False, f"not found: EPG_EXTENSION is {_CHOSEN}, which is not a file; correct it or unset it"
        return False, f"not built: {_LIBRARY} does not exist; to build it, {_REBUILD}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0]  # torch's own error names the file only
        return False, f"cannot be loaded with torch {torch.__version__}: {reason}; {_REMEDY}"
    found = _build_info().get("interface", "none")
    if found != INTERFACE:
        return False, f"from another version of epg_fast: {_LIBRARY} has interface {found}, not {INTERFACE}; {_REMEDY}"
    _register_fakes()
    return True, f"{_description()}, loaded from {_LIBRARY}"


@functools.cache
def _register_fakes() -> None:
    """Of the operators above, which write to tensors that they are given and return nothing."""
    for name in set(OPERATORS) - {"build_info"}:
        torch.library.register_fake(f"epg_fast::{name}")(lambda *arguments, **named: None)


def _build_info() -> dict[str, str]:
    if not hasattr(torch.ops.epg_fast, "build_info"):
        return {}
    return dict(item.split("=", 1) for item in torch.ops.epg_fast.build_info().split(";"))


def _description() -> str:
    info = _build_info()
    if not extension_has_cuda():
        return f"CPU only, {info['compiler']}"
    gemms = "with" if extension_has_gemms() else "without"
    architectures = info["cuda_architectures"]
    return f"CPU and CUDA for {architectures}, {gemms} CUTLASS, {info['compiler']}, nvcc {info['nvcc']}"


def extension_code() -> str:
    """What the extension has code for, in few words: "none", "cpu", or "cuda 9.0a" and whether with CUTLASS."""
    if not _is_available():
        return "none"
    if not extension_has_cuda():
        return "cpu"
    return f"cuda {_build_info()['cuda_architectures']}{' with CUTLASS' if extension_has_gemms() else ''}"


def extension_has_cuda() -> bool:
    """Whether the loaded extension was built with CUDA."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("epg_fast::euler_step_out", "CUDA")


def extension_has_gemms() -> bool:
    """Whether the loaded extension holds the CUTLASS matrix products, which are for compute capability 9.0."""
    return torch._C._dispatch_has_kernel("epg_fast::linear_gelu_out")


def extension_takes(images: Sequence[torch.Tensor]) -> bool:
    """Whether the extension is there, and the images, of 8 bits, are on a CPU and contiguous."""
    return _is_available() and all(image.device.type == "cpu" and image.is_contiguous() for image in images)


@torch.compiler.assume_constant_result
def _is_available() -> bool:
    return extension_status()[0]


def has_code_for(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs what was built for e.g. "8.0 9.0a 10.0+PTX".

    Code for 8.0 runs on 8.x; code for 9.0a on 9.0 alone; with +PTX the driver compiles for every later capability.
    """
    for major, minor, exact, ptx in re.findall(r"(\d+)\.(\d)(a?)(\+PTX)?", architectures):
        built = (int(major), int(minor))
        later = not exact and built < capability and (ptx or built[0] == capability[0])
        if built == capability or later:
            return True
    return False


@functools.cache
def _lacks_code_for(device: torch.device) -> str | None:
    """Why the loaded extension cannot run on this CUDA device, None when it can."""
    if not extension_has_cuda():
        return f"the extension was built without CUDA; put nvcc on PATH and {_rebuild('EPG_BUILD_CUDA=1')}"
    capability = torch.cuda.get_device_capability(device)
    architectures, number = _build_info()["cuda_architectures"], ".".join(map(str, capability))
    if has_code_for(architectures, capability):
        return None
    return (
        f"the extension was built for CUDA architectures {architectures}, not for this GPU's {number}; "
        f"{_rebuild(f'TORCH_CUDA_ARCH_LIST={number} EPG_BUILD_CUDA=1')}"
    )


@torch.compiler.assume_constant_result
def require_extension(op: str, x: torch.Tensor, remedy: str = "backend='plain'") -> None:
    """Raise ValueError unless the extension can run `op` on x's device, saying how to build it or to do without."""
    available, reason = extension_status()
    if not available:
        raise ValueError(f"{op}: wants the extension, which is {reason}; or use {remedy}")
    reason = _lacks_code_for(x.device) if x.is_cuda else None
    if reason:
        raise ValueError(f"{op}: got a tensor on {x.device}, but {reason}, or use {remedy}")


def gpus_without_code() -> list[str]:
    """For each visible GPU on which the available extension cannot run, the reason and the remedy."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [f"{device}: {reason}" for device in devices if (reason := _lacks_code_for(device))]


@torch.compiler.assume_constant_result
def require_gemms(op: str, device: torch.device) -> None:
    """Raise ValueError with the remedy unless the extension's matrix products can run on the device."""
    available, reason = extension_status()
    if not available:
        raise ValueError(f"{op}: got backend='cuda', but the extension is {reason}; or use backend='plain'")
    if not extension_has_gemms():
        raise ValueError(
            f"{op}: got backend='cuda', but the extension was built without CUTLASS, without nvcc or not for sm_90a; "
            "put nvcc on PATH, run `pip install --no-deps nvidia-cutlass`, then "
            f"{_rebuild('EPG_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0a')}, or use backend='plain'"
        )
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else device
        raise ValueError(
            f"{op}: got backend='cuda' with tensors on {found}, wanted a GPU of compute capability 9.0 (H100, H200); "
            "use backend='plain'"
        )


def require_one_device(op: str, x: torch.Tensor, **lists: Sequence[torch.Tensor]) -> None:
    """Raise ValueError for a tensor that is not on x's device."""
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if tensor.device != x.device:
                raise ValueError(
                    f"{op}: got {name}[{i}] on {tensor.device} and others on {x.device}, wanted one device; "
                    "move it there"
                )
