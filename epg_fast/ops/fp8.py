"""What the operations on float8_e4m3fn share: the sides they take, and which products a device has."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def fits(weight: torch.Tensor) -> bool:
    """Whether weight [N, K] has sides that FP8 products take, forward and backward: multiples of 16."""
    return weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0


def product_backend(device: torch.device) -> str:
    """The backend of `linear_fp8` that a device has, a GPU being one without a `product_refusal`."""
    return "scaled_mm" if device.type == "cuda" or cpu_has_row_scales() else "plain"


def require_row_scales(op: str, device: torch.device) -> None:
    """Raise ValueError on a CPU whose PyTorch multiplies FP8 operands with one scale per tensor only."""
    if device.type == "cpu" and not torch.compiler.is_compiling() and not cpu_has_row_scales():
        raise ValueError(
            f"{op}: got torch {torch.__version__}, whose FP8 product on a CPU takes one scale per tensor, wanted one "
            "that takes a scale per row (2.13 does); use backend='plain'"
        )


def scaled_mm(a, a_scale, b, b_scale, bias, dtype: torch.dtype, fast: bool = False) -> torch.Tensor:
    """(a * a_scale) @ (b * b_scale)^T + bias [M, N] in `dtype`, of a [M, K] and b [N, K] in float8_e4m3fn.

    a_scale: M values, b_scale: N. fast: the tensor cores keep the sum, which drops bits of it.
    """
    scales = {"scale_a": a_scale.reshape(-1, 1), "scale_b": b_scale.reshape(1, -1)}
    return torch._scaled_mm(a, b.t(), **scales, bias=bias, out_dtype=dtype, use_fast_accum=fast)


def _multiplies(device: torch.device) -> bool:
    """Whether the device's product of ones is right; raises where PyTorch refuses it.

    A library without code for the architecture may leave the result as it was.
    """
    ones, scale = torch.ones(32, 64, device=device).to(torch.float8_e4m3fn), torch.ones(32, device=device)
    return bool((scaled_mm(ones, scale, ones, scale, None, torch.bfloat16) == 64).all())


@functools.cache
def cpu_has_row_scales() -> bool:
    """Whether this PyTorch multiplies FP8 operands with a scale per row on a CPU; 2.11 does not."""
    try:
        return _multiplies(torch.device("cpu"))
    except (RuntimeError, NotImplementedError):
        return False


def product_refusal(
    device: torch.device, lowest: tuple[int, int], trial: Callable[[torch.device], bool] = _multiplies
) -> str | None:
    """Why a device has not the FP8 products that are wanted; None if it has them.

    lowest: the compute capability that has them. trial: computes a small one there; whether it is right.
    """
    if device.type != "cuda":
        return f"device {device.type}"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < lowest:
        return f"{name} of compute capability {capability[0]}.{capability[1]}"
    try:
        right = trial(device)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"{name}, where torch {torch.__version__} refuses: {str(error).splitlines()[0]}"
    return None if right else f"{name}, where torch {torch.__version__} multiplies wrongly"
