"""A norm and the linear layer that reads it, as one kernel, for inference.

    y = LayerNorm(x) * norm_weight + norm_bias                    over the last axis, biased variance
    y = y * (1 + scale) + shift                                   only with modulation
    z = y @ weight^T + bias                                       bias left out: 0
    out = z, or gelu(z)                                           the exact one, z Phi(z)

Source: as `layer_norm_modulate` and `mlp_residual`.

The norm's result is never stored: tiles of x are normalised on their way into the product. The statistics of x come
with it: whatever made x has the values of its rows at hand (`linear_residual` leaves them), while each of the product's
tiles would have to read whole rows for them.

Dtypes: out has x's dtype, or under autocast its dtype (float32, bfloat16, float16; float64: reference only); weight is
converted to it. x and the others: any of these; statistics float32. Norm and sums are computed in float32, y is rounded
once, to out's dtype, before it is multiplied, as if it were stored.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes.
"""

import torch
import torch.nn.functional as F

from epg_fast.ops.backends import autocast_dtype, check_backend, product_operand, refuse_gradient, require_dtypes
from epg_fast.ops.checks import check_shapes
from epg_fast.ops.layer_norm_modulate import (
    check_norm_shapes,
    layer_norm_modulate_ref,
    per_sample,
    require_triton_norm,
)
from epg_fast.ops.linear_residual_norm import STATISTICS_COLUMNS, check_linear
from epg_fast.ops.registration import operation
from epg_fast.ops.spec import OpSpec, of_tokens

_OP = "norm_linear"


def norm_linear_ref(
    x, statistics, norm_weight, norm_bias, weight, bias=None, shift=None, scale=None, eps=1e-5, gelu=False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """`norm_linear` in plain PyTorch, which takes the statistics from x; dtype: of the result, by default x's."""
    y = layer_norm_modulate_ref(x, norm_weight, norm_bias, shift, scale, eps, dtype or x.dtype)
    z = F.linear(y, weight.to(y.dtype), None if bias is None else bias.to(y.dtype))
    return F.gelu(z) if gelu else z


def _forward(x, statistics, norm_weight, norm_bias, weight, bias, shift, scale, eps: float, gelu: bool):
    return norm_linear_ref(x, statistics, norm_weight, norm_bias, weight, bias, shift, scale, eps, gelu, weight.dtype)


_operation = operation(_OP, _forward, "epg_kernels.norm_linear:norm_linear_fwd", "out")


def norm_linear(
    x: torch.Tensor,
    statistics: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    eps: float = 1e-5,
    gelu: bool = False,
    backend: str = "plain",
    operand: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(norm(x) @ weight^T + bias), [B, L, N] in x's dtype or autocast's; norm as in `layer_norm_modulate`.

    x: [B, L, D]; statistics: of its rows, as `linear_residual` returns them; weight: [N, D]; bias: [N] or None.
    backend: "plain" (plain PyTorch, which computes the statistics anew), "triton". operand: a copy of weight in the
    result's dtype. There is no gradient: ValueError if one would be needed, for shapes that do not fit and for a
    backend that cannot run here.
    """
    check_backend(_OP, backend, ("plain", "triton"))
    check_norm_shapes(_OP, x, norm_weight, norm_bias, shift=shift, scale=scale)
    check_linear(_OP, "x", x, x[..., :1].expand(*x.shape[:2], weight.shape[0]), weight, bias)
    parts = -(-x.shape[2] // STATISTICS_COLUMNS)
    check_shapes(_OP, {"2": 2, "P": parts, "R": x.shape[0] * x.shape[1]}, statistics=(statistics, "2PR"))
    refuse_gradient(_OP, x, norm_weight, norm_bias, weight, bias, shift, scale)
    dtype = autocast_dtype(x) or x.dtype
    shift, scale = per_sample(shift), per_sample(scale)
    norm = x, statistics, norm_weight, norm_bias
    if backend == "plain":
        return norm_linear_ref(*norm, weight, bias, shift, scale, eps, gelu, dtype)
    floats = {"norm_weight": norm_weight, "norm_bias": norm_bias, "bias": bias, "shift": shift, "scale": scale}
    require_triton_norm(_OP, x.shape[2], statistics, weight, x=x, **floats)
    require_dtypes(_OP, (torch.float32,), statistics=statistics)
    return _operation(*norm, product_operand(_OP, weight, operand, dtype), bias, shift, scale, eps, gelu)


def _bytes(shape: tuple[int, int, int, int], itemsize: int, backward: bool = False) -> int:
    """Reads x, its statistics, weight, parameters and modulation, and writes the result; there is no backward pass."""
    batch, tokens, width, columns = shape
    rows, parts = batch * tokens, -(-width // STATISTICS_COLUMNS)
    values = rows * (width + columns) + width * columns + 2 * batch * width
    return values * itemsize + (2 * parts * rows + 2 * width + columns) * 4


SPEC = OpSpec(  # shapes: (B, L, D, N)
    name=_OP,
    shapes=(*of_tokens((1584, 6336), (768, 2304), (1920, 7680), (2688, 10752)), (1, 258, 1024, 4096)),
    odd_shapes=((3, 17, 40, 24), (1, 257, 72, 9), (2, 130, 200, 16)),
    bytes=_bytes,
    multiply_adds=lambda batch, tokens, width, columns: batch * tokens * width * columns,
)
