"""x + gate * branch, then LayerNorm with affine parameters and adaLN modulation of it, in one pass each way."""

from epg_kernels._norm_modulate import launch_backward, launch_forward


def gate_residual_norm_modulate_fwd(x, branch, gate, weight, bias, shift, scale, eps: float, out_dtype=None):
    """(x_out, y, mean, rstd)."""
    done = launch_forward(x, branch, gate, weight, bias, shift, scale, eps, out_dtype)
    return done.x_out, done.y, done.mean, done.rstd


def gate_residual_norm_modulate_bwd(dx_out, dy, x_out, branch, gate, weight, bias, shift, scale, mean, rstd):
    """(dx, dbranch, dgate, dweight, dbias, dshift, dscale); without a gate dbranch, which is dx then, is None."""
    return launch_backward(dy, dx_out, x_out, branch, gate, weight, bias, shift, scale, mean, rstd)[:7]
