"""Linear layer over a long skip connection, and the norms after it; its backward pass."""

import torch

from epg_kernels._column_sums import column_sums
from epg_kernels._launch import weight_gradient
from epg_kernels._matmul import linear, rows_of
from epg_kernels._norm_modulate import launch_backward, launch_forward


def skip_linear_fwd(x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """concat[x, skip] @ weight^T + bias, of one dtype."""
    return linear(x, skip, weight, bias)[0]


def skip_norms_fwd(
    z, norm_weight, norm_bias, next_weight, next_bias, next_shift, next_scale, eps: float
) -> tuple[torch.Tensor | None, ...]:
    """(y, the next norm of y, z, mean and rstd of z, of y), None for what norms that are not there would make."""
    if norm_weight is None:
        return z, *[None] * 6
    if next_weight is None:
        done = launch_forward(z, None, None, norm_weight, norm_bias, None, None, eps)
        return done.y, None, z, done.mean, done.rstd, None, None
    first = norm_weight, norm_bias
    done = launch_forward(z, None, None, next_weight, next_bias, next_shift, next_scale, eps, first_norm=first)
    return done.x_out, done.y, z, done.first_mean, done.first_rstd, done.mean, done.rstd


def skip_linear_bwd(
    dy, dnext, x, skip, weight, weight_dtype: torch.dtype, bias, norm_weight, norm_bias,
    next_weight, next_bias, next_shift, next_scale, z, mean, rstd, next_mean, next_rstd,
    need_x: bool, need_skip: bool, need_weight: bool, need_bias: bool,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """(dx, dskip, dweight in weight_dtype, dbias, then the gradients of the norms' parameters).

    dy: the gradient of y, dnext: of the next norm's result. What is of a norm that is not there is None.
    """
    linear_bias = bias if need_bias else None
    norms = [None] * 6
    if norm_weight is None:
        dz, dbias = rows_of(dy), None
        if need_bias:
            dbias = column_sums(dz, bias.dtype)
    elif next_weight is None:
        given = z, None, None, norm_weight, norm_bias, None, None, mean, rstd
        done = launch_backward(dy, None, *given, linear_bias=linear_bias)
        dz, dbias, norms[:2] = rows_of(done.dx), done.dlinear_bias, (done.dweight, done.dbias)
    else:
        first = norm_weight, norm_bias, mean, rstd
        dnext = torch.zeros_like(z) if dnext is None else dnext
        given = z, None, None, next_weight, next_bias, next_shift, next_scale, next_mean, next_rstd
        done = launch_backward(dnext, dy, *given, first_norm=first, linear_bias=linear_bias)
        dz, dbias = rows_of(done.dx), done.dlinear_bias
        norms = [done.dfirst_weight, done.dfirst_bias, done.dweight, done.dbias, done.dshift, done.dscale]
    split = x.shape[-1]
    # Nothing is left to fuse into these products, and cuBLAS sets their ceiling.
    dx = torch.mm(dz, weight[:, :split]).view(x.shape) if need_x else None
    dskip = torch.mm(dz, weight[:, split:]).view(skip.shape) if need_skip else None
    dweight = None
    if need_weight:
        dweight = torch.empty(weight.shape, dtype=weight_dtype, device=weight.device)
        weight_gradient(dz, rows_of(x), weight_dtype, out=dweight[:, :split])
        weight_gradient(dz, rows_of(skip), weight_dtype, out=dweight[:, split:])
    return dx, dskip, dweight, dbias, *norms
