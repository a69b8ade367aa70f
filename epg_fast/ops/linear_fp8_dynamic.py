"""Linear layer for training that quantises the operands of its own matrix products to FP8, each row by its own scale.

    y  = q(x) q(weight)^T + bias
    dx = q(dy) q(weight^T)^T        dweight = dy^T x        dbias = sum of dy over all rows

q rounds a row to float8_e4m3fn times max |row| / 448 (`quantize_rows_ref`); a product's sum runs along rows of both
operands, so that its scales leave it, and the weight is quantised once along either axis. The gradient is that of the
layer without q, as if rounding were the identity.

Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022); the split is that of torchao's float8 recipe
`rowwise_with_gw_hp`: dweight sums over all tokens, the longest sum of the three and the one that reaches the weights
directly, and stays in 16 bits. dy is in e4m3, not in e5m2: with a scale per row the narrower range is wide enough, and
the third bit behind the leading one halves the error.

Dtypes: x, weight and bias in any floating dtype; the products take x, and give y and dx, in `dtype`, bfloat16 for the
backend "scaled_mm"; gradients have the dtypes of what they belong to. "plain" multiplies in float32, or in float64
where x and weight are that.
Error: against float64 products of the quantised operands, the rounding of y, of the bias and of the sum; q itself is
off by at most 2^-4 of a value, unless that is more than 2^14 times smaller than its row's largest.

A row whose largest value is below 1e-30 counts as zero. Where x, weight or dy is not finite, neither is what is
computed from it.
"""

import torch
from torch.autograd.function import once_differentiable

from epg_fast.ops.backends import check_backend
from epg_fast.ops.checks import check_shapes
from epg_fast.ops.fp8 import fits, require_row_scales, scaled_mm
from epg_fast.ops.linear_fp8 import linear_fp8_ref
from epg_fast.ops.linear_fp8_fused import require_linear_shapes
from epg_fast.ops.quantize_rows import quantize_rows_ref
from epg_fast.ops.spec import OpSpec, of_rows

_OP = "linear_fp8_dynamic"


class _LinearFp8Dynamic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        ctx.save_for_backward(x, weight)
        ctx.backend, ctx.bias_dtype = backend, None if bias is None else bias.dtype
        # Fast accumulation: the tensor cores keep the sum. The backward pass leaves the cores more often.
        return _product(x, weight, bias, backend, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy, weight.t(), None, ctx.backend, fast=False)
        if ctx.needs_input_grad[1]:
            dweight = (dy.t() @ x).to(weight.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
        return dx, dweight, dbias, None


def _product(a, b, bias, backend, fast):
    """q(a) [M, K] times q(b)^T, b: [N, K], plus bias [N] or None: [M, N] in a's dtype."""
    # Strides are given up before rounding: the product reads both operands along K.
    (a, a_scale), (b, b_scale), dtype = quantize_rows_ref(a.contiguous()), quantize_rows_ref(b.contiguous()), a.dtype
    if backend == "plain":
        bias = torch.zeros(b.shape[0], dtype=dtype, device=b.device) if bias is None else bias.to(dtype)
        with torch.autocast(a.device.type, enabled=False):
            return linear_fp8_ref(a, a_scale, b, b_scale, bias)
    return scaled_mm(a, a_scale, b, b_scale, None if bias is None else bias.to(dtype), dtype, fast)


def linear_fp8_dynamic_ref(x, weight, bias=None, dtype=torch.bfloat16) -> torch.Tensor:
    """The same rounding with products in float32 on dequantised operands, forward and backward, on any device."""
    return linear_fp8_dynamic(x, weight, bias, dtype, backend="plain")


def linear_fp8_dynamic(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "scaled_mm",
) -> torch.Tensor:
    """x weight^T + bias with both operands rounded to FP8 on the way; differentiable once.

    x: [..., K]; weight: [N, K]; bias: [N] or None; returns [..., N] in `dtype`.
    backend: "scaled_mm" (PyTorch's FP8 product, on GPUs that have it) or "plain" (float32 products of the rounded
    values, which show what the rounding does and save no time).
    Raises ValueError for shapes that do not fit or are no multiples of 16, and for a dtype that the backend cannot
    return.
    """
    check_backend(_OP, backend, ("scaled_mm", "plain"))
    _check(x, weight, bias)
    if backend == "scaled_mm":
        if dtype != torch.bfloat16:
            raise ValueError(
                f"{_OP}: got dtype {dtype}, wanted torch.bfloat16 for backend='scaled_mm'; convert the result, or use "
                "backend='plain'"
            )
        require_row_scales(_OP, x.device)
    y = _LinearFp8Dynamic.apply(x.to(dtype).flatten(0, -2), weight, bias, backend)
    return y.view(*x.shape[:-1], weight.shape[0])


def _check(x, weight, bias) -> None:
    require_linear_shapes(_OP, x, weight)
    check_shapes(_OP, {"N": weight.shape[0]}, bias=(bias, "N"))
    if not fits(weight):
        raise ValueError(
            f"{_OP}: got a weight of {weight.shape[0]} x {weight.shape[1]}, wanted multiples of 16; use F.linear"
        )


def _bytes(shape: tuple[int, int, int], itemsize: int, backward: bool = False) -> int:
    """Forward reads x, weight (float32) and bias and writes y, FP8 copies written and read once; backward reads dy
    twice, x and weight, writes dx and dweight (`itemsize` bytes, then float32) and dbias, and has FP8 copies, too."""
    rows, k, n = shape
    if backward:
        return itemsize * (2 * rows * (k + n) + n * k) + 8 * n * k + 4 * n + 2 * n * (rows + k)
    return itemsize * rows * (k + n) + 4 * n * k + 4 * n + 2 * k * (rows + n)


SPEC = OpSpec(
    name=_OP,
    shapes=of_rows((1584, 6336), (1584, 4752), (6336, 1584), (2352, 1584), (768, 3072)),
    odd_shapes=((5, 48, 32), (129, 144, 208), (1, 16, 16)),
    bytes=_bytes,
    multiply_adds=lambda rows, k, n: rows * k * n,
    built_from=("linear_fp8",),
)
