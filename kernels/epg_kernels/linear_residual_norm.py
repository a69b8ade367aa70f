"""A linear layer added to the residual in its product's epilogue; the backward pass of that and the norm of the sum."""

import torch

from epg_kernels._launch import weight_gradient
from epg_kernels._matmul import linear, parts_of, rows_of
from epg_kernels._norm_modulate import launch_backward


def linear_residual(x, h, weight, bias, gate, save_branch: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(x_out, the branch, which the gate scales, if it is to be saved)."""
    return linear(h, None, weight, bias, residual=x, gate=gate, tokens=x.shape[1], save_branch=save_branch)


def linear_residual_fwd(x, h, weight, bias, gate) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_out, the statistics of its rows)."""
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    statistics = torch.empty((2, parts_of(width), rows), dtype=torch.float32, device=x.device)
    written = {"statistics": statistics, "dependent": True}
    return linear(h, None, weight, bias, residual=x, gate=gate, tokens=x.shape[1], **written)[0], statistics


def linear_residual_norm_bwd(
    dx_out, dy, x_out, branch, h, weight, weight_dtype: torch.dtype, bias, gate,
    norm_weight, norm_bias, shift, scale, mean, rstd, need_h: bool, need_weight: bool, need_bias: bool,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """(dx, dh, dweight in weight_dtype, dbias, dgate, dnorm_weight, dnorm_bias, dshift, dscale)."""
    norm = norm_weight, norm_bias, shift, scale, mean, rstd
    linear_bias = bias if need_bias else None
    branch = None if gate is None else branch
    done = launch_backward(dy, dx_out, x_out, branch, gate, *norm, branch_dtype=h.dtype, linear_bias=linear_bias)
    dbranch = rows_of(done.dx if done.dbranch is None else done.dbranch)
    # Nothing is left to fuse into these products, and cuBLAS sets their ceiling.
    dh = torch.mm(dbranch, weight).view(h.shape) if need_h else None
    dweight = weight_gradient(dbranch, rows_of(h), weight_dtype) if need_weight else None
    return done.dx, dh, dweight, done.dlinear_bias, done.dgate, done.dweight, done.dbias, done.dshift, done.dscale
