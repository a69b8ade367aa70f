"""Which implementation an operation runs, and what to do when the one asked for cannot run."""

import importlib.util
import os

import torch

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def check_backend(op: str, backend: str, wanted: tuple[str, ...]) -> None:
    if backend not in wanted:
        raise ValueError(f"{op}: got backend={backend!r}, wanted one of {', '.join(wanted)}")


def interpreting() -> bool:
    """True when Triton kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require_triton(op: str, x: torch.Tensor) -> None:
    if not _HAS_TRITON:
        raise ValueError(
            f"{op}: got backend='triton', but Triton is not installed; run `pip install 'triton>=3.6'` "
            "or use backend='reference'"
        )
    if not (x.is_cuda or interpreting()):
        raise ValueError(
            f"{op}: got backend='triton' with a tensor on {x.device}, wanted one on a CUDA device; move it there, "
            "use backend='reference', or set TRITON_INTERPRET=1 before Python starts, for Triton's interpreter"
        )


def require_dtypes(op: str, allowed: tuple[torch.dtype, ...], **tensors: torch.Tensor | None) -> None:
    """Raise ValueError for a tensor whose dtype the Triton kernel does not compute in."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            wanted = ", ".join(str(dtype) for dtype in allowed)
            raise ValueError(
                f"{op}: got {name} in {tensor.dtype}, wanted one of {wanted} for backend='triton'; convert it or use "
                "backend='reference'"
            )


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products on x's device, None outside autocast.

    Custom operators are not autocast-aware: an operation with a matrix product casts its operands to this itself.
    """
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
