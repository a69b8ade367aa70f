"""Rows in float8_e4m3fn with a scale each, of concat[gelu(x + gate * branch), skip], in one pass."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from epg_kernels import AotCase
from epg_kernels._launch import accumulation_dtype, aot_case, strides, unit_stride
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
    """Returns rows [B, L, D + E] in float8_e4m3fn and row_scale [B, L].

    x, branch: [B, L, D]; gate: [B, D]; skip: [B, L, E]; all but x may be None.
    """
    batch, tokens, width = x.shape
    skip_width = 0 if skip is None else skip.shape[-1]
    x, branch, gate, skip = map(unit_stride, (x, branch, gate, skip))
    rows = torch.empty((batch, tokens, width + skip_width), dtype=torch.float8_e4m3fn, device=x.device)
    row_scale = torch.empty((batch, tokens), dtype=accumulation_dtype(x), device=x.device)
    config = config_for(width)
    with torch.cuda.device_of(x):
        _quantize_rows_kernel[(triton.cdiv(tokens, config.rows), batch)](
            x, branch, gate, skip, rows, row_scale, tokens,
            *strides(x, 2), *strides(branch, 2), *strides(gate), *strides(skip, 2),
            GELU=gelu, num_warps=config.num_warps, **_constexprs(config, width, skip_width),
        )  # fmt: skip
    return rows, row_scale


def config_for(width: int) -> Config:
    return next(config for config in CONFIGS if width <= config.block)


def _constexprs(config: Config, width: int, skip_width: int) -> dict:
    blocks = {"BLOCK": config.block, "SKIP_BLOCK": triton.next_power_of_2(max(skip_width, 1))}
    return {"D": width, "E": skip_width, "FP8_MAX": FP8_MAX, "ROWS": config.rows} | blocks


def aot_cases() -> list[AotCase]:
    """What networks ask for, at the presets' widths: attention's output, the MLP's middle with GELU, the long skip."""
    cases = [_case(width) for width in (768, 1584, 2688)]
    cases += [_case(4 * width, gelu=True) for width in (768, 1024, 1584, 2688)]
    cases += [_case(width, skip) for width, skip in ((768, 768), (1024, 1024), (1584, 768), (2688, 768))]
    return [*cases, _case(6336, gelu=True, dtype="fp32")]


def _case(width: int, skip: int = 0, gelu: bool = False, dtype: str = "bf16") -> AotCase:
    config = config_for(width)
    pointers = {"x": dtype, "rows": "fp8e4nv", "row_scale": "fp32"}
    pointers |= {"branch": dtype, "gate": dtype, "skip": dtype} if skip else {}
    constexprs = _constexprs(config, width, skip) | {"GELU": gelu}
    shape = f"D={width}{' gelu' * gelu}{f' gated skip={skip}' if skip else ''}"
    # FP8 conversion instructions came with sm_89
    options = {"num_warps": config.num_warps, "archs": (90, 100)}
    return aot_case(_quantize_rows_kernel, pointers, constexprs, shape, dtype, **options)
