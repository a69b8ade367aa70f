"""The kernels of every norm, whatever it is fused with: a gated residual, or another norm before it.

The forward pass makes the row to be normalised, of x alone, of x and a gated branch, or by a first norm of x. It
normalises and modulates it, and writes it in its dtype or, with one scale per row, in float8_e4m3fn. In the backward
pass one program walks over TOKENS tokens of one image and writes their gradients and partial sums over them; two small
kernels then add the partial sums up in a fixed order, so that results are bitwise repeatable.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from epg_kernels._launch import accumulation_dtype, strides, unit_stride
from epg_kernels._quantize import FP8_MAX, in_steps, row_step


@dataclass(frozen=True)
class Config:
    block: int  # columns held by one program: a power of two, at least the width
    rows: int  # rows normalised at a time, so that their loads and sums overlap
    rows_backward: int
    num_warps: int


# 32 lanes x 8 values per warp: one 16-byte access of bf16 per lane and pass.
CONFIGS = (
    Config(256, 16, 8, 4),
    Config(512, 8, 4, 4),
    Config(1024, 4, 1, 4),
    Config(2048, 2, 1, 8),
    Config(4096, 1, 1, 16),
)
MAX_WIDTH = CONFIGS[-1].block

# Tokens per backward program, rounded up to a multiple of rows_backward. 33 cut 258 tokens into 8: at batch 64 the 512
# programs without a branch are all resident at once on the 132 multiprocessors of an H200, four on each; 32 would make
# 576 of them, and a second wave of a few. Where there are more images a program takes several times as many, for fewer
# partial sums, as long as two waves are left.
TOKENS = 33
TWO_WAVES = 2 * 4 * 132
COLUMNS = 64  # columns per program of the summing kernels
TILE = 16  # rows they load at a time


class NormForward(NamedTuple):
    x_out: torch.Tensor | None
    y: torch.Tensor
    row_scale: torch.Tensor | None
    """[B, L] if y is FP8."""
    mean: torch.Tensor
    """[B, L]"""
    rstd: torch.Tensor
    first_mean: torch.Tensor | None
    first_rstd: torch.Tensor | None


class NormBackward(NamedTuple):
    """None for what was not there; dbranch also where it equals dx."""

    dx: torch.Tensor
    dbranch: torch.Tensor | None
    dgate: torch.Tensor | None
    dweight: torch.Tensor
    dbias: torch.Tensor
    dshift: torch.Tensor | None
    dscale: torch.Tensor | None
    dfirst_weight: torch.Tensor | None
    dfirst_bias: torch.Tensor | None
    dlinear_bias: torch.Tensor | None


def config_for(width: int) -> Config:
    return next(config for config in CONFIGS if width <= config.block)


@triton.jit
def _normalised(values, inside, D: tl.constexpr, EPS: tl.constexpr):
    """(values - mean, mean, 1 / standard deviation) of rows."""
    mu = tl.sum(values, 1, keep_dims=True) / D
    centred = tl.where(inside, values - mu, 0.0)
    variance = tl.sum(centred * centred, 1, keep_dims=True) / D
    return centred, mu, tl.rsqrt(variance + tl.full((), EPS, values.dtype))


@triton.jit
def _norm_gradient(dxhat, xhat, inverse_std, D: tl.constexpr):
    """The gradient of what was normalised to xhat, from that of xhat."""
    mean_dxhat = tl.sum(dxhat, 1, keep_dims=True) / D
    return (dxhat - mean_dxhat - xhat * (tl.sum(dxhat * xhat, 1, keep_dims=True) / D)) * inverse_std


@triton.jit
def _norm_modulate_fwd_kernel(
    x, branch, gate, weight, bias, shift, scale, x_out, y, row_scale, mean, rstd,
    first_weight, first_bias, first_mean, first_rstd, tokens,
    stride_x_batch, stride_x_token, stride_branch_batch, stride_branch_token, stride_gate, stride_shift, stride_scale,
    D: tl.constexpr, EPS: tl.constexpr, FP8_MAX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    row = batch * tokens + token
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < D
    exists = token < tokens
    live = inside & exists
    acc_dtype = mean.dtype.element_ty

    values = tl.load(x + batch * stride_x_batch + token * stride_x_token + columns, mask=live, other=0.0)
    values = values.to(acc_dtype)
    if branch is None and first_weight is None and x_out is not None:  # a copy of x in another dtype
        tl.store(x_out + row * D + columns, values.to(x_out.dtype.element_ty), mask=live)
    if branch is not None:
        added = tl.load(
            branch + batch * stride_branch_batch + token * stride_branch_token + columns, mask=live, other=0.0
        ).to(acc_dtype)
        if gate is not None:
            added *= tl.load(gate + batch * stride_gate + columns, mask=inside, other=0.0).to(acc_dtype)
        rounded = (values + added).to(x_out.dtype.element_ty)
        tl.store(x_out + row * D + columns, rounded, mask=live)
        values = rounded.to(acc_dtype)
    if first_weight is not None:
        centred, mu, inverse_std = _normalised(values, inside, D, EPS)
        tl.store(first_mean + row, mu, mask=exists)
        tl.store(first_rstd + row, inverse_std, mask=exists)
        w = tl.load(first_weight + columns, mask=inside, other=0.0).to(acc_dtype)
        b = tl.load(first_bias + columns, mask=inside, other=0.0).to(acc_dtype)
        rounded = (centred * inverse_std * w + b).to(x_out.dtype.element_ty)
        tl.store(x_out + row * D + columns, rounded, mask=live)
        values = rounded.to(acc_dtype)
    centred, mu, inverse_std = _normalised(values, inside, D, EPS)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(acc_dtype)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(acc_dtype)
    out = centred * inverse_std * w + b
    if scale is not None:
        factor = 1.0 + tl.load(scale + batch * stride_scale + columns, mask=inside, other=0.0).to(acc_dtype)
        out = out * factor + tl.load(shift + batch * stride_shift + columns, mask=inside, other=0.0).to(acc_dtype)
    if row_scale is not None:
        largest = tl.max(tl.abs(tl.where(live, out, 0.0)), 1, keep_dims=True)
        step = row_step(largest, FP8_MAX)
        tl.store(row_scale + row, step, mask=exists)
        out = in_steps(out, step, FP8_MAX)

    tl.store(y + row * D + columns, out.to(y.dtype.element_ty), mask=live)
    tl.store(mean + row, mu, mask=exists)
    tl.store(rstd + row, inverse_std, mask=exists)


@triton.jit
def _norm_modulate_bwd_kernel(
    dy, dx_out, dcopy, x, branch, gate, weight, scale, mean, rstd, dx, dbranch, partial,
    first_weight, first_bias, first_mean, first_rstd, tokens,
    stride_dy_batch, stride_dy_token, stride_dx_out_batch, stride_dx_out_token, stride_dcopy_batch, stride_dcopy_token,
    stride_x_batch, stride_x_token, stride_branch_batch, stride_branch_token, stride_gate, stride_scale,
    D: tl.constexpr, BIAS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x is what was normalised: with a branch, the sum that the forward pass wrote; with a first norm, what entered it.

    Without a gate dbranch is dx in another dtype. BIAS: also sum over tokens what leaves last, dbranch or dx.
    """
    chunk = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < D
    acc_dtype = mean.dtype.element_ty

    factor = tl.load(weight + columns, mask=inside, other=0.0).to(acc_dtype)
    if scale is not None:
        factor *= 1.0 + tl.load(scale + batch * stride_scale + columns, mask=inside, other=0.0).to(acc_dtype)
    if gate is not None:
        opening = tl.load(gate + batch * stride_gate + columns, mask=inside, other=0.0).to(acc_dtype)
        sum_gate = tl.zeros([ROWS, BLOCK], acc_dtype)
    if first_weight is not None:
        w = tl.load(first_weight + columns, mask=inside, other=0.0).to(acc_dtype)
        b = tl.load(first_bias + columns, mask=inside, other=0.0).to(acc_dtype)
        sum_first = tl.zeros([ROWS, BLOCK], acc_dtype)
        sum_first_xhat = tl.zeros([ROWS, BLOCK], acc_dtype)
    if BIAS:
        sum_bias = tl.zeros([ROWS, BLOCK], acc_dtype)
    sum_dy = tl.zeros([ROWS, BLOCK], acc_dtype)
    sum_dy_xhat = tl.zeros([ROWS, BLOCK], acc_dtype)
    for first in tl.range(0, TOKENS, ROWS, num_stages=2):
        # TOKENS is a multiple of ROWS.
        token = chunk * TOKENS + first + tl.arange(0, ROWS)[:, None]
        row = batch * tokens + token
        exists = token < tokens
        live = inside & exists
        g = tl.load(dy + batch * stride_dy_batch + token * stride_dy_token + columns, mask=live, other=0.0)
        g = g.to(acc_dtype)
        values = tl.load(x + batch * stride_x_batch + token * stride_x_token + columns, mask=live, other=0.0)
        mu = tl.load(mean + row, mask=exists, other=0.0)
        inverse_std = tl.load(rstd + row, mask=exists, other=0.0)
        # Every load of the rows is issued before their sums, which wait for the whole program.
        if dx_out is not None:
            passed = dx_out + batch * stride_dx_out_batch + token * stride_dx_out_token + columns
            passed = tl.load(passed, mask=live, other=0.0).to(acc_dtype)
        if dcopy is not None:
            copied = dcopy + batch * stride_dcopy_batch + token * stride_dcopy_token + columns
            copied = tl.load(copied, mask=live, other=0.0).to(acc_dtype)
        if gate is not None:
            added = branch + batch * stride_branch_batch + token * stride_branch_token + columns
            added = tl.load(added, mask=live, other=0.0).to(acc_dtype)
        if first_weight is not None:
            first_inverse_std = tl.load(first_rstd + row, mask=exists, other=0.0)
            first_mu = tl.load(first_mean + row, mask=exists, other=0.0)
            first_xhat = tl.where(live, (values.to(acc_dtype) - first_mu) * first_inverse_std, 0.0)
            # what the forward pass wrote, rounded as it was
            values = (first_xhat * w + b).to(dx.dtype.element_ty)
        xhat = tl.where(live, (values.to(acc_dtype) - mu) * inverse_std, 0.0)
        grad = _norm_gradient(g * factor, xhat, inverse_std, D)
        if dx_out is not None:
            grad += passed
        if dcopy is not None:
            grad += copied
        grad = tl.where(live, grad, 0.0)
        if first_weight is not None:
            sum_first += grad
            sum_first_xhat += grad * first_xhat
            grad = _norm_gradient(grad * w, first_xhat, first_inverse_std, D)
        tl.store(dx + row * D + columns, grad.to(dx.dtype.element_ty), mask=live)
        if gate is not None:
            sum_gate += grad * added
            grad *= opening
        if dbranch is not None:
            tl.store(dbranch + row * D + columns, grad.to(dbranch.dtype.element_ty), mask=live)
        if BIAS:
            sum_bias += tl.where(live, grad, 0.0)
        sum_dy += g
        sum_dy_xhat += g * xhat

    GATE: tl.constexpr = 0 if gate is None else 1
    FIRST: tl.constexpr = 0 if first_weight is None else 2
    SUMS: tl.constexpr = 2 + GATE + FIRST + BIAS
    out = partial + (batch * tl.num_programs(0) + chunk) * SUMS * D
    tl.store(out + columns, tl.sum(sum_dy, 0, keep_dims=True), mask=inside)
    tl.store(out + D + columns, tl.sum(sum_dy_xhat, 0, keep_dims=True), mask=inside)
    if gate is not None:
        tl.store(out + 2 * D + columns, tl.sum(sum_gate, 0, keep_dims=True), mask=inside)
    out += (2 + GATE) * D
    if first_weight is not None:
        tl.store(out + columns, tl.sum(sum_first_xhat, 0, keep_dims=True), mask=inside)
        tl.store(out + D + columns, tl.sum(sum_first, 0, keep_dims=True), mask=inside)
    if BIAS:
        tl.store(out + FIRST * D + columns, tl.sum(sum_bias, 0, keep_dims=True), mask=inside)


@triton.jit
def _sum_rows(pointer, rows, stride, columns, inside, TILES: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    total = tl.zeros([TILE, COLUMNS], pointer.dtype.element_ty)
    for tile in range(TILES):
        row = tile * TILE + tl.arange(0, TILE)
        mask = (row < rows)[:, None] & inside[None, :]
        total += tl.load(pointer + row[:, None].to(tl.int64) * stride + columns[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _norm_modulate_bwd_batch_kernel(
    partial, weight, bias, scale, dshift, dscale, dgate, scaled, chunks,
    stride_scale,
    D: tl.constexpr, EXTRA: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums one image's partial sums into dshift, dscale and dgate, and scales them by 1 + scale for the parameters'.

    EXTRA: how many further sums of parameters follow, which are passed on as they are.
    """
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    acc_dtype = partial.dtype.element_ty
    GATE: tl.constexpr = 0 if dgate is None else 1
    SUMS: tl.constexpr = 2 + GATE + EXTRA
    first = partial + batch * chunks * SUMS * D
    sum_dy = _sum_rows(first, chunks, SUMS * D, columns, inside, TILES, TILE, COLUMNS)
    sum_dy_xhat = _sum_rows(first + D, chunks, SUMS * D, columns, inside, TILES, TILE, COLUMNS)
    if dgate is not None:
        sum_gate = _sum_rows(first + 2 * D, chunks, SUMS * D, columns, inside, TILES, TILE, COLUMNS)
        tl.store(dgate + batch * D + columns, sum_gate.to(dgate.dtype.element_ty), mask=inside)
    if scale is not None:
        w = tl.load(weight + columns, mask=inside, other=0.0).to(acc_dtype)
        b = tl.load(bias + columns, mask=inside, other=0.0).to(acc_dtype)
        factor = 1.0 + tl.load(scale + batch * stride_scale + columns, mask=inside, other=0.0).to(acc_dtype)
        tl.store(dshift + batch * D + columns, sum_dy.to(dshift.dtype.element_ty), mask=inside)
        tl.store(dscale + batch * D + columns, (w * sum_dy_xhat + b * sum_dy).to(dscale.dtype.element_ty), mask=inside)
        sum_dy *= factor
        sum_dy_xhat *= factor
    out = scaled + batch * (2 + EXTRA) * D + columns
    tl.store(out, sum_dy, mask=inside)
    tl.store(out + D, sum_dy_xhat, mask=inside)
    for extra in tl.static_range(EXTRA):
        values = first + (2 + GATE + extra) * D
        tl.store(
            out + (2 + extra) * D,
            _sum_rows(values, chunks, SUMS * D, columns, inside, TILES, TILE, COLUMNS),
            mask=inside,
        )


@triton.jit
def _norm_modulate_bwd_parameter_kernel(
    sums, dbias, dweight, dfirst_weight, dfirst_bias, dlinear_bias, rows,
    D: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One parameter, the program's second number, a row of `sums`: dbias, dweight, and those of the others given."""
    parameter = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    total = _sum_rows(sums + parameter * D, rows, tl.num_programs(1) * D, columns, inside, TILES, TILE, COLUMNS)
    if parameter == 0:
        tl.store(dbias + columns, total.to(dbias.dtype.element_ty), mask=inside)
    elif parameter == 1:
        tl.store(dweight + columns, total.to(dweight.dtype.element_ty), mask=inside)
    if dfirst_weight is not None:
        if parameter == 2:
            tl.store(dfirst_weight + columns, total.to(dfirst_weight.dtype.element_ty), mask=inside)
        elif parameter == 3:
            tl.store(dfirst_bias + columns, total.to(dfirst_bias.dtype.element_ty), mask=inside)
    if dlinear_bias is not None:  # noqa: SIM102 (known when the kernel is compiled, the other is not)
        if parameter == tl.num_programs(1) - 1:
            tl.store(dlinear_bias + columns, total.to(dlinear_bias.dtype.element_ty), mask=inside)


def launch_forward(
    x, branch, gate, weight, bias, shift, scale, eps: float, out_dtype=None, first_norm=None, copy_dtype=None
) -> NormForward:
    """The row that is normalised (x_out; None if it is x, of which it is a copy if that has a dtype) and its norm.

    x, branch: [B, L, D]; weight, bias: [D]; gate, shift, scale: [B, D]. y has out_dtype, by default x's dtype.
    first_norm: weight and bias [D] of a norm whose result is normalised again, without a branch.
    """
    batch, tokens, width = x.shape
    config = config_for(width)
    x, branch, gate, shift, scale = map(unit_stride, (x, branch, gate, shift, scale))
    x_dtype = copy_dtype if branch is None and first_norm is None else x.dtype
    x_out = None if x_dtype is None else torch.empty(x.shape, dtype=x_dtype, device=x.device)
    y = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    mean = torch.empty((batch, tokens), dtype=accumulation_dtype(x), device=x.device)
    rstd = torch.empty_like(mean)
    row_scale = torch.empty_like(mean) if y.dtype == torch.float8_e4m3fn else None
    first_weight, first_bias = (None, None) if first_norm is None else (p.contiguous() for p in first_norm)
    first_mean, first_rstd = (None if first_norm is None else torch.empty_like(mean) for _ in range(2))
    with torch.cuda.device_of(x):
        _norm_modulate_fwd_kernel[(triton.cdiv(tokens, config.rows), batch)](
            x, branch, gate, weight.contiguous(), bias.contiguous(), shift, scale, x_out, y, row_scale, mean, rstd,
            first_weight, first_bias, first_mean, first_rstd, tokens,
            *strides(x, 2), *strides(branch, 2), *strides(gate), *strides(shift), *strides(scale),
            D=width, EPS=eps, FP8_MAX=FP8_MAX, ROWS=config.rows, BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip
    return NormForward(x_out, y, row_scale, mean, rstd, first_mean, first_rstd)


def norm_modulate_fp8(x, branch, gate, first_weight, first_bias, weight, bias, shift, scale, eps: float):
    """(x_out, None if that is x, y / row_scale, row_scale)."""
    first = None if first_weight is None else (first_weight, first_bias)
    done = launch_forward(x, branch, gate, weight, bias, shift, scale, eps, torch.float8_e4m3fn, first)
    return done.x_out, done.y, done.row_scale


def launch_backward(
    dy, dx_out, x, branch, gate, weight, bias, shift, scale, mean, rstd,
    dcopy=None, branch_dtype=None, first_norm=None, linear_bias=None,
) -> NormBackward:  # fmt: skip
    """Gradients of all that entered `launch_forward`.

    x: [B, L, D], what was normalised; dx_out, dcopy: gradients that reach it past the norm, through itself and through
    its copy. branch_dtype: also return dx in this dtype as dbranch, where there is no gate. first_norm: weight, bias,
    mean and rstd of a first norm, which x entered. linear_bias: a parameter [D] that was added to the branch, or to x
    where there is none.
    """
    batch, tokens, width = x.shape
    config = config_for(width)
    dy, dx_out, dcopy, x, branch, gate, scale = map(unit_stride, (dy, dx_out, dcopy, x, branch, gate, scale))
    weight, bias = weight.contiguous(), bias.contiguous()
    per_program = _tokens_per_program(config, batch, tokens)
    chunks = triton.cdiv(tokens, per_program)

    def empty(like: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
        return None if like is None else torch.empty(shape, dtype=like.dtype, device=x.device)

    dx, dbranch = empty(x, x.shape), None if gate is None else empty(branch, x.shape)
    if gate is None and branch_dtype not in (None, x.dtype):
        dbranch = torch.empty(x.shape, dtype=branch_dtype, device=x.device)
    first_weight, first_bias, first_mean, first_rstd = first_norm or (None,) * 4
    dfirst_weight, dfirst_bias = empty(first_weight, (width,)), empty(first_bias, (width,))
    dlinear_bias = empty(linear_bias, (width,))
    extra = 2 * (first_weight is not None) + (linear_bias is not None)
    dgate, dscale = empty(gate, (batch, width)), empty(scale, (batch, width))
    dshift = None if scale is None else empty(shift, (batch, width))
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    sums = empty(mean, (batch * chunks, 2 + (gate is not None) + extra, width))
    columns = triton.cdiv(width, COLUMNS)
    with torch.cuda.device_of(x):
        _norm_modulate_bwd_kernel[(chunks, batch)](
            dy, dx_out, dcopy, x, branch, gate, weight, scale, mean, rstd, dx, dbranch, sums,
            first_weight, first_bias, first_mean, first_rstd, tokens,
            *strides(dy, 2), *strides(dx_out, 2), *strides(dcopy, 2),
            *strides(x, 2), *strides(branch, 2), *strides(gate), *strides(scale),
            D=width, BIAS=linear_bias is not None, TOKENS=per_program,
            ROWS=config.rows_backward, BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip
        if scale is not None or gate is not None:
            scaled = empty(mean, (batch, 2 + extra, width))
            _norm_modulate_bwd_batch_kernel[(columns, batch)](
                sums, weight, bias, scale, dshift, dscale, dgate, scaled, chunks, *strides(scale),
                D=width, EXTRA=extra, TILES=_tiles(chunks), TILE=TILE, COLUMNS=COLUMNS,
            )  # fmt: skip
            sums = scaled
        _norm_modulate_bwd_parameter_kernel[(columns, 2 + extra)](
            sums, dbias, dweight, dfirst_weight, dfirst_bias, dlinear_bias, sums.shape[0],
            D=width, TILES=_tiles(sums.shape[0]), TILE=TILE, COLUMNS=COLUMNS,
        )  # fmt: skip
    gradients = dx, dbranch, dgate, dweight, dbias, dshift, dscale
    return NormBackward(*gradients, dfirst_weight, dfirst_bias, dlinear_bias)


def _tokens_per_program(config: Config, batch: int, tokens: int) -> int:
    many = TOKENS
    while many < tokens and batch * triton.cdiv(tokens, 2 * many) >= TWO_WAVES:
        many *= 2
    return triton.cdiv(many, config.rows_backward) * config.rows_backward


def _tiles(rows: int) -> int:
    """Tiles that hold `rows`, rounded up to a power of two: few compilations, whatever the batch size."""
    return triton.next_power_of_2(triton.cdiv(rows, TILE))
