"""Matrix products with an epilogue: epilogue(concat[x, skip] @ weight^T + bias), and the gradient through GELU.

Operands are float32, 16 bits or float8_e4m3fn with scales; the result, or a copy of it, may be float8_e4m3fn, too.

One program computes one tile of the result, in an order that keeps what neighbours share in the L2 cache. The K loop
reads x and then skip, so the concatenation is never stored. Where the GPU has TMA and rows start at multiples of 16
bytes, operands come through it, and it pads ragged edges with zeros by itself; otherwise through masked pointers.

A norm of x may be applied to its tiles on their way into the product. Its statistics are combined from those of PART
columns each, which the epilogue of the product that made x has left: nobody reads x for their sake.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from epg_kernels._column_sums import sum_partial_sums
from epg_kernels._launch import capability, matmul_precision, strides, unit_stride
from epg_kernels._quantize import FP8_MAX, in_steps, row_step


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool


# Two programs fit on a multiprocessor (96 KB of shared memory, 4 warps of 255 registers or 8 of 128): the tensor cores
# work on one's tile while the other's epilogue runs. 128 x 256 tiles would read a quarter less from the L2 cache, but
# run alone. Float32 has 8 warps: an epilogue that reads a gate and a residual would spill in 4.
BY_TMA = Config(128, 128, 64, num_warps=4, num_stages=3, tma=True)
BY_TMA_TF32 = Config(128, 128, 32, num_warps=8, num_stages=3, tma=True)
BY_POINTERS = Config(128, 128, 32, num_warps=8, num_stages=4, tma=False)
BY_POINTERS_TF32 = Config(128, 128, 32, num_warps=8, num_stages=3, tma=False)
IEEE = Config(128, 64, 16, num_warps=8, num_stages=2, tma=False)  # no tensor cores: operands live in registers
# A norm of x holds a tile of it in registers on its way to the tensor cores: they have to be those of 8 warps.
NORMED_BY_TMA = replace(BY_TMA, num_warps=8)
# Of one image there are too few tiles of that size for all multiprocessors: smaller ones, and more loads under way.
FEW_BY_TMA = Config(64, 64, 64, num_warps=4, num_stages=6, tma=True)
MULTIPROCESSORS = 132  # of an H100 or H200
# The sums of one step on K, multiplied by its scale, are added up outside of the tensor cores, which keep fewer bits of
# a sum of FP8 products than float32 has: two tiles of sums in the registers of 8 warps, and one program on a
# multiprocessor. A step is as wide as a scale's columns, and so is a tile, which makes them.
BY_TMA_FP8 = Config(128, 128, 128, num_warps=8, num_stages=4, tma=True)
BY_POINTERS_FP8 = Config(128, 128, 128, num_warps=8, num_stages=2, tma=False)

PART = 64  # columns of a tile that an epilogue takes at a time, which costs less shared memory and fewer registers

GROUP_M = 8  # rows of tiles whose programs follow each other column by column: they share weight in the L2 cache


def config_for(dtype: torch.dtype, precision: str, tma: bool) -> Config:
    if dtype == torch.float8_e4m3fn:
        return BY_TMA_FP8 if tma else BY_POINTERS_FP8
    if dtype != torch.float32:
        return BY_TMA if tma else BY_POINTERS
    if precision == "ieee":
        return IEEE
    return BY_TMA_TF32 if tma else BY_POINTERS_TF32


def linear_config(dtype: torch.dtype, precision: str, tma: bool, rows: int, columns: int, normed: bool) -> Config:
    """Of `linear`."""
    config = config_for(dtype, precision, tma)
    if config is not BY_TMA:
        return config
    if math.prod(_grid(config, rows, columns)) < MULTIPROCESSORS:
        return FEW_BY_TMA
    return NORMED_BY_TMA if normed else config


@triton.jit
def gaussian_tail(u, EXACT: tl.constexpr):
    """1 - Phi(u) for u >= 0; unless EXACT to a relative error of 1.5e-5 up to u = 7, where it is 1e-12."""
    if EXACT:
        tail = 0.5 - 0.5 * tl.erf(u * 0.7071067811865476)
    else:
        # A polynomial for its logarithm: a third of erf's instructions, and float16 rounds sixteen times as coarsely.
        p = -1.59717368e-06 * u + 5.63956733e-05
        p = p * u - 8.85859230e-04
        p = p * u + 8.31808749e-03
        p = p * u - 5.35469396e-02
        p = p * u - 4.58890226e-01
        p = p * u - 1.15109186e00
        tail = tl.exp2(p * u - 1.0)
    return tail


@triton.jit
def gelu(z, EXACT: tl.constexpr):
    """z Phi(z) = max(z, 0) - |z| (1 - Phi(|z|))."""
    u = tl.minimum(tl.abs(z), 16.0, propagate_nan=tl.PropagateNan.ALL)  # infinity times zero would be NaN
    return tl.maximum(z, 0.0) - u * gaussian_tail(u, EXACT)


@triton.jit
def gelu_gradient(z, EXACT: tl.constexpr):
    """Phi(z) + z phi(z)."""
    tail = gaussian_tail(tl.abs(z), EXACT)
    density = 0.3989422804014327 * tl.exp2(z * z * -0.7213475204444817)
    return tl.where(z > 0, 1.0 - tail, tail) + z * density


@triton.jit
def _tile(source, row, column, stride, rows, columns, TMA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """source[row : row + BLOCK_R, column : column + BLOCK_C], zeros beyond its edges."""
    if TMA:
        values = source.load([row, column])
    else:
        r, c = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        values = tl.load(source + r[:, None].to(tl.int64) * stride + c[None, :], mask=mask, other=0.0)
    return values


@triton.jit
def _store(target, values, row, column, M, N: tl.constexpr, TMA: tl.constexpr):
    """target[row :, column :] = values, rounded to its dtype, within its M rows and N columns."""
    if TMA:
        target.store([row, column], values.to(target.dtype))
    else:
        rows, columns = row + tl.arange(0, values.shape[0]), column + tl.arange(0, values.shape[1])
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        offsets = rows[:, None].to(tl.int64) * N + columns[None, :]
        tl.store(target + offsets, values.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _tile_of_program(M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of this program's tile."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    first_m = tile // (GROUP_M * TILES_N) * GROUP_M
    group_m = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    row = (first_m + tile % (GROUP_M * TILES_N) % group_m) * BLOCK_M
    return row, tile % (GROUP_M * TILES_N) // group_m * BLOCK_N


@triton.jit
def _parts(acc, PART: tl.constexpr):
    """The tile in parts of PART columns, of which there are one or two."""
    if acc.shape[1] == PART:  # noqa: SIM108 (a choice of the compiler's)
        parts = (acc,)
    else:
        parts = acc.reshape(acc.shape[0], 2, PART).permute(0, 2, 1).split()
    return parts


@triton.jit
def _store_statistics(statistics, values, row, column, M, N: tl.constexpr):
    """statistics [2, parts, M]: mean and sum of squared deviations of a part of each row."""
    columns = column + tl.arange(0, values.shape[1])
    inside = (columns < N)[None, :]
    mean = tl.sum(tl.where(inside, values, 0.0), 1) / tl.minimum(N - column, values.shape[1])
    centred = tl.where(inside, values - mean[:, None], 0.0)
    rows = row + tl.arange(0, values.shape[0])
    mask = (rows < M) & (column < N)
    PARTS: tl.constexpr = (N + values.shape[1] - 1) // values.shape[1]
    out = statistics + (column // values.shape[1]).to(tl.int64) * M + rows
    tl.store(out, mean, mask=mask)
    tl.store(out + PARTS * M, tl.sum(centred * centred, 1), mask=mask)


@triton.jit
def _row_statistics(
    statistics, rows, M, D: tl.constexpr, EPS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(mean, 1 / standard deviation) of rows from those of their PARTS parts, by Chan's formula: [rows, 1] each."""
    part = tl.arange(0, BLOCK)
    mask = (part < PARTS)[:, None] & (rows < M)[None, :]
    given = statistics + part[:, None].to(tl.int64) * M + rows[None, :]
    size = tl.minimum(tl.maximum(D - part * PART, 0), PART).to(tl.float32)[:, None]
    means = tl.load(given, mask=mask, other=0.0)
    mean = tl.sum(means * size, 0) / D
    apart = means - mean[None, :]
    squares = tl.load(given + PARTS * M, mask=mask, other=0.0) + size * apart * apart
    return mean[:, None], tl.rsqrt(tl.sum(squares, 0) / D + EPS)[:, None]


@triton.jit
def _modulated(factor, offset, given, image, columns, mask):
    """factor and offset of a norm, modulated by a row, or rows, of what is given: shift, scale and their strides."""
    shift, scale, stride_shift, stride_scale = given
    by = 1.0 + tl.load(scale + image * stride_scale + columns, mask=mask, other=0.0).to(tl.float32)
    add = tl.load(shift + image * stride_shift + columns, mask=mask, other=0.0).to(tl.float32)
    return factor * by, offset * by + add


@triton.jit
def _normalised(
    a, mean, rstd, norm_weight, norm_bias, shift, scale, row, k, M,
    stride_shift, stride_scale,
    D: tl.constexpr, TOKENS: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of x normalised and modulated, in float32; zeros beyond its last column.

    TOKENS: rows of x per row of shift and scale; None if these have one row.
    """
    columns = k + tl.arange(0, BLOCK_K)[None, :]
    inside = columns < D
    factor = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    if scale is not None:
        given = (shift, scale, stride_shift, stride_scale)
        if TOKENS is None:
            factor, offset = _modulated(factor, offset, given, 0, columns, inside)
        elif TMA and TOKENS >= BLOCK_M - 1:  # of two images at most: a choice of two rows, not a row for each row
            image = (row // TOKENS).to(tl.int64)
            end = (image + 1) * TOKENS
            factor_next, offset_next = _modulated(factor, offset, given, image + 1, columns, inside & (end < M))
            factor, offset = _modulated(factor, offset, given, image, columns, inside)
            factor, offset = tl.where(rows < end, factor, factor_next), tl.where(rows < end, offset, offset_next)
        else:
            image = (rows // TOKENS).to(tl.int64)
            factor, offset = _modulated(factor, offset, given, image, columns, inside & (rows < M))
    return (a.to(tl.float32) - mean) * rstd * factor + offset


@triton.jit
def _epilogue(
    acc, weight_scale, bias, residual, gate, y, z, statistics, row, column, M,
    stride_residual, stride_gate,
    N: tl.constexpr, TOKENS: tl.constexpr, GELU: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What y holds, in float32; y itself may be left out."""
    columns = column + tl.arange(0, BLOCK_N)
    if weight_scale is not None:
        acc *= tl.load(weight_scale + columns, mask=columns < N, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if z is not None:
        _store(z, acc, row, column, M, N, TMA)
    if GELU:
        acc = gelu(acc, EXACT)
    if gate is not None:
        # Row by row, through the caches: in 16-byte accesses, and with fewer registers than a choice of two rows takes.
        rows = row + tl.arange(0, BLOCK_M)
        offsets = (rows // TOKENS)[:, None].to(tl.int64) * stride_gate + columns[None, :]
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        acc *= tl.load(gate + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        acc += _tile(residual, row, column, stride_residual, M, N, TMA, BLOCK_M, BLOCK_N).to(tl.float32)
    if y is not None:
        _store(y, acc, row, column, M, N, TMA)
    if statistics is not None:
        dtype: tl.constexpr = y.dtype if TMA else y.dtype.element_ty
        _store_statistics(statistics, acc.to(dtype).to(tl.float32), row, column, M, N)
    return acc


@triton.jit
def _store_rows(
    rows, row_scale, left, right, row, column, M,
    N: tl.constexpr, FP8_MAX: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """A tile in FP8, of its two parts, and the scale of each of its rows; without `rows` their largest values."""
    step = tl.maximum(tl.max(tl.abs(left), 1), tl.max(tl.abs(right), 1))
    if rows is not None:
        step = row_step(step, FP8_MAX)
        _store(rows, in_steps(left, step[:, None], FP8_MAX), row, column, M, N, TMA)
        _store(rows, in_steps(right, step[:, None], FP8_MAX), row, column + PART, M, N, TMA)
    places = row + tl.arange(0, BLOCK_M)
    tl.store(row_scale + (column // (2 * PART)).to(tl.int64) * M + places, step, mask=places < M)


@triton.jit
def linear_fwd_kernel(
    x, skip, weight, x_scale, skip_scale, weight_scale, bias, residual, gate, y, z, y_fp8, y_scale, statistics,
    x_statistics, norm_weight, norm_bias, shift, scale, M,
    stride_x, stride_skip, stride_weight, stride_residual, stride_gate, stride_shift, stride_scale,
    N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SCALES_X: tl.constexpr, SCALES_SKIP: tl.constexpr,
    TOKENS: tl.constexpr, GELU: tl.constexpr, EXACT: tl.constexpr, FP8_MAX: tl.constexpr, EPS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PART: tl.constexpr, PARTS_X: tl.constexpr,
    BLOCK_PARTS_X: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x [M, D], skip [M, E] (None: E = 0), weight [N, D + E], residual, y, z, y_fp8 [M, N]: descriptors if TMA,
    else pointers.

    bias [N], gate [M / TOKENS, N], statistics of y, those of x and its norm, and scales are pointers: weight_scale [N],
    x_scale [SCALES_X, M] and skip_scale [SCALES_SKIP, M], one for all columns or one for every BLOCK_K of them, and
    y_scale, one for every BLOCK_N. EXACT: GELU's. DEPENDENT: the kernel was launched before that ahead of it had ended,
    and lets the next one be: each waits here before it touches memory.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    STEPS_X: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = STEPS_X + (E + BLOCK_K - 1) // BLOCK_K
    row, column = _tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if norm_weight is not None:
        rows = row + tl.arange(0, BLOCK_M)
        mean, rstd = _row_statistics(x_statistics, rows, M, D, EPS, PART, PARTS_X, BLOCK_PARTS_X)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(STEPS):
        source, stride, width = x, stride_x, D
        k = step * BLOCK_K
        k_weight = k
        if x_scale is not None:
            row_scale = x_scale + tl.minimum(step, SCALES_X - 1).to(tl.int64) * M
        # A choice of operands, not a second loop: loads stay ahead of products across the seam.
        if skip is not None:  # noqa: SIM102 (known when the kernel is compiled, the other is not)
            if step >= STEPS_X:
                source, stride, width = skip, stride_skip, E
                k = (step - STEPS_X) * BLOCK_K
                k_weight = D + k
                if skip_scale is not None:
                    row_scale = skip_scale + tl.minimum(step - STEPS_X, SCALES_SKIP - 1).to(tl.int64) * M
        a = _tile(source, row, k, stride, M, width, TMA, BLOCK_M, BLOCK_K)
        # Past x's last column, where the last step on x reads skip's columns of weight, a is zero.
        b = _tile(weight, column, k_weight, stride_weight, N, D + E, TMA, BLOCK_N, BLOCK_K)
        if norm_weight is not None:
            a = _normalised(
                a, mean, rstd, norm_weight, norm_bias, shift, scale, row, k, M,
                stride_shift, stride_scale,
                D, TOKENS, TMA, BLOCK_M, BLOCK_K,
            ).to(b.dtype)  # fmt: skip
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        if x_scale is None:
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        else:
            places = row + tl.arange(0, BLOCK_M)
            factor = tl.load(row_scale + places, mask=places < M, other=0.0)
            acc += tl.dot(a, b.T, input_precision=PRECISION) * factor[:, None]

    parts = _parts(acc, PART)
    left = _epilogue(
        parts[0], weight_scale, bias, residual, gate, y, z, statistics, row, column, M, stride_residual, stride_gate,
        N, TOKENS, GELU, EXACT, TMA, BLOCK_M, PART,
    )  # fmt: skip
    if len(parts) == 2:
        right = _epilogue(
            parts[1], weight_scale, bias, residual, gate, y, z, statistics, row, column + PART, M,
            stride_residual, stride_gate,
            N, TOKENS, GELU, EXACT, TMA, BLOCK_M, PART,
        )  # fmt: skip
        if y_scale is not None:
            _store_rows(y_fp8, y_scale, left, right, row, column, M, N, FP8_MAX, TMA, BLOCK_M, PART)


class Norm(NamedTuple):
    """A norm of a product's x [M, D]: weight, bias [D]; shift, scale: [B, D] or None; statistics: [2, parts, M]."""

    statistics: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    shift: torch.Tensor | None
    scale: torch.Tensor | None
    eps: float


def linear(
    x, skip, weight, bias, gelu=False, save_preactivation=False,
    residual=None, gate=None, tokens: int | None = None, save_branch=False,
    norm: Norm | None = None, statistics: torch.Tensor | None = None, dependent=False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Returns y = residual + gate * act(z) with z = concat[x, skip] @ weight^T + bias, and z if it is to be saved.

    x: [..., D]; skip: [..., E] or None; weight: [N, D + E], all in one dtype; bias: [N].
    act: GELU if `gelu`, else the identity. Saved for the backward pass, z is what enters GELU, or the branch that the
    gate scales; it has x's dtype.
    residual: [..., N], whose dtype y has, or None for zeros, with y in x's dtype. gate: [B, N] or None for ones.
    tokens: rows of x per row of gate; None for their quotient.
    norm: of x, which may have any dtype then, before it is multiplied. statistics: float32 [2, parts, M], filled with
    mean and sum of squared deviations of each PART columns of y. dependent: launch while the kernel before still runs,
    where the GPU can (programmatic dependent launch).
    """
    dtype = weight.dtype if residual is None else residual.dtype
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=dtype, device=x.device)
    z = torch.empty_like(y, dtype=weight.dtype) if save_preactivation or save_branch else None
    matrices = {"x": x, "skip": skip, "weight": weight, "residual": residual, "y": y, "z": z}
    launch_linear(matrices, bias, gate, gelu, tokens, None, norm, statistics, dependent)
    return y, z


def launch_linear(
    matrices: dict, bias, gate, gelu: bool, tokens: int | None, scales: dict | None = None,
    norm: Norm | None = None, statistics: torch.Tensor | None = None, dependent=False,
) -> None:  # fmt: skip
    """Run the kernel on tensors by the names of its arguments, in [..., N]; None and names left out are not there.

    scales: of FP8's matrices. The other arguments are those of `linear`.
    """
    matrices = {name: rows_of(matrix) for name, matrix in matrices.items()}
    x, skip, weight, residual = (matrices[name] for name in ("x", "skip", "weight", "residual"))
    scales = {name: None if scale is None else scale.contiguous() for name, scale in (scales or {}).items()}
    gate, precision = rows_of(gate), matmul_precision()
    (rows, width), columns = x.shape, weight.shape[0]
    config = linear_config(weight.dtype, precision, _tma_reaches(*matrices.values()), rows, columns, norm is not None)
    exact = (bias if matrices["y"] is None else matrices["y"]).dtype == torch.float32
    shift, scale = (None, None) if norm is None else (unit_stride(norm.shift), unit_stride(norm.scale))
    images = next((t.shape[0] for t in (gate, scale) if t is not None), None)
    if gate is None and images == 1:  # every row has the same modulation
        images = None
    dependent = dependent and not triton.knobs.runtime.interpret and capability(x.device) >= (9, 0)
    with torch.cuda.device_of(x):
        linear_fwd_kernel[_grid(config, rows, columns)](
            **_operands(config, dict.fromkeys(("z", "y_fp8")) | matrices), **dict.fromkeys(_SCALES) | scales,
            bias=None if bias is None else bias.contiguous(), gate=gate, statistics=statistics,
            x_statistics=None if norm is None else norm.statistics,
            norm_weight=None if norm is None else norm.weight.contiguous(),
            norm_bias=None if norm is None else norm.bias.contiguous(),
            shift=shift, scale=scale, M=rows,
            stride_x=x.stride(0), stride_skip=strides(skip)[0], stride_weight=weight.stride(0),
            stride_residual=strides(residual)[0], stride_gate=strides(gate)[0],
            stride_shift=strides(shift)[0], stride_scale=strides(scale)[0],
            D=width, E=0 if skip is None else skip.shape[1],
            SCALES_X=_count(scales.get("x_scale"), rows), SCALES_SKIP=_count(scales.get("skip_scale"), rows),
            TOKENS=None if images is None else tokens or rows // images,
            GELU=gelu, EXACT=exact, FP8_MAX=FP8_MAX,
            EPS=None if norm is None else norm.eps, PARTS_X=parts_of(width),
            BLOCK_PARTS_X=triton.next_power_of_2(parts_of(width)), DEPENDENT=dependent,
            **_constants(config, columns, precision), launch_pdl=dependent,
        )  # fmt: skip


_SCALES = ("x_scale", "skip_scale", "weight_scale", "y_scale")


def _count(scale: torch.Tensor | None, rows: int) -> int:
    """Scales per row."""
    return 1 if scale is None else scale.numel() // rows


@triton.jit
def _dgelu_epilogue(
    acc, z, dz, partial, row, column, M,
    stride_z,
    N: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    values = _tile(z, row, column, stride_z, M, N, TMA, BLOCK_M, BLOCK_N)
    acc *= gelu_gradient(values.to(tl.float32), values.dtype == tl.float32)
    _store(dz, acc, row, column, M, N, TMA)
    columns = column + tl.arange(0, BLOCK_N)
    chunk = (row // BLOCK_M).to(tl.int64)
    tl.store(partial + chunk * N + columns, tl.sum(acc, 0), mask=columns < N)  # rows beyond the edge are zeros


@triton.jit
def _linear_dgelu_kernel(
    dy, weight_t, z, dz, partial, M,
    stride_dy, stride_weight, stride_z,
    N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """dy [M, D], weight_t [D, N], z, dz [M, N]: descriptors if TMA, else pointers; partial [tiles in M, N]."""
    row, column = _tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range((D + BLOCK_K - 1) // BLOCK_K):
        a = _tile(dy, row, step * BLOCK_K, stride_dy, M, D, TMA, BLOCK_M, BLOCK_K)
        b = _tile(weight_t, step * BLOCK_K, column, stride_weight, D, N, TMA, BLOCK_K, BLOCK_N)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    parts = _parts(acc, PART)
    for i in tl.static_range(len(parts)):
        _dgelu_epilogue(parts[i], z, dz, partial, row, column + i * PART, M, stride_z, N, TMA, BLOCK_M, PART)


def linear_dgelu(dy: torch.Tensor, weight: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dz = (dy @ weight) * gelu'(z) [..., N] and the sums of its columns [N] in float32.

    The gradient through a second linear layer and the GELU before it, and of the first layer's bias.
    dy: [..., D]; weight: [D, N]; z: [..., N], all in one dtype. The sums are those of dz before it is rounded.
    """
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dy, weight, z = rows_of(dy), rows_of(weight), rows_of(z)
    matrices = {"dy": dy, "weight_t": weight, "z": z, "dz": rows_of(dz)}
    precision = matmul_precision()
    config = config_for(z.dtype, precision, _tma_reaches(*matrices.values()))
    rows, columns = z.shape
    chunks = triton.cdiv(rows, config.block_m)
    partial = torch.empty((chunks, columns), dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        _linear_dgelu_kernel[_grid(config, rows, columns)](
            **_operands(config, matrices),
            partial=partial,
            M=rows,
            stride_dy=dy.stride(0), stride_weight=weight.stride(0), stride_z=z.stride(0),
            D=dy.shape[1], **_constants(config, columns, precision),
        )  # fmt: skip
    return dz, sum_partial_sums(partial, torch.float32)


def rows_of(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """[..., N] as [M, N] with unit stride in rows; copied only if it must be."""
    if tensor is None:
        return None
    tensor = tensor.reshape(-1, tensor.shape[-1])
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _tma_reaches(*matrices: torch.Tensor | None) -> bool:
    """TMA came with Hopper; it reads and writes rows that start at multiples of 16 bytes and do not overlap."""
    present = [matrix for matrix in matrices if matrix is not None]
    return capability(present[0].device) >= (9, 0) and all(
        matrix.numel() > 0
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * matrix.itemsize % 16 == 0
        and matrix.stride(0) >= matrix.shape[1]
        for matrix in present
    )


def _operands(config: Config, matrices: dict[str, torch.Tensor | None]) -> dict:
    """The matrices as the kernel takes them, with the tile of each that TMA moves at a time."""
    if not config.tma:
        return matrices
    blocks = dict.fromkeys(("x", "skip", "dy"), [config.block_m, config.block_k])
    blocks |= {"weight": [config.block_n, config.block_k], "weight_t": [config.block_k, config.block_n]}
    result = [config.block_m, PART]
    return {
        name: matrix
        if matrix is None
        else TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], blocks.get(name, result))
        for name, matrix in matrices.items()
    }


def _grid(config: Config, rows: int, columns: int) -> tuple[int]:
    return (triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),)


def _constants(config: Config, columns: int, precision: str) -> dict:
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "N": columns,
        "TMA": config.tma,
        "PRECISION": precision,
        "UPCAST": triton.knobs.runtime.interpret,  # the interpreter cannot multiply bfloat16
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": GROUP_M,
        "PART": PART,
    }


def parts_of(width: int) -> int:
    return triton.cdiv(width, PART)
