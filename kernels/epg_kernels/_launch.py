"""What launchers of several operations need."""

import torch

WITHOUT_GPU = (9, 0)
"""The compute capability of a CPU: what the interpreter computes as, and what bench.resources sets."""


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else WITHOUT_GPU


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
