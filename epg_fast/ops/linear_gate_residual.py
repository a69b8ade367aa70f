"""Linear layer whose result is gated and added to a residual: the end of a block's half.

    out = x + gate * (h @ weight^T + bias)

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), adaLN-Zero blocks: attention's projection
and the second half of the MLP.

Shapes: x: [B, L, N]; gate: [B, N] or [B, 1, N]; h: [B, L, K]; weight: [N, K]; bias: [N]; out: [B, L, N].
Dtypes: h any floating dtype, or under autocast its dtype; weight and bias are converted to h's dtype. x and gate any
floating dtypes; out has x's dtype. Backend "cuda": h bfloat16, x and gate in h's dtype or float32 (the
residual of a network under autocast is float32 until the first long skip), h, weight and x contiguous, K and N
multiples of 8; products are accumulated and everything after them is computed in float32, and out is rounded once.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients.

With g the gradient of out: dx = g, dz = gate * g, dh = dz @ weight, dweight = dz^T @ h, dbias = sum dz, and
dgate = sum_l g * z with z = h @ weight^T + bias, which is computed again instead of being kept.
"""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from epg_fast.ops.backends import autocast_dtype, check_backend, require_dtypes, require_gemm_operands
from epg_fast.ops.extension import require_gemms
from epg_fast.ops.layer_norm_modulate import per_sample
from epg_fast.ops.spec import OpSpec

_OP = "linear_gate_residual"


def linear_gate_residual_ref(
    x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The formula in plain PyTorch; shapes and dtypes as in the module's docstring."""
    z = F.linear(h, weight.to(h.dtype), bias.to(h.dtype))
    return (x + per_sample(gate).unsqueeze(1) * z).to(x.dtype)


@torch.library.custom_op("epg_fast::linear_gate_residual", mutates_args=(), device_types="cpu")
def _forward_op(
    x: torch.Tensor, gate: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return linear_gate_residual_ref(x, gate, h, weight, bias)


@_forward_op.register_kernel("cuda")
def _forward_cuda(x, gate, h, weight, bias):
    out = torch.empty_like(x)
    torch.ops.epg_fast.linear_gate_residual_out(out, None, x, gate, h, weight, bias.to(h.dtype).contiguous())
    return out


@_forward_op.register_fake
def _(x, gate, h, weight, bias):
    return torch.empty_like(x)


def _setup_context(ctx, inputs, output):
    x, *saved = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(*saved)


def _backward(ctx, dout):
    gate, h, weight, bias = ctx.saved_tensors
    needs_x, needs_gate, needs_h, needs_weight, needs_bias = ctx.needs_input_grad
    acc_dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    dz = dout.to(acc_dtype) * gate.to(acc_dtype).unsqueeze(1)
    # The products have nothing left to fuse, and cuBLAS sets their ceiling.
    rows = dz.to(h.dtype).flatten(0, 1)
    dh = (rows @ weight).view(h.shape) if needs_h else None
    dweight = rows.t() @ h.flatten(0, 1) if needs_weight else None
    dbias = dz.sum((0, 1)).to(bias.dtype) if needs_bias else None
    dgate = None
    if needs_gate:
        dgate = (dout.to(acc_dtype) * F.linear(h, weight, bias.to(h.dtype))).sum(1).to(gate.dtype)
    return dout if needs_x else None, dgate, dh, dweight, dbias


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.epg_fast.linear_gate_residual)
def _forward_flops(x_shape, gate_shape, h_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    batch, tokens, k = h_shape
    return 2 * batch * tokens * k * weight_shape[0]


def linear_gate_residual(
    x: torch.Tensor,
    gate: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    backend: str = "plain",
) -> torch.Tensor:
    """x + gate * (h @ weight^T + bias).

    x: [B, L, N]; gate: [B, N] or [B, 1, N]; h: [B, L, K]; weight: [N, K]; bias: [N]. Returns [B, L, N] in x's dtype.
    backend: "plain" (plain PyTorch), "cuda" (one kernel of the C++/CUDA extension, for compute capability 9.0) or.
    Raises ValueError for shapes that do not fit and for a backend that cannot run here.
    """
    check_backend(_OP, backend, ("plain", "cuda"))
    _check_shapes(x, gate, h, weight, bias)
    dtype = autocast_dtype(h) or h.dtype
    h, weight = h.to(dtype), weight.to(dtype)
    if backend != "cuda":
        return linear_gate_residual_ref(x, gate, h, weight, bias)
    gate = per_sample(gate)
    _require_cuda(x, gate, h, weight, bias)
    return _forward_op(x, gate, h, weight, bias)


def _require_cuda(x, gate, h, weight, bias) -> None:
    require_dtypes(_OP, (torch.bfloat16,), "cuda", h=h)
    require_dtypes(_OP, (h.dtype, torch.float32), "cuda", x=x, gate=gate)
    require_gemm_operands(_OP, weight.shape[0], {"h": h, "weight": weight, "x": x}, {"gate": gate, "bias": bias})
    # The kernel reads two values of a row at once.
    odd = not torch.compiler.is_compiling() and gate.data_ptr() % (2 * gate.element_size())
    if gate.stride(1) != 1 or gate.stride(0) % 2 or odd:
        raise ValueError(
            f"{_OP}: got gate with strides {gate.stride()}, wanted contiguous rows that start at even offsets for "
            "backend='cuda'; call .contiguous() or use backend='plain'"
        )
    require_gemms(_OP, h.device)


def _check_shapes(x, gate, h, weight, bias) -> None:
    for name, tensor in (("x", x), ("gate", gate), ("h", h), ("weight", weight), ("bias", bias)):
        if not tensor.is_floating_point():
            raise ValueError(f"{_OP}: got {name} in {tensor.dtype}, wanted a floating dtype; convert it")
    if h.dim() != 3 or weight.dim() != 2 or h.shape[2] != weight.shape[1]:
        raise ValueError(
            f"{_OP}: got h of shape {tuple(h.shape)} and weight of shape {tuple(weight.shape)}, wanted [B, L, K] and "
            "[N, K] with the same K; weight is that of a Linear, one row per output"
        )
    batch, tokens, width = h.shape[0], h.shape[1], weight.shape[0]
    if x.shape != (batch, tokens, width):
        raise ValueError(f"{_OP}: got x of shape {tuple(x.shape)}, wanted [{batch}, {tokens}, {width}]")
    if gate.shape not in ((batch, width), (batch, 1, width)):
        raise ValueError(
            f"{_OP}: got gate of shape {tuple(gate.shape)}, wanted [{batch}, {width}] or [{batch}, 1, {width}]"
        )
    if bias.shape != (width,):
        raise ValueError(f"{_OP}: got bias of shape {tuple(bias.shape)}, wanted [{width}]")


def _bytes(shape: tuple[int, int, int, int], itemsize: int, backward: bool = False) -> int:
    """Forward reads x, gate, h, weight and bias and writes out.

    Backward reads g for dz, dbias and dgate, writes dz, reads dz and weight for dh, dz and h for dweight, h and weight
    for z, which it writes and reads for dgate, and writes dh, dweight, dgate and dbias; dx is g.
    """
    batch, tokens, k, n = shape
    h, weight, out = batch * tokens * k * itemsize, n * k * itemsize, batch * tokens * n * itemsize
    vectors = (batch + 1) * n * itemsize
    if backward:
        return 6 * out + 3 * h + 3 * weight + 2 * vectors
    return 2 * out + h + weight + vectors


def _flops(shape: tuple[int, int, int, int], backward: bool = False) -> int:
    """Of the matrix products alone: one forward, three backward, of which one computes z again."""
    batch, tokens, k, n = shape
    return (6 if backward else 2) * batch * tokens * k * n


SPEC = OpSpec(
    name=_OP,
    shapes=(
        (64, 258, 6336, 1584),
        (64, 258, 1584, 1584),
        (64, 258, 3072, 768),
        (64, 258, 4096, 1024),
        (64, 258, 7680, 1920),
        (64, 258, 10752, 2688),
    ),
    odd_shapes=((3, 17, 40, 24), (1, 5, 72, 40), (5, 130, 64, 184), (2, 1, 8, 8)),
    bytes=_bytes,
    flops=_flops,
)
