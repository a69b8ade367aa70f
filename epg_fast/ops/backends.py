"""Which implementation an operation runs, and what to do when the one asked for cannot run."""

import importlib.util
import os
from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MAX_GRID = 65_535
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def check_backend(op: str, backend: str, wanted: tuple[str, ...]) -> None:
    if backend not in wanted:
        raise ValueError(f"{op}: got backend={backend!r}, wanted one of {', '.join(wanted)}")


def require_installed_triton(op: str) -> None:
    if not _HAS_TRITON:
        raise ValueError(
            f"{op}: got a backend with Triton's kernels, but Triton is not installed; run `pip install 'triton>=3.6'` "
            "or use backend='plain'"
        )


def interpreting() -> bool:
    """True when Triton kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require_triton(
    op: str,
    *others: torch.Tensor | None,
    backend: str = "triton",
    batched: bool = False,
    fp8: bool = False,
    **floats: torch.Tensor | None,
) -> None:
    """Raise ValueError unless Triton can run here, on all tensors together.

    floats: those whose dtype has to be one of `FLOATS`. batched: the images of the first tensor are a launch's second
    dimension. fp8: the kernel writes float8_e4m3fn.
    """
    require_installed_triton(op)
    x, *rest = given = [tensor for tensor in (*floats.values(), *others) if tensor is not None]
    if not (x.is_cuda or interpreting()):
        raise ValueError(
            f"{op}: got backend='triton' with a tensor on {x.device}, wanted one on a CUDA device; move it there, "
            "use backend='plain', or set TRITON_INTERPRET=1 before Python starts, for Triton's interpreter"
        )
    for tensor in rest:
        if tensor.device != x.device:
            raise ValueError(f"{op}: got tensors on {x.device} and {tensor.device}, wanted one device; move them there")
    for tensor in given:
        if tensor.numel() == 0:
            raise ValueError(
                f"{op}: got an empty tensor of shape {tuple(tensor.shape)}, wanted at least one value for "
                "backend='triton'; leave out the call or use backend='plain'"
            )
    refuse_transforms(op)
    require_dtypes(op, FLOATS, backend, **floats)
    if batched:
        require_at_most(op, _MAX_GRID, "a batch of ", x.shape[0])
    if fp8 and x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        raise ValueError(
            f"{op}: got {torch.cuda.get_device_name(x.device)}, wanted a GPU with FP8 (compute capability 8.9 or more) "
            "for backend='triton'; use backend='plain'"
        )


def refuse_transforms(op: str) -> None:
    """Raise ValueError inside torch.func.jvp and the like, which would take the kernel's derivative to be zero."""
    if not torch.compiler.is_compiling() and _transformed():
        raise ValueError(
            f"{op}: got a tensor inside torch.func.jvp or torch.func.grad, which would not see the kernel's "
            "derivative; use backend='plain'"
        )


def _transformed() -> bool:
    """Whether a transform of torch.func is active for which a custom operator has no rule."""
    functorch = torch._C._functorch
    derivatives = (functorch.TransformType.Jvp, functorch.TransformType.Grad)
    return any(level.key() in derivatives for level in functorch.get_interpreter_stack() or ())


def require_at_most(op: str, limit: int, what: str, size: int) -> None:
    """Raise ValueError for a size that is more than the Triton kernels hold; what: "a width of ", say."""
    if size > limit:
        raise ValueError(f"{op}: got {what}{size}, wanted at most {limit} for backend='triton'; use backend='plain'")


def require_dtypes(
    op: str, allowed: tuple[torch.dtype, ...], backend: str = "triton", **tensors: torch.Tensor | None
) -> None:
    """Raise ValueError for a tensor whose dtype the kernel does not compute in."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            wanted = ", ".join(str(dtype) for dtype in allowed)
            raise ValueError(
                f"{op}: got {name} in {tensor.dtype}, wanted one of {wanted} for backend={backend!r}; convert it or "
                "use backend='plain'"
            )


def require_gemm_operands(
    op: str, width: int, operands: dict[str, torch.Tensor], others: dict[str, torch.Tensor]
) -> None:
    """Raise ValueError for what the matrix products of backend "cuda" cannot read or write in rows of 16 bytes.

    width: of the result, which has 16 bits per value or more. operands: contiguous, by name; the others only have to be
    on their device. Where torch.compile traces, no address is known: the extension itself checks it.
    """
    refuse_transforms(op)
    device = next(iter(operands.values())).device
    for name, tensor in (operands | others).items():
        wanted = None
        if tensor.device != device:
            wanted = f"it on {device}; move it there"
        elif tensor.numel() == 0:
            wanted = "at least one value; leave out the call"
        elif name in operands:
            wanted = _wanted_of_operand(tensor)
        if wanted is not None:
            raise ValueError(
                f"{op}: got {name} of shape {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}, "
                f"wanted {wanted} or use backend='plain'"
            )
    if width % 8:
        raise ValueError(
            f"{op}: got a weight for {width} outputs, wanted a multiple of 8 for backend='cuda'; pad it or use "
            "backend='plain'"
        )


def _wanted_of_operand(tensor: torch.Tensor) -> str | None:
    multiple = 16 // tensor.element_size()
    if not tensor.is_contiguous():
        return "it contiguous for backend='cuda'; call .contiguous()"
    if tensor.shape[-1] % multiple:
        return f"a last dimension that is a multiple of {multiple} for backend='cuda'; pad it"
    if not torch.compiler.is_compiling() and tensor.data_ptr() % 16:
        return "it to start at a multiple of 16 bytes for backend='cuda'; call .clone()"
    return None


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse_gradient(op: str, *tensors: torch.Tensor | None) -> None:
    if needs_gradient(*tensors):
        raise ValueError(f"{op}: got a tensor that requires a gradient, which {op} has not; use torch.no_grad()")


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """What norms and quantisation of x compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def product_operand(
    op: str, weight: torch.Tensor | Sequence[torch.Tensor], operand: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What a product with `weight` reads: `operand`, a copy of it in `dtype`, or without one it is cast.

    weight: one, or several one below the other. Raises ValueError for an operand of another shape or dtype.
    """
    weights = [weight] if isinstance(weight, torch.Tensor) else weight
    if operand is None:
        casts = [weight.detach().to(dtype) for weight in weights]
        return casts[0] if len(casts) == 1 else torch.cat(casts)
    shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    if operand.shape != shape or operand.dtype != dtype:
        raise ValueError(
            f"{op}: got an operand of shape {tuple(operand.shape)} in {operand.dtype} for a weight of shape {shape}, "
            f"wanted a copy of the weight in {dtype}; leave it out"
        )
    return operand


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products with x, None outside autocast and for float64, which it leaves.

    Custom operators are not autocast-aware: an operation with a matrix product casts its operands to this itself.
    """
    # PyTorch refuses to say whether autocast is on for meta tensors, which have none
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)
