"""The step between two half-blocks: a gated residual, then LayerNorm and adaLN modulation of its result.

    x_out = x + gate * branch                                     gate left out: 1
    y = LayerNorm(x_out) * weight + bias                          over the last axis, biased variance
    y = y * (1 + scale) + shift                                   only with modulation

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), adaLN-Zero blocks; without gate and
modulation the step of a pre-LayerNorm transformer.

Shapes: x, branch: [B, L, D]; weight, bias: [D]; gate, shift, scale: [B, D] or [B, 1, D]; gate, or shift and scale, may
be None.
Dtypes: any floating dtypes, mixed freely. Arithmetic is float32 (float64 when x is float64); x_out is rounded once, to
x's dtype, and what is normalised is the rounded x_out; y has out_dtype, by default x's dtype.
`gate_residual_norm_modulate_fp8` returns y as `layer_norm_modulate_fp8` does.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients.

With g the gradient of x_out, the one that arrives there plus the one through the norm: dx = g, dbranch = gate * g,
dgate = sum_l branch * g.
"""

import torch

from epg_fast.ops.backends import accumulation_dtype, check_backend, interpreting
from epg_fast.ops.fp8 import refuse_gradient
from epg_fast.ops.layer_norm_modulate import (
    check_norm_shapes,
    layer_norm_modulate_bwd_ref,
    layer_norm_modulate_fp8_ref,
    layer_norm_modulate_ref,
    norm_statistics,
    per_sample,
    require_triton_norm,
)
from epg_fast.ops.quantize_rows import gated_sum_ref
from epg_fast.ops.spec import OpSpec


def gate_residual_norm_modulate_ref(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in plain PyTorch; shapes and dtypes as in the module's docstring."""
    x_out = gated_sum_ref(x, branch, gate)
    return x_out, layer_norm_modulate_ref(x_out, weight, bias, shift, scale, eps, out_dtype)


@torch.library.custom_op("epg_fast::gate_residual_norm_modulate", mutates_args=(), device_types="cpu")
def _forward_op(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if interpreting():
        return _forward_triton(x, branch, gate, weight, bias, shift, scale, eps, out_dtype)
    x_out, y = gate_residual_norm_modulate_ref(x, branch, gate, weight, bias, shift, scale, eps, out_dtype)
    return x_out.contiguous(), y.contiguous(), *norm_statistics(x_out, eps)


@_forward_op.register_kernel("cuda")
def _forward_triton(x, branch, gate, weight, bias, shift, scale, eps, out_dtype):
    from epg_kernels.gate_residual_norm_modulate import gate_residual_norm_modulate_fwd

    return gate_residual_norm_modulate_fwd(x, branch, gate, weight, bias, shift, scale, eps, out_dtype)


@_forward_op.register_fake
def _(x, branch, gate, weight, bias, shift, scale, eps, out_dtype):
    statistics = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x))
    y = x.new_empty(x.shape, dtype=out_dtype or x.dtype)
    return x.new_empty(x.shape), y, statistics, torch.empty_like(statistics)


# An operator cannot return None: dbranch and dgate are empty without a gate, dshift and dscale without modulation.
@torch.library.custom_op("epg_fast::gate_residual_norm_modulate_bwd", mutates_args=(), device_types="cpu")
def _backward_op(
    dx_out: torch.Tensor | None,
    dy: torch.Tensor,
    x_out: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if interpreting():
        return _backward_triton(dx_out, dy, x_out, branch, gate, weight, bias, shift, scale, mean, rstd)
    # In the statistics' dtype, so that the gradient of x_out is rounded once.
    values = x_out.to(mean.dtype)
    g, *rest = layer_norm_modulate_bwd_ref(dy, values, weight, bias, shift, scale, mean, rstd)
    dweight, dbias, dshift, dscale = (tensor.to(x_out.dtype) if tensor.numel() == 0 else tensor for tensor in rest)
    if dx_out is not None:
        g = g + dx_out.to(g.dtype)
    if gate is None:
        dbranch, dgate = x_out.new_empty(0), x_out.new_empty(0)
    else:
        dbranch = (g * gate.to(g.dtype).unsqueeze(1)).to(branch.dtype)
        dgate = (g * branch.to(g.dtype)).sum(1).to(gate.dtype)
    return g.to(x_out.dtype), dbranch, dgate, dweight, dbias, dshift, dscale


@_backward_op.register_kernel("cuda")
def _backward_triton(dx_out, dy, x_out, branch, gate, weight, bias, shift, scale, mean, rstd):
    from epg_kernels.gate_residual_norm_modulate import gate_residual_norm_modulate_bwd

    gradients = gate_residual_norm_modulate_bwd(dx_out, dy, x_out, branch, gate, weight, bias, shift, scale, mean, rstd)
    return tuple(x_out.new_empty(0) if gradient is None else gradient for gradient in gradients)


@_backward_op.register_fake
def _(dx_out, dy, x_out, branch, gate, weight, bias, shift, scale, mean, rstd):
    dbranch = x_out.new_empty(0) if gate is None else branch.new_empty(x_out.shape)
    dgate, dshift, dscale = (
        x_out.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in (gate, shift, scale)
    )
    dweight, dbias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    return x_out.new_empty(x_out.shape), dbranch, dgate, dweight, dbias, dshift, dscale


def _setup_context(ctx, inputs, output):
    _, branch, gate, weight, bias, shift, scale, *_ = inputs
    x_out, _, mean, rstd = output
    # Without a gate the branch itself is not needed, only its dtype.
    ctx.save_for_backward(x_out, branch if gate is not None else None, gate, weight, bias, shift, scale, mean, rstd)
    ctx.branch_dtype = branch.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dx_out, dy, _dmean, _drstd):
    x_out, branch, gate, weight, bias, shift, scale, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x_out)
    dx, dbranch, dgate, dweight, dbias, dshift, dscale = _backward_op(
        dx_out, dy, x_out, x_out if branch is None else branch, gate, weight, bias, shift, scale, mean, rstd
    )
    if gate is None:
        dbranch, dgate = dx.to(ctx.branch_dtype), None
    if scale is None:
        dshift, dscale = None, None
    return dx, dbranch, dgate, dweight, dbias, dshift, dscale, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("epg_fast::gate_residual_norm_modulate_fp8", mutates_args=(), device_types="cpu")
def _fp8_op(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if interpreting():
        return _fp8_triton(x, branch, gate, weight, bias, shift, scale, eps)
    x_out = gated_sum_ref(x, branch, gate).contiguous()
    y, row_scale = layer_norm_modulate_fp8_ref(x_out, weight, bias, shift, scale, eps)
    return x_out, y.contiguous(), row_scale


@_fp8_op.register_kernel("cuda")
def _fp8_triton(x, branch, gate, weight, bias, shift, scale, eps):
    from epg_kernels.gate_residual_norm_modulate import gate_residual_norm_modulate_fp8

    return gate_residual_norm_modulate_fp8(x, branch, gate, weight, bias, shift, scale, eps)


@_fp8_op.register_fake
def _(x, branch, gate, weight, bias, shift, scale, eps):
    row_scale = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float8_e4m3fn), row_scale


# No FLOP formula is registered: torch.utils.flop_counter counts matrix products, and this operation has none.


def gate_residual_norm_modulate(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str = "plain",
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + gate * branch, and LayerNorm of it, then `* (1 + scale) + shift` when both are given.

    x, branch: [B, L, D]; weight, bias: [D]; gate, shift, scale: [B, D], [B, 1, D] or None. Returns (x_out, y), both
    [B, L, D], the first in x's dtype, the second in out_dtype (default: x's dtype).
    backend: "plain" (plain PyTorch, which torch.compile fuses with its neighbours), "triton" (the hand-written
    kernel).
    Raises ValueError for shapes that do not fit and for a backend that cannot run here.
    """
    _check("gate_residual_norm_modulate", backend, x, branch, gate, weight, bias, shift, scale)
    if backend != "triton":
        return gate_residual_norm_modulate_ref(x, branch, gate, weight, bias, shift, scale, eps, out_dtype)
    require_triton_norm("gate_residual_norm_modulate", x, branch, gate, weight, bias, shift, scale)
    gate, shift, scale = per_sample(gate), per_sample(shift), per_sample(scale)
    return _forward_op(x, branch, gate, weight, bias, shift, scale, eps, out_dtype)[:2]


def gate_residual_norm_modulate_fp8(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "plain",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gate_residual_norm_modulate` with y quantised row by row.

    Returns (x_out [B, L, D], y / row_scale [B, L, D] in float8_e4m3fn, row_scale [B, L]). Arguments, backends and
    errors as there. There is no gradient: ValueError if one would be needed.
    """
    op = "gate_residual_norm_modulate_fp8"
    _check(op, backend, x, branch, gate, weight, bias, shift, scale)
    refuse_gradient(op, x, branch, gate, weight, bias, shift, scale)
    if backend != "triton":
        x_out = gated_sum_ref(x, branch, gate)
        return x_out, *layer_norm_modulate_fp8_ref(x_out, weight, bias, shift, scale, eps)
    require_triton_norm(op, x, branch, gate, weight, bias, shift, scale, fp8=True)
    return _fp8_op(x, branch, per_sample(gate), weight, bias, per_sample(shift), per_sample(scale), eps)


def _check(op, backend, x, branch, gate, weight, bias, shift, scale) -> None:
    check_backend(op, backend, ("plain", "triton"))
    check_norm_shapes(op, x, weight, bias, gate=gate, shift=shift, scale=scale)
    if branch.shape != x.shape:
        raise ValueError(f"{op}: got branch of shape {tuple(branch.shape)}, wanted {tuple(x.shape)} as x")


def _bytes(shape: tuple[int, int, int], itemsize: int, backward: bool = False) -> int:
    """Forward reads x and branch and writes x_out and y; backward reads both gradients, x_out and branch and writes dx
    and dbranch. Parameters and statistics are float32."""
    batch, tokens, width = shape
    rows, per_image, parameters, statistics = batch * tokens * width, batch * width, width, batch * tokens
    if backward:
        return (6 * rows + 5 * per_image) * itemsize + (4 * parameters + 2 * statistics) * 4
    return (4 * rows + 3 * per_image) * itemsize + (2 * parameters + 2 * statistics) * 4


def _flops(shape: tuple[int, int, int], backward: bool = False) -> int:
    """Per value: 2 for the residual, 5 to normalise, 4 for weight, bias, scale and shift; 20 in the backward pass."""
    batch, tokens, width = shape
    return (20 if backward else 11) * batch * tokens * width


SPEC = OpSpec(
    name="gate_residual_norm_modulate",
    shapes=((64, 258, 1584), (256, 258, 768), (64, 258, 1024), (64, 258, 1920), (64, 258, 2688)),
    odd_shapes=((3, 17, 40), (1, 199, 40), (1, 17, 768), (2, 3, 1584)),
    bytes=_bytes,
    flops=_flops,
)
