"""The step between two half-blocks: a gated residual, then LayerNorm and adaLN modulation of its result.

    x_out = x + gate * branch                                     gate left out: 1
    y = LayerNorm(x_out) * weight + bias                          over the last axis, biased variance
    y = y * (1 + scale) + shift                                   only with modulation

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), adaLN-Zero blocks; without gate and
modulation the step of a pre-LayerNorm transformer.

Dtypes: any floating dtypes, mixed freely. Arithmetic is float32 (float64 when x is float64); x_out is rounded once, to
x's dtype, and what is normalised is the rounded x_out; y has out_dtype, by default x's dtype.
`gate_residual_norm_modulate_fp8` returns y as `layer_norm_modulate_fp8` does.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients.

With g the gradient of x_out, the one that arrives there plus the one through the norm: dx = g, dbranch = gate * g,
dgate = sum_l branch * g.
"""

import torch

from epg_fast.ops.layer_norm_modulate import (
    checked_norm,
    layer_norm_modulate_bwd_ref,
    layer_norm_modulate_ref,
    norm_bytes,
    norm_fp8,
    norm_statistics,
)
from epg_fast.ops.quantize_rows import gated_sum_ref
from epg_fast.ops.registration import Backward, operation
from epg_fast.ops.spec import OpSpec

_KERNELS = "epg_kernels.gate_residual_norm_modulate"


def gate_residual_norm_modulate_ref(
    x, branch, gate, weight, bias, shift=None, scale=None, eps=1e-5, out_dtype=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gate_residual_norm_modulate` in plain PyTorch."""
    x_out = gated_sum_ref(x, branch, gate)
    return x_out, layer_norm_modulate_ref(x_out, weight, bias, shift, scale, eps, out_dtype)


def _forward(x, branch, gate, weight, bias, shift, scale, eps: float, out_dtype: torch.dtype | None):
    x_out, y = gate_residual_norm_modulate_ref(x, branch, gate, weight, bias, shift, scale, eps, out_dtype)
    return x_out, y, *norm_statistics(x_out, eps)


def _backward(dx_out, dy: torch.Tensor, x_out, branch, gate, weight, bias, shift, scale, mean, rstd):
    """Without a gate dbranch, which is dx then, and dgate are None."""
    g, *rest = layer_norm_modulate_bwd_ref(dy, x_out, weight, bias, shift, scale, mean, rstd, dx_out)
    dbranch = dgate = None
    if gate is not None:
        dbranch = (g * gate.to(g.dtype).unsqueeze(1)).to(branch.dtype)
        dgate = (g * branch.to(g.dtype)).sum(1).to(gate.dtype)
    return g.to(x_out.dtype), dbranch, dgate, *rest


_operation = operation(
    "gate_residual_norm_modulate",
    _forward,
    f"{_KERNELS}:gate_residual_norm_modulate_fwd",
    "x_out y mean rstd",
    Backward(
        _backward,
        f"{_KERNELS}:gate_residual_norm_modulate_bwd",
        "x branch gate weight bias shift scale",
        others=lambda made, given: {} if given["gate"] is not None else {"branch": made["x"]},
        only_with={"branch": "gate"},
    ),
)


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
    op = "gate_residual_norm_modulate"
    shift, scale, gate = checked_norm(op, backend, x, weight, bias, shift, scale, gate, branch)
    run = _operation if backend == "triton" else gate_residual_norm_modulate_ref
    return run(x, branch, gate, weight, bias, shift, scale, eps, out_dtype)[:2]


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
    return norm_fp8(op, backend, x, weight, bias, shift, scale, eps, branch, gate)


def _bytes(shape: tuple[int, int, int], itemsize: int, backward: bool = False) -> int:
    """Forward reads x and branch and writes x_out and y; backward reads both gradients, x_out and branch and writes dx
    and dbranch."""
    return norm_bytes(shape, itemsize, *((6, 5, 4) if backward else (4, 3, 2)))


SPEC = OpSpec(
    name="gate_residual_norm_modulate",
    shapes=((64, 258, 1584), (256, 258, 768), (64, 258, 1024), (64, 258, 1920), (64, 258, 2688)),
    odd_shapes=((3, 17, 40), (1, 199, 40), (1, 17, 768), (2, 3, 1584)),
    bytes=_bytes,
)
