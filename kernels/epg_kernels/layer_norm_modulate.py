"""LayerNorm with affine parameters and adaLN modulation in one pass, forward and backward.

One program normalises one row in the forward pass. In the backward pass one program walks over ROWS tokens of one
image, writes their dx and two partial sums; two small kernels then add the partial sums up in a fixed order, so that
results are bitwise repeatable.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from epg_kernels import AotCase


@dataclass(frozen=True)
class Config:
    block: int  # columns held by one program: a power of two, at least the width
    num_warps: int


# 32 lanes x 8 values per warp: one 16-byte access of bf16 per lane and pass.
CONFIGS = (Config(256, 1), Config(512, 2), Config(1024, 4), Config(2048, 8), Config(4096, 16))
MAX_WIDTH = CONFIGS[-1].block

ROWS = 32  # tokens per backward program: the partial sums cost 2/ROWS fp32 rows of traffic per token
COLUMNS = 64  # columns per program of the summing kernels
TILE = 16  # rows they load at a time


def config_for(width: int) -> Config:
    return next(config for config in CONFIGS if width <= config.block)


@triton.jit
def _layer_norm_modulate_fwd_kernel(
    x,
    weight,
    bias,
    shift,
    scale,
    y,
    mean,
    rstd,
    tokens,
    stride_x_batch,
    stride_x_token,
    stride_shift,
    stride_scale,
    D: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tokens + token
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    acc_dtype = mean.dtype.element_ty

    values = tl.load(x + batch * stride_x_batch + token * stride_x_token + columns, mask=inside, other=0.0)
    values = values.to(acc_dtype)
    mu = tl.sum(values, 0) / D
    centred = tl.where(inside, values - mu, 0.0)
    inverse_std = tl.rsqrt(tl.sum(centred * centred, 0) / D + tl.full((), EPS, acc_dtype))
    w = tl.load(weight + columns, mask=inside, other=0.0).to(acc_dtype)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(acc_dtype)
    out = centred * inverse_std * w + b
    if scale is not None:
        factor = 1.0 + tl.load(scale + batch * stride_scale + columns, mask=inside, other=0.0).to(acc_dtype)
        out = out * factor + tl.load(shift + batch * stride_shift + columns, mask=inside, other=0.0).to(acc_dtype)

    tl.store(y + row * D + columns, out.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, mu)
    tl.store(rstd + row, inverse_std)


@triton.jit
def _layer_norm_modulate_bwd_kernel(
    dy,
    x,
    weight,
    scale,
    mean,
    rstd,
    dx,
    partial,
    tokens,
    stride_dy_batch,
    stride_dy_token,
    stride_x_batch,
    stride_x_token,
    stride_scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    acc_dtype = mean.dtype.element_ty

    factor = tl.load(weight + columns, mask=inside, other=0.0).to(acc_dtype)
    if scale is not None:
        factor *= 1.0 + tl.load(scale + batch * stride_scale + columns, mask=inside, other=0.0).to(acc_dtype)
    sum_dy = tl.zeros([BLOCK], acc_dtype)
    sum_dy_xhat = tl.zeros([BLOCK], acc_dtype)
    for i in range(ROWS):
        token = chunk * ROWS + i
        row = batch * tokens + token
        live = inside & (token < tokens)
        g = tl.load(dy + batch * stride_dy_batch + token * stride_dy_token + columns, mask=live, other=0.0)
        g = g.to(acc_dtype)
        values = tl.load(x + batch * stride_x_batch + token * stride_x_token + columns, mask=live, other=0.0)
        mu = tl.load(mean + row, mask=token < tokens, other=0.0)
        inverse_std = tl.load(rstd + row, mask=token < tokens, other=0.0)
        xhat = tl.where(live, (values.to(acc_dtype) - mu) * inverse_std, 0.0)
        dxhat = g * factor
        grad = (dxhat - tl.sum(dxhat, 0) / D - xhat * (tl.sum(dxhat * xhat, 0) / D)) * inverse_std
        tl.store(dx + row * D + columns, grad.to(dx.dtype.element_ty), mask=live)
        sum_dy += g
        sum_dy_xhat += g * xhat

    out = partial + (batch * tl.num_programs(0) + chunk) * 2 * D
    tl.store(out + columns, sum_dy, mask=inside)
    tl.store(out + D + columns, sum_dy_xhat, mask=inside)


@triton.jit
def _sum_rows(pointer, rows, stride, columns, inside, TILES: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    total = tl.zeros([TILE, COLUMNS], pointer.dtype.element_ty)
    for tile in range(TILES):
        row = tile * TILE + tl.arange(0, TILE)
        mask = (row < rows)[:, None] & inside[None, :]
        total += tl.load(pointer + row[:, None].to(tl.int64) * stride + columns[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _layer_norm_modulate_bwd_batch_kernel(
    partial,
    weight,
    bias,
    scale,
    dshift,
    dscale,
    scaled,
    chunks,
    stride_scale,
    D: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums one image's partial sums into dshift and dscale, and scales them by 1 + scale for the parameters' sum."""
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    acc_dtype = partial.dtype.element_ty
    first = partial + batch * chunks * 2 * D
    sum_dy = _sum_rows(first, chunks, 2 * D, columns, inside, TILES, TILE, COLUMNS)
    sum_dy_xhat = _sum_rows(first + D, chunks, 2 * D, columns, inside, TILES, TILE, COLUMNS)

    w = tl.load(weight + columns, mask=inside, other=0.0).to(acc_dtype)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(acc_dtype)
    factor = 1.0 + tl.load(scale + batch * stride_scale + columns, mask=inside, other=0.0).to(acc_dtype)
    tl.store(dshift + batch * D + columns, sum_dy.to(dshift.dtype.element_ty), mask=inside)
    tl.store(dscale + batch * D + columns, (w * sum_dy_xhat + b * sum_dy).to(dscale.dtype.element_ty), mask=inside)
    tl.store(scaled + batch * 2 * D + columns, factor * sum_dy, mask=inside)
    tl.store(scaled + batch * 2 * D + D + columns, factor * sum_dy_xhat, mask=inside)


@triton.jit
def _layer_norm_modulate_bwd_parameter_kernel(
    sums,
    dweight,
    dbias,
    rows,
    D: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    sum_dy = _sum_rows(sums, rows, 2 * D, columns, inside, TILES, TILE, COLUMNS)
    sum_dy_xhat = _sum_rows(sums + D, rows, 2 * D, columns, inside, TILES, TILE, COLUMNS)
    tl.store(dbias + columns, sum_dy.to(dbias.dtype.element_ty), mask=inside)
    tl.store(dweight + columns, sum_dy_xhat.to(dweight.dtype.element_ty), mask=inside)


def layer_norm_modulate_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward kernel; returns y [B, L, D] and, for the backward pass, mean and rstd [B, L].

    x: [B, L, D]; weight, bias: [D]; shift, scale: [B, D] or both None.
    """
    batch, tokens, width = x.shape
    config = config_for(width)
    x, shift, scale = _unit_stride(x), _unit_stride(shift), _unit_stride(scale)
    y = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    mean = torch.empty((batch, tokens), dtype=_accumulation_dtype(x), device=x.device)
    rstd = torch.empty_like(mean)
    with torch.cuda.device_of(x):
        _layer_norm_modulate_fwd_kernel[(tokens, batch)](
            x,
            weight.contiguous(),
            bias.contiguous(),
            shift,
            scale,
            y,
            mean,
            rstd,
            tokens,
            x.stride(0),
            x.stride(1),
            _batch_stride(shift),
            _batch_stride(scale),
            D=width,
            EPS=eps,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return y, mean, rstd


def layer_norm_modulate_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launch the backward kernels; returns dx, dweight, dbias, dshift, dscale (the last two None when scale is)."""
    batch, tokens, width = x.shape
    config = config_for(width)
    dy, x, scale = _unit_stride(dy), _unit_stride(x), _unit_stride(scale)
    weight, bias = weight.contiguous(), bias.contiguous()
    chunks = triton.cdiv(tokens, ROWS)
    dx = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    sums = torch.empty((batch * chunks, 2, width), dtype=mean.dtype, device=x.device)
    dweight, dbias, dshift, dscale = torch.empty_like(weight), torch.empty_like(bias), None, None
    columns = triton.cdiv(width, COLUMNS)
    with torch.cuda.device_of(x):
        _layer_norm_modulate_bwd_kernel[(chunks, batch)](
            dy,
            x,
            weight,
            scale,
            mean,
            rstd,
            dx,
            sums,
            tokens,
            dy.stride(0),
            dy.stride(1),
            x.stride(0),
            x.stride(1),
            _batch_stride(scale),
            D=width,
            ROWS=ROWS,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
        if scale is not None:
            dshift = torch.empty((batch, width), dtype=shift.dtype, device=x.device)
            dscale = torch.empty((batch, width), dtype=scale.dtype, device=x.device)
            scaled = torch.empty((batch, 2, width), dtype=mean.dtype, device=x.device)
            _layer_norm_modulate_bwd_batch_kernel[(columns, batch)](
                sums,
                weight,
                bias,
                scale,
                dshift,
                dscale,
                scaled,
                chunks,
                _batch_stride(scale),
                D=width,
                TILES=_tiles(chunks),
                TILE=TILE,
                COLUMNS=COLUMNS,
            )
            sums = scaled
        _layer_norm_modulate_bwd_parameter_kernel[(columns,)](
            sums,
            dweight,
            dbias,
            sums.shape[0],
            D=width,
            TILES=_tiles(sums.shape[0]),
            TILE=TILE,
            COLUMNS=COLUMNS,
        )
    return dx, dweight, dbias, dshift, dscale


def _unit_stride(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _batch_stride(modulation: torch.Tensor | None) -> int:
    return 0 if modulation is None else modulation.stride(0)


def _accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tiles(rows: int) -> int:
    """Tiles that hold `rows`, rounded up to a power of two: few compilations, whatever the batch size."""
    return triton.next_power_of_2(triton.cdiv(rows, TILE))


def aot_cases() -> list[AotCase]:
    """The row kernels in every configuration and at the presets' widths; the summing kernels, alike at any, once."""
    cases = []
    for dtype in ("bf16", "fp32"):
        for width in (256, 512, 768, 1024, 1584, 1920, 2688):
            cases += _row_cases(width, dtype)
        cases += _summing_cases(1584, dtype)
    return cases


def _row_cases(width: int, dtype: str) -> list[AotCase]:
    config = config_for(width)
    forward = {"x": dtype, "weight": "fp32", "bias": "fp32", "shift": dtype, "scale": dtype, "y": dtype}
    forward |= {"mean": "fp32", "rstd": "fp32"}
    backward = {"dy": dtype, "x": dtype, "weight": "fp32", "scale": dtype, "mean": "fp32", "rstd": "fp32", "dx": dtype}
    backward |= {"partial": "fp32"}
    constexprs = {"D": width, "BLOCK": config.block}
    return [
        _case(_layer_norm_modulate_fwd_kernel, forward, constexprs | {"EPS": 1e-5}, config.num_warps, width, dtype),
        _case(_layer_norm_modulate_bwd_kernel, backward, constexprs | {"ROWS": ROWS}, config.num_warps, width, dtype),
    ]


def _summing_cases(width: int, dtype: str) -> list[AotCase]:
    per_batch = {"partial": "fp32", "weight": "fp32", "bias": "fp32", "scale": dtype, "dshift": dtype, "dscale": dtype}
    per_batch |= {"scaled": "fp32"}
    parameters = {"sums": "fp32", "dweight": "fp32", "dbias": "fp32"}
    constexprs = {"D": width, "TILES": 8, "TILE": TILE, "COLUMNS": COLUMNS}
    return [
        _case(_layer_norm_modulate_bwd_batch_kernel, per_batch, constexprs, 4, width, dtype),
        _case(_layer_norm_modulate_bwd_parameter_kernel, parameters, constexprs, 4, width, dtype),
    ]


def _case(kernel, pointers: dict[str, str], constexprs: dict, num_warps: int, width: int, dtype: str) -> AotCase:
    """Arguments that are neither pointers nor constexprs are 32-bit integers; strides are multiples of 16."""
    integers = [name for name in kernel.arg_names if name not in pointers and name not in constexprs]
    return AotCase(
        kernel=kernel,
        signature={name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(integers, "i32"),
        constexprs=constexprs,
        num_warps=num_warps,
        shape=f"D={width}",
        dtype=dtype,
        divisible_by_16=(*pointers, *(name for name in integers if name.startswith("stride_"))),
    )
