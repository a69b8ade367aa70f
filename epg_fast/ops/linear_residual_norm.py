"""The end of a block's half: a linear layer, gated, on the residual, and the norm that the next half begins with.

    x_out = x + gate * (h @ weight^T + bias)                      gate left out: 1
    y = LayerNorm(x_out) * norm_weight + norm_bias                over the last axis, biased variance
    y = y * (1 + scale) + shift                                   only with modulation

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), adaLN-Zero blocks; without gate and
modulation the step of a pre-LayerNorm transformer. Gate and residual ride in the epilogue of the product.

Dtypes: h float32, bfloat16 or float16 (float64: reference only), or under autocast its dtype, which y has; weight is
converted to it. x and the others: any of these. Products are accumulated and everything after them is computed in
float32; x_out is rounded once, to x's dtype, and what is normalised is the rounded x_out.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients.
Backend "cuda" takes its product from the extension: h bfloat16, x and gate in h's dtype or float32, h, weight and x
contiguous, K and N multiples of 8; the bias is added in h's dtype. Norm and backward pass are those of "triton".

With g the gradient of x_out, the one that arrives there plus the one through the norm: dx = g, dz = gate * g,
dh = dz @ weight, dweight = dz^T h, dbias = sum dz, dgate = sum_l z * g with z = h @ weight^T + bias, which is kept.

`linear` is the product alone, with the same gradients: that of a float32 weight is written as it was accumulated.
`linear_residual` is x_out alone, for inference, and what a norm of it has to know (`norm_linear`): mean and sum of
squared deviations of each 64 columns of a row of the rounded x_out, float32 [2, ceil(N / 64), B * L].
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from epg_fast.ops.backends import (
    FLOATS,
    autocast_dtype,
    check_backend,
    needs_gradient,
    product_operand,
    refuse_gradient,
    require_dtypes,
    require_gemm_operands,
    require_installed_triton,
    require_triton,
)
from epg_fast.ops.checks import check_floating, check_shapes
from epg_fast.ops.extension import require_gemms
from epg_fast.ops.gate_residual_norm_modulate import SPEC as NORM
from epg_fast.ops.layer_norm_modulate import (
    check_norm_shapes,
    layer_norm_modulate_bwd_ref,
    layer_norm_modulate_ref,
    norm_statistics,
    per_sample,
    require_triton_norm,
)
from epg_fast.ops.registration import Backward, operation
from epg_fast.ops.spec import OpSpec, of_tokens

_OP = "linear_residual_norm"
STATISTICS_COLUMNS = 64
"""Whose statistics `linear_residual` leaves together: those of a part of a tile of the product."""


def linear_residual_norm_ref(
    x, h, weight, bias, norm_weight, norm_bias, gate=None, shift=None, scale=None, eps=1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_residual_norm` in plain PyTorch."""
    x_out, _ = residual_product_ref(x, h, weight, bias, gate)
    return x_out, layer_norm_modulate_ref(x_out, norm_weight, norm_bias, shift, scale, eps, h.dtype)


def residual_product_ref(x, h, weight, bias, gate) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + gate * branch in x's dtype, the branch h @ weight^T + bias)."""
    branch = F.linear(h, weight.to(h.dtype), bias.to(h.dtype))
    return (x + (branch if gate is None else per_sample(gate).unsqueeze(1) * branch)).to(x.dtype), branch


def _forward(
    x, h, parameter, weight, bias, norm_weight, norm_bias, gate, shift, scale,
    eps: float, save_branch: bool, backend: str,
):  # fmt: skip
    """(x_out, y, the branch, None unless saved, mean, rstd).

    weight: parameter in h's dtype. Products read the one, and the gradient of the other is written in its own dtype.
    """
    x_out, branch = residual_product_ref(x, h, weight, bias, gate)
    y = layer_norm_modulate_ref(x_out, norm_weight, norm_bias, shift, scale, eps, h.dtype)
    return x_out, y, branch if save_branch else None, *norm_statistics(x_out, eps)


def _kernel(x, h, _, weight, bias, norm_weight, norm_bias, gate, shift, scale, eps, save_branch, backend):
    from epg_kernels.layer_norm_modulate import layer_norm_modulate_fwd
    from epg_kernels.linear_residual_norm import linear_residual

    product = linear_residual if backend == "triton" else linear_residual_cuda
    x_out, branch = product(x, h, weight, bias, gate, save_branch)
    y, *statistics, _ = layer_norm_modulate_fwd(x_out, norm_weight, norm_bias, shift, scale, eps, h.dtype)
    return x_out, y, branch, *statistics


def linear_residual_cuda(x, h, weight, bias, gate, save_branch: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(x + gate * (h @ weight^T + bias), what the gate scales, if saved) from the extension's product."""
    x_out = x.new_empty(x.shape)
    branch = h.new_empty(x.shape) if save_branch else None
    torch.ops.epg_fast.linear_gate_residual_out(x_out, branch, x, gate, h, weight, bias.to(h.dtype).contiguous())
    return x_out, branch


def _backward(
    dx_out, dy: torch.Tensor, x_out, branch, h, weight, parameter_dtype: torch.dtype, bias, gate,
    norm_weight, norm_bias, shift, scale, mean, rstd, need_h: bool, need_parameter: bool, need_bias: bool,
):  # fmt: skip
    norm = norm_weight, norm_bias, shift, scale, mean, rstd
    g, *norm_grads = layer_norm_modulate_bwd_ref(dy, x_out, *norm, dx_out)
    dz = g if gate is None else g * gate.to(g.dtype).unsqueeze(1)
    rows = dz.to(h.dtype).flatten(0, 1)
    dh = (rows @ weight).view(h.shape) if need_h else None
    dweight = (rows.t() @ h.flatten(0, 1)).to(parameter_dtype) if need_parameter else None
    dbias = dz.sum((0, 1)).to(bias.dtype) if need_bias else None
    dgate = None if gate is None else (g * branch.to(g.dtype)).sum(1).to(gate.dtype)
    return g.to(x_out.dtype), dh, dweight, dbias, dgate, *norm_grads


_operation = operation(
    _OP,
    _forward,
    _kernel,
    "x_out y branch mean rstd",
    Backward(
        _backward,
        "epg_kernels.linear_residual_norm:linear_residual_norm_bwd",
        "x h parameter bias gate norm_weight norm_bias shift scale",
    ),
)


def linear_residual_norm(
    x: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    gate: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "plain",
    operand: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_out, y): x + gate * (h @ weight^T + bias), in x's dtype, and its modulated norm, in h's or autocast's.

    x: [B, L, N]; h: [B, L, K]; weight: [N, K]; bias, norm_weight, norm_bias: [N]; gate, shift, scale: [B, N], [B, 1, N]
    or None. backend: "plain" (plain PyTorch), "triton" (two kernels forward), "cuda" (the product by the C++/CUDA
    extension, for compute capability 9.0). operand: a copy of weight in the dtype of products, which kernels read
    instead of casting it; "plain" leaves it.
    Raises ValueError for shapes that do not fit and for a backend that cannot run here.
    """
    check_backend(_OP, backend, ("plain", "triton", "cuda"))
    check_norm_shapes(_OP, x, norm_weight, norm_bias, gate=gate, shift=shift, scale=scale)
    check_linear(_OP, "h", h, x, weight, bias)
    dtype = autocast_dtype(h) or h.dtype
    h = h.to(dtype)
    gate, shift, scale = per_sample(gate), per_sample(shift), per_sample(scale)
    if backend == "plain":
        return linear_residual_norm_ref(x, h, weight, bias, norm_weight, norm_bias, gate, shift, scale, eps)
    operand = product_operand(_OP, weight, operand, dtype)
    if backend == "cuda":
        require_installed_triton(_OP)
        require_dtypes(_OP, (torch.bfloat16,), "cuda", h=h)
        require_residual_product(_OP, x, gate, {"h": h, "weight": operand}, {"bias": bias})
    others = weight, norm_weight, norm_bias, shift, scale
    require_triton_norm(_OP, x.shape[2], *others, backend=backend, x=x, h=h, bias=bias, gate=gate)
    norm = norm_weight, norm_bias, gate, shift, scale
    save_branch = gate is not None and needs_gradient(x, h, weight, bias, *norm)
    return _operation(x, h, weight, operand, bias, *norm, eps, save_branch, backend)[:2]


def row_statistics(x: torch.Tensor) -> torch.Tensor:
    """x: [B, L, N] -> mean and sum of squared deviations of each 64 columns of its rows, [2, ceil(N / 64), B * L]."""
    parts = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1).split(STATISTICS_COLUMNS, dim=1)
    means = [part.mean(1) for part in parts]
    squares = [(part - mean[:, None]).square().sum(1) for part, mean in zip(parts, means, strict=True)]
    return torch.stack([torch.stack(means), torch.stack(squares)])


def linear_residual_ref(x, h, weight, bias, gate=None) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_residual` in plain PyTorch."""
    x_out, _ = residual_product_ref(x, h, weight, bias, gate)
    return x_out, row_statistics(x_out)


_residual_operation = operation(
    "linear_residual", linear_residual_ref, "epg_kernels.linear_residual_norm:linear_residual_fwd", "x_out statistics"
)


def linear_residual(
    x: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gate: torch.Tensor | None = None,
    backend: str = "plain",
    operand: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + gate * (h @ weight^T + bias) in x's dtype, the statistics of its rows that `norm_linear` takes).

    Shapes and operand as in `linear_residual_norm`. backend: "plain" or "triton" (one kernel). There is no gradient:
    ValueError if one would be needed, for shapes that do not fit and for a backend that cannot run here.
    """
    op = "linear_residual"
    check_backend(op, backend, ("plain", "triton"))
    check_linear(op, "h", h, x, weight, bias)
    check_shapes(op, dict(zip("BLN", x.shape, strict=True)), gate=(gate, "BN|B1N"))
    refuse_gradient(op, x, h, weight, bias, gate)
    dtype = autocast_dtype(h) or h.dtype
    h, gate = h.to(dtype), per_sample(gate)
    if backend == "plain":
        return linear_residual_ref(x, h, weight, bias, gate)
    require_triton(op, weight, batched=True, x=x, h=h, bias=bias, gate=gate)
    return _residual_operation(x, h, product_operand(op, weight, operand, dtype), bias, gate)


def _weight_gradient_ref(dy, x, dtype: torch.dtype):
    return (dy.t() @ x).to(dtype)


# An operator, because torch.compile does not know of products whose result has another dtype in every version.
_weight_gradient = operation("weight_gradient", _weight_gradient_ref, "epg_kernels._launch:weight_gradient", "dweight")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, operand, bias, *weights):
        ctx.save_for_backward(h, operand)
        ctx.weight_dtype, ctx.bias_dtype = weights[0].dtype, None if bias is None else bias.dtype
        ctx.rows = [weight.shape[0] for weight in weights]
        return F.linear(h, operand, None if bias is None else bias.to(h.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, operand = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dh = (rows @ operand).view(h.shape) if ctx.needs_input_grad[0] else None
        needs_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[2]
        dbias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
        dweights = [None] * len(ctx.rows)
        if any(ctx.needs_input_grad[3:]):
            dweights = _weight_gradient(rows, h.flatten(0, -2), ctx.weight_dtype).split(ctx.rows)
        return dh, None, dbias, *dweights


def linear(
    h: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    bias: torch.Tensor | None = None,
    operand: torch.Tensor | None = None,
) -> torch.Tensor:
    """h @ weight^T + bias, [..., N], in h's dtype or autocast's; differentiable once where weight has another dtype.

    h: [..., K]; weight: [N, K], or several whose rows add up to N; bias: [N] or None; operand: a copy of weight in the
    result's dtype.
    """
    dtype, weights = autocast_dtype(h) or h.dtype, [weight] if isinstance(weight, torch.Tensor) else list(weight)
    if weights[0].dtype == dtype:
        return F.linear(h, weights[0] if len(weights) == 1 else torch.cat(weights), bias)
    h, operand = h.to(dtype), product_operand("linear", weights, operand, dtype)
    if not needs_gradient(h, bias, *weights):
        return F.linear(h, operand, None if bias is None else bias.to(dtype))
    return _Linear.apply(h, operand, bias, *weights)


def require_residual_product(op: str, x, gate, operands: dict[str, torch.Tensor], others: dict[str, torch.Tensor]):
    """Raise ValueError for what `linear_residual_cuda` cannot read, and where it cannot run.

    operands: of all products of the operation; others only have to be on their device.
    """
    require_dtypes(op, (torch.bfloat16, torch.float32), "cuda", x=x, gate=gate)
    require_dtypes(op, FLOATS, "cuda", **others)
    others = others if gate is None else others | {"gate": gate}
    require_gemm_operands(op, x.shape[-1], operands | {"x": x}, others)
    if gate is not None:
        # The kernel reads two values of a row at once.
        odd = not torch.compiler.is_compiling() and gate.data_ptr() % (2 * gate.element_size())
        if gate.stride(1) != 1 or gate.stride(0) % 2 or odd:
            raise ValueError(
                f"{op}: got gate with strides {gate.stride()}, wanted contiguous rows that start at even offsets for "
                "backend='cuda'; call .contiguous() or use backend='plain'"
            )
    require_gemms(op, x.device)


def check_linear(op: str, name: str, h, x, weight, bias) -> None:
    """Raise ValueError unless weight [N, K] and bias [N], if there is one, take h [B, L, K] to x's shape [B, L, N]."""
    check_floating(op, **{name: h}, weight=weight, bias=bias)
    if h.dim() != 3 or weight.dim() != 2 or h.shape[2] != weight.shape[1]:
        raise ValueError(
            f"{op}: got {name} of shape {tuple(h.shape)} and weight of shape {tuple(weight.shape)}, wanted [B, L, K] "
            "and [N, K] with the same K; weight is that of a Linear, one row per output"
        )
    batch, tokens, _ = h.shape
    check_shapes(op, {"B": batch, "L": tokens, "N": weight.shape[0]}, x=(x, "BLN"), bias=(bias, "N"))


def _bytes(shape: tuple[int, int, int, int], itemsize: int, backward: bool = False) -> int:
    """Forward reads x, h and weight, writes x_out, and reads it to write y; training writes the branch beside x_out.

    Backward is that of the norm with its gated branch, and reads the branch's gradient twice, weight and h, and writes
    their gradients.
    """
    batch, tokens, k, n = shape
    rows = batch * tokens
    h, weight, out = rows * k * itemsize, n * k * itemsize, rows * n * itemsize
    if backward:
        return NORM.bytes((batch, tokens, n), itemsize, True) + 2 * out + 2 * h + 2 * weight
    return h + weight + 4 * out + (3 * batch + 3) * n * itemsize


SPEC = OpSpec(  # shapes: (B, L, K, N)
    name=_OP,
    shapes=of_tokens((1584, 1584), (768, 768), (1024, 1024), (1920, 1920), (2688, 2688)),
    odd_shapes=((3, 17, 40, 24), (1, 5, 72, 40), (2, 18, 17, 9)),
    bytes=_bytes,
    multiply_adds=lambda batch, tokens, k, n: batch * tokens * k * n,
)
