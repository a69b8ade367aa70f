"""Rows in float8_e4m3fn with a scale each, of concat[gelu(x + gate * branch), skip], in one pass."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from epg_kernels._launch import accumulation_dtype, strides, unit_stride
from epg_kernels._matmul import gelu
from epg_kernels._quantize import FP8_MAX, in_steps, row_step


@dataclass(frozen=True)
class Config:
    block: int  # columns of x held by one program: a power of two, at least the width
    rows: int  # rows at a time
    num_warps: int


# 32 lanes x 16 values per warp: two 16-byte reads of bf16 and one 16-byte write of FP8 per lane and pass.
CONFIGS = (
    Config(1024, 4, 4),
    Config(2048, 2, 4),
    Config(4096, 1, 8),
    Config(8192, 1, 16),
    Config(16_384, 1, 32),
)


@triton.jit
def _quantize_rows_kernel(
    x, branch, gate, skip, rows, row_scale, tokens,
    stride_x_batch, stride_x_token, stride_branch_batch, stride_branch_token, stride_gate, stride_skip_batch,
    stride_skip_token,
    D: tl.constexpr, E: tl.constexpr, GELU: tl.constexpr, FP8_MAX: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SKIP_BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    row = batch * tokens + token
    exists = token < tokens
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < D
    live = inside & exists
    acc_dtype = row_scale.dtype.element_ty

    values = tl.load(x + batch * stride_x_batch + token * stride_x_token + columns, mask=live, other=0.0)
    if skip is not None:
        others = tl.arange(0, SKIP_BLOCK)[None, :]
        other_live = (others < E) & exists
        skipped = skip + batch * stride_skip_batch + token * stride_skip_token + others
        skipped = tl.load(skipped, mask=other_live, other=0.0).to(acc_dtype)
    values = values.to(acc_dtype)
    if branch is not None:
        added = branch + batch * stride_branch_batch + token * stride_branch_token + columns
        added = tl.load(added, mask=live, other=0.0).to(acc_dtype)
        if gate is not None:
            added *= tl.load(gate + batch * stride_gate + columns, mask=inside, other=0.0).to(acc_dtype)
        values = (values + added).to(x.dtype.element_ty).to(acc_dtype)
    if GELU:
        values = gelu(values, x.dtype.element_ty.primitive_bitwidth > 16)
    largest = tl.max(tl.abs(values), 1, keep_dims=True)
    if skip is not None:
        largest = tl.maximum(largest, tl.max(tl.abs(skipped), 1, keep_dims=True))
    step = row_step(largest, FP8_MAX)
    tl.store(row_scale + row, step, mask=exists)
    out = rows + row * (D + E)
    tl.store(out + columns, in_steps(values, step, FP8_MAX).to(rows.dtype.element_ty), mask=live)
    if skip is not None:
        tl.store(out + D + others, in_steps(skipped, step, FP8_MAX).to(rows.dtype.element_ty), mask=other_live)


def quantize_rows_fwd(x, branch, gate, skip, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, row_scale)."""
    batch, tokens, width = x.shape
    skip_width = 0 if skip is None else skip.shape[-1]
    x, branch, gate, skip = map(unit_stride, (x, branch, gate, skip))
    rows = torch.empty((batch, tokens, width + skip_width), dtype=torch.float8_e4m3fn, device=x.device)
    row_scale = torch.empty((batch, tokens), dtype=accumulation_dtype(x), device=x.device)
    config = next(config for config in CONFIGS if width <= config.block)
    with torch.cuda.device_of(x):
        _quantize_rows_kernel[(triton.cdiv(tokens, config.rows), batch)](
            x, branch, gate, skip, rows, row_scale, tokens,
            *strides(x, 2), *strides(branch, 2), *strides(gate), *strides(skip, 2),
            D=width, E=skip_width, GELU=gelu, FP8_MAX=FP8_MAX, ROWS=config.rows, BLOCK=config.block,
            SKIP_BLOCK=triton.next_power_of_2(max(skip_width, 1)), num_warps=config.num_warps,
        )  # fmt: skip
    return rows, row_scale
