"""What launchers of several operations need, and cases for `python -m bench.resources`."""

import torch

from epg_kernels import AotCase


def unit_stride(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, copied only if the values of a row do not follow each other."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def strides(tensor: torch.Tensor | None, dims: int = 1) -> tuple[int, ...]:
    """Of the first dimensions; 0 for a tensor that is left out."""
    return (0,) * dims if tensor is None else tensor.stride()[:dims]


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def weight_gradient(
    dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """dy^T x in `dtype`: [N, K] from [M, N] and [M, K]. A GPU writes float32 as it accumulates it, without a cast."""
    if dtype == torch.float32 != x.dtype and x.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=dtype, out=out)
    if dtype == x.dtype:
        return torch.mm(dy.t(), x, out=out)
    product = torch.mm(dy.t(), x)
    return product.to(dtype) if out is None else out.copy_(product)


def matmul_precision() -> str:
    """How float32 operands are multiplied: as PyTorch's own products do."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


_INTEGERS = ("tokens", "chunks", "rows", "heads", "count", "M")


def aot_case(kernel, pointers: dict[str, str], constexprs: dict, shape: str, dtype: str, **options) -> AotCase:
    """A case in which pointers and strides are multiples of 16.

    pointers: what they point to, by name; also a descriptor's type, and that of a scalar, as "=fp32". Of the other
    run-time arguments strides and counts are 32-bit integers, the rest is left out: None. constexprs may name more than
    the kernel takes. options: further fields of the case.
    """
    names = kernel.arg_names
    constexprs = {name: value for name, value in constexprs.items() if name in names}
    types = {name: kind.lstrip("=") if kind[0] == "=" or "<" in kind else f"*{kind}" for name, kind in pointers.items()}
    others = [name for name in names if name not in types | constexprs]
    integers = [name for name in others if name.startswith("stride") or name in _INTEGERS]
    aligned = [name for name in names if types.get(name, "").startswith("*") or name.startswith("stride")]
    options = {"num_warps": 4, "divisible_by_16": tuple(aligned)} | options
    return AotCase(
        kernel=kernel,
        signature=types | dict.fromkeys(integers, "i32"),
        constexprs=constexprs | {name: None for name in others if name not in integers},
        shape=shape,
        dtype=dtype,
        **options,
    )
