"""x + gate * branch, then LayerNorm with affine parameters and adaLN modulation of it, in one pass each way."""

import torch

from epg_kernels import AotCase
from epg_kernels._norm_modulate import launch_backward, launch_forward, row_cases, summing_cases


def gate_residual_norm_modulate_fwd(
    x, branch, gate, weight, bias, shift, scale, eps: float, out_dtype=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns x + gate * branch in x's dtype, y in out_dtype (default: x's), mean and rstd [B, L].

    x, branch: [B, L, D]; weight, bias: [D]; gate: [B, D] or None for 1; shift, scale: [B, D] or both None.
    """
    done = launch_forward(x, branch, gate, weight, bias, shift, scale, eps, out_dtype)
    return done.x_out, done.y, done.mean, done.rstd


def gate_residual_norm_modulate_fp8(x, branch, gate, weight, bias, shift, scale, eps):
    """Returns x + gate * branch, y / row_scale [B, L, D] in float8_e4m3fn and row_scale [B, L]."""
    done = launch_forward(x, branch, gate, weight, bias, shift, scale, eps, torch.float8_e4m3fn)
    return done.x_out, done.y, done.row_scale


def gate_residual_norm_modulate_bwd(
    dx_out, dy, x_out, branch, gate, weight, bias, shift, scale, mean, rstd
) -> tuple[torch.Tensor | None, ...]:
    """Returns dx, dbranch, dgate, dweight, dbias, dshift, dscale.

    dbranch and dgate are None without a gate (then dbranch equals dx), dshift and dscale without modulation.
    """
    return launch_backward(dy, dx_out, x_out, branch, gate, weight, bias, shift, scale, mean, rstd)[:7]


def aot_cases() -> list[AotCase]:
    """One width each: `linear_residual_norm` has the same kernels at the presets' widths, with more to sum."""
    cases = row_cases(1584, "bf16", residual=True) + row_cases(1584, "fp32", residual=True)
    cases += row_cases(1584, "bf16", residual=True, fp8=True)
    return cases + summing_cases(1584, "bf16", residual=True)
