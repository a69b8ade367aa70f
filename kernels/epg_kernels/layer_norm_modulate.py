"""LayerNorm with affine parameters and adaLN modulation in one pass, forward and backward."""

import torch

from epg_kernels import AotCase
from epg_kernels._norm_modulate import launch_backward, launch_forward, row_cases, summing_cases


def layer_norm_modulate_fwd(
    x, weight, bias, shift, scale, eps: float, out_dtype=None, copy_dtype=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns y [B, L, D] in out_dtype (default: x's), mean and rstd [B, L], and x in copy_dtype, if that is wanted.

    x: [B, L, D]; weight, bias: [D]; shift, scale: [B, D] or both None.
    """
    done = launch_forward(x, None, None, weight, bias, shift, scale, eps, out_dtype, copy_dtype=copy_dtype)
    return done.y, done.mean, done.rstd, done.x_out


def layer_norm_modulate_fp8(x, weight, bias, shift, scale, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y / row_scale [B, L, D] in float8_e4m3fn and row_scale [B, L]."""
    done = launch_forward(x, None, None, weight, bias, shift, scale, eps, torch.float8_e4m3fn)
    return done.y, done.row_scale


def layer_norm_modulate_bwd(
    dx_out, dcopy, dy, x, weight, bias, shift, scale, mean, rstd
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Returns dx, dweight, dbias, dshift, dscale (the last two None when scale is).

    dx_out, dcopy: the gradients that reach x past the norm, through itself and through its copy, or None.
    """
    done = launch_backward(dy, dx_out, x, None, None, weight, bias, shift, scale, mean, rstd, dcopy=dcopy)
    return done.dx, done.dweight, done.dbias, done.dshift, done.dscale


def aot_cases() -> list[AotCase]:
    """The row kernels in every configuration and at the presets' widths; float32 and the summing kernels once."""
    cases = []
    for width in (256, 512, 768, 1024, 1584, 1920, 2688):
        cases += row_cases(width, "bf16")
    for width in (768, 1584, 2688):
        cases += row_cases(width, "bf16", fp8=True)
    cases += row_cases(1584, "fp32")
    return cases + summing_cases(1584, "bf16")
