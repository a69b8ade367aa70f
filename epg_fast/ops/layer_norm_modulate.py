"""LayerNorm followed by adaLN modulation.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        LayerNorm over the last axis, biased variance
    y = y * (1 + scale) + shift                                   only with modulation

Source: Ba et al., "Layer Normalization" (2016); Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023).

Dtypes: any floating dtypes, mixed freely. Statistics and arithmetic are float32 (float64 when x is float64), y has
out_dtype, by default x's dtype. `layer_norm_modulate_fp8` returns y / row_scale in float8_e4m3fn instead, with
row_scale = max |y| / 448 over each row, for matrix products in FP8.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients.

The gradients need only two sums per image, G = sum_l dy and H = sum_l dy * xhat:
dshift = G, dscale = weight * H + bias * G, dweight = sum_b (1 + scale) * H, dbias = sum_b (1 + scale) * G.
"""

import torch
import torch.nn.functional as F

from epg_fast.ops.backends import accumulation_dtype, check_backend, refuse_gradient, require_at_most, require_triton
from epg_fast.ops.checks import check_both, check_shapes
from epg_fast.ops.quantize_rows import gated_sum_ref, per_sample, quantize_rows_ref
from epg_fast.ops.registration import Backward, operation
from epg_fast.ops.spec import OpSpec

_MAX_TRITON_WIDTH = 4096
_KERNELS = "epg_kernels.layer_norm_modulate"


def layer_norm_modulate_ref(x, weight, bias, shift=None, scale=None, eps=1e-5, out_dtype=None) -> torch.Tensor:
    """`layer_norm_modulate` in plain PyTorch."""
    acc_dtype = accumulation_dtype(x)
    y = F.layer_norm(x.to(acc_dtype), x.shape[-1:], weight.to(acc_dtype), bias.to(acc_dtype), eps)
    if scale is not None:
        shift, scale = (m.unsqueeze(1) if m.dim() == 2 else m for m in (shift, scale))
        y = y * (1 + scale.to(acc_dtype)) + shift.to(acc_dtype)
    return y.to(out_dtype or x.dtype)


def _forward(x, weight, bias, shift, scale, eps: float, out_dtype: torch.dtype | None, copy_dtype: torch.dtype | None):
    """(y, mean, rstd, x in copy_dtype, None if that is)."""
    y = layer_norm_modulate_ref(x, weight, bias, shift, scale, eps, out_dtype)
    return y, *norm_statistics(x, eps), None if copy_dtype is None else x.to(copy_dtype, copy=True)


def norm_statistics(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, 1 / sqrt(variance + eps)) of each row of x [B, L, D]: [B, L] each."""
    variance, mean = torch.var_mean(x.to(accumulation_dtype(x)), -1, correction=0)
    return mean, torch.rsqrt(variance + eps)


def _backward(dx_out, dcopy, dy: torch.Tensor, x, weight, bias, shift, scale, mean, rstd):
    """dx_out, dcopy: the gradients that reach x past the norm, through itself and through its copy, if they do."""
    dx, *rest = layer_norm_modulate_bwd_ref(dy, x, weight, bias, shift, scale, mean, rstd, dx_out, dcopy)
    return dx.to(x.dtype), *rest


def layer_norm_modulate_bwd_ref(dy, x, weight, bias, shift, scale, mean, rstd, *passed):
    """Gradients in plain PyTorch; dshift and dscale are None without modulation.

    That of x is in the statistics' dtype, to be rounded once, with those that have `passed` the norm.
    """
    acc_dtype = mean.dtype
    g, w, rstd = dy.to(acc_dtype), weight.to(acc_dtype), rstd.unsqueeze(-1)
    xhat = (x.to(acc_dtype) - mean.unsqueeze(-1)) * rstd
    factor = 1 + scale.to(acc_dtype) if scale is not None else x.new_ones(1, dtype=acc_dtype)
    dxhat = g * w * factor.unsqueeze(-2)
    dx = (dxhat - dxhat.mean(-1, keepdim=True) - xhat * (dxhat * xhat).mean(-1, keepdim=True)) * rstd
    for gradient in passed:
        dx = dx if gradient is None else dx + gradient.to(acc_dtype)
    sum_dy, sum_dy_xhat = g.sum(1), (g * xhat).sum(1)
    dweight, dbias = (factor * sum_dy_xhat).sum(0).to(weight.dtype), (factor * sum_dy).sum(0).to(bias.dtype)
    if scale is None:
        return dx, dweight, dbias, None, None
    dscale = (w * sum_dy_xhat + bias.to(acc_dtype) * sum_dy).to(scale.dtype)
    return dx, dweight, dbias, sum_dy.to(shift.dtype, copy=True), dscale


_operation = operation(
    "layer_norm_modulate",
    _forward,
    f"{_KERNELS}:layer_norm_modulate_fwd",
    "y mean rstd copy",
    Backward(_backward, f"{_KERNELS}:layer_norm_modulate_bwd", "x weight bias shift scale"),
)
_gradients = _operation.backward


def _forward_fp8(x, branch, gate, first_weight, first_bias, weight, bias, shift, scale, eps: float):
    """(x + gate * branch, or the first norm of x, None without either; its norm quantised row by row, the scales)."""
    x_out = gated_sum_ref(x, branch, gate)
    if first_weight is not None:
        x_out = layer_norm_modulate_ref(x, first_weight, first_bias, eps=eps)
    y = layer_norm_modulate_ref(x_out, weight, bias, shift, scale, eps, accumulation_dtype(x))
    return None if x_out is x else x_out, *quantize_rows_ref(y)


_fp8_operation = operation(
    "norm_modulate_fp8", _forward_fp8, "epg_kernels._norm_modulate:norm_modulate_fp8", "x_out y row_scale"
)


class _ResidualNorm(torch.autograd.Function):
    """(x, its norm, its copy): an operator's gradient formula would not see what reaches x past the norm."""

    @staticmethod
    def forward(ctx, x, weight, bias, shift, scale, eps, out_dtype, copy_dtype):
        y, mean, rstd, copied = _operation(x, weight, bias, shift, scale, eps, out_dtype, copy_dtype)
        ctx.save_for_backward(x, weight, bias, shift, scale, mean, rstd)
        return x.view_as(x), y, x.new_empty(0) if copied is None else copied

    @staticmethod
    def backward(ctx, dx_out, dy, dcopy):
        return *_gradients(dx_out, dcopy if dcopy.numel() else None, dy, *ctx.saved_tensors), None, None, None


def layer_norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str = "plain",
) -> torch.Tensor:
    """LayerNorm over the last axis of x, then `* (1 + scale) + shift` when both are given.

    x: [B, L, D]; weight, bias: [D]; shift, scale: [B, D], [B, 1, D] or None. Returns [B, L, D] in out_dtype (default:
    x's dtype).
    backend: "plain" (plain PyTorch, which torch.compile fuses with its neighbours), "triton" (the hand-written
    kernel).
    Raises ValueError for shapes that do not fit and for a backend that cannot run here.
    """
    shift, scale, _ = checked_norm("layer_norm_modulate", backend, x, weight, bias, shift, scale)
    if backend != "triton":
        return layer_norm_modulate_ref(x, weight, bias, shift, scale, eps, out_dtype)
    return _operation(x, weight, bias, shift, scale, eps, out_dtype, None)[0]


def residual_norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    copy_dtype: torch.dtype | None = None,
    backend: str = "plain",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, `layer_norm_modulate` of x, x in copy_dtype), for an x that also goes on as residual and as skip.

    With "triton" the copy is made in the norm's pass, and the gradients of all three meet in that of its backward pass,
    instead of in kernels of their own. copy_dtype: None is x's. Arguments, backends and errors as there.
    """
    shift, scale, _ = checked_norm("residual_norm_modulate", backend, x, weight, bias, shift, scale)
    copy_dtype = None if copy_dtype in (None, x.dtype) else copy_dtype
    if backend != "triton":
        copied = x if copy_dtype is None else x.to(copy_dtype)
        return x, layer_norm_modulate_ref(x, weight, bias, shift, scale, eps, out_dtype), copied
    x, y, copied = _ResidualNorm.apply(x, weight, bias, shift, scale, eps, out_dtype, copy_dtype)
    return x, y, x if copy_dtype is None else copied


def layer_norm_modulate_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "plain",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`layer_norm_modulate` quantised row by row: (y / row_scale [B, L, D] in float8_e4m3fn, row_scale [B, L]).

    Arguments, backends and errors as there. There is no gradient: ValueError if one would be needed.
    """
    return norm_fp8("layer_norm_modulate_fp8", backend, x, weight, bias, shift, scale, eps)[1:]


def norm_fp8(op, backend, x, weight, bias, shift, scale, eps, branch=None, gate=None, first=(None, None)):
    """What `_forward_fp8` returns, of checked arguments; first: weight and bias of a norm before."""
    shift, scale, gate = checked_norm(op, backend, x, weight, bias, shift, scale, gate, branch, fp8=True)
    run = _fp8_operation if backend == "triton" else _forward_fp8
    return run(x, branch, gate, *first, weight, bias, shift, scale, eps)


def checked_norm(op, backend, x, weight, bias, shift, scale, gate=None, branch=None, fp8=False):
    """(shift, scale, gate) as the backend takes them; raises ValueError for what does not fit or cannot run here."""
    check_backend(op, backend, ("plain", "triton"))
    check_norm_shapes(op, x, weight, bias, gate=gate, shift=shift, scale=scale)
    if branch is not None:
        check_shapes(op, dict(zip("BLD", x.shape, strict=True)), branch=(branch, "BLD", " as x"))
    given = x, branch, gate, weight, bias, shift, scale
    if fp8:
        refuse_gradient(op, *given)
    if backend != "triton":
        return shift, scale, gate
    require_triton_norm(op, x.shape[2], *given, fp8=fp8)
    return per_sample(shift), per_sample(scale), per_sample(gate)


def require_triton_norm(op: str, width: int, *tensors: torch.Tensor | None, **options) -> None:
    """Raise ValueError unless the Triton kernels of norms of this width can run; the rest is `require_triton`'s."""
    require_triton(op, *tensors, batched=True, **options)
    require_at_most(op, _MAX_TRITON_WIDTH, "width D=", width)


def check_norm_shapes(op: str, x, weight, bias, **modulation: torch.Tensor | None) -> None:
    """Raise ValueError unless x is [B, L, D], the parameters [D] and what `modulation` names [B, D] or [B, 1, D]."""
    sizes = {}
    check_shapes(op, sizes, x=(x, "BLD"), weight=(weight, "D"), bias=(bias, "D"))
    check_both(op, shift=modulation["shift"], scale=modulation["scale"])
    check_shapes(op, sizes, **{name: (tensor, "BD|B1D") for name, tensor in modulation.items()})


def norm_bytes(shape: tuple[int, int, int], itemsize: int, passes: int, modulations: int, parameters: int) -> int:
    """passes: over tokens like x; modulations: values for each image and column; parameters are float32."""
    batch, tokens, width = shape
    values = passes * batch * tokens * width + modulations * batch * width
    return values * itemsize + 4 * (parameters * width + 2 * batch * tokens)  # mean and rstd


def _bytes(shape: tuple[int, int, int], itemsize: int, backward: bool = False) -> int:
    """Forward reads x and writes y, backward reads dy and x and writes dx."""
    return norm_bytes(shape, itemsize, *((3, 3, 4) if backward else (2, 2, 2)))


SPEC = OpSpec(
    name="layer_norm_modulate",
    shapes=((64, 258, 1584), (256, 258, 768), (64, 258, 1024), (64, 258, 1920), (64, 258, 2688)),
    odd_shapes=((3, 17, 40), (1, 258, 40), (1, 17, 768), (2, 3, 1584)),
    bytes=_bytes,
)
