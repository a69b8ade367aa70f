"""What launchers of several operations need: strides, and the precision of float32 products."""

import torch


def unit_stride(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, copied only if the values of a row do not follow each other."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def stride(tensor: torch.Tensor | None, dim: int) -> int:
    """0 for a tensor that is left out."""
    return 0 if tensor is None else tensor.stride(dim)


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
