"""Linear layer and exact GELU in one matrix product; its backward pass."""

import torch
import triton
import triton.language as tl

from epg_kernels import AotCase
from epg_kernels._column_sums import COLUMNS, ROWS, TILE, empty_partial_sums, second_stage_case, sum_partial_sums
from epg_kernels._matmul import BY_POINTERS, BY_TMA, BY_TMA_TF32, IEEE, gelu_gradient, linear, linear_case, rows_of


@triton.jit
def _linear_gelu_bwd_kernel(
    dy,
    z,
    dz,
    partial,
    M,
    stride_dy,
    N: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dz = dy gelu'(z) for TILES * TILE rows, and the sums of its columns over them."""
    chunk = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < N
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    for tile in range(TILES):
        row = (chunk * TILES + tile) * TILE + tl.arange(0, TILE)
        mask = (row < M)[:, None] & inside[None, :]
        offsets = row[:, None] * N + columns[None, :]
        grad = tl.load(dy + row[:, None] * stride_dy + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        values = tl.load(z + offsets, mask=mask, other=0.0).to(tl.float32)
        grad *= gelu_gradient(values, z.dtype.element_ty == tl.float32)
        total += grad
        tl.store(dz + offsets, grad.to(dz.dtype.element_ty), mask=mask)
    if partial is not None:
        tl.store(partial + chunk * N + columns, tl.sum(total, 0), mask=inside)


def linear_gelu_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, save_preactivation: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns gelu(z) [..., N] and, if it is to be saved for the backward pass, z = x @ weight^T + bias.

    x: [..., K]; weight: [N, K], in x's dtype; bias: [N].
    """
    return linear(x, None, weight, bias, gelu=True, save_preactivation=save_preactivation)


def linear_gelu_bwd(
    dy: torch.Tensor,
    z: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Returns dx, dweight and dbias, None where not needed."""
    dy, z = rows_of(dy), rows_of(z)
    rows, width = z.shape
    dz = torch.empty_like(z)
    partial = empty_partial_sums(z) if need_bias else None
    with torch.cuda.device_of(z):
        _linear_gelu_bwd_kernel[(triton.cdiv(width, COLUMNS), triton.cdiv(rows, ROWS))](
            dy, z, dz, partial, rows, dy.stride(0), N=width, **_tiling(z.itemsize)
        )
    # The products have nothing left to fuse, and cuBLAS sets their ceiling.
    dx = torch.mm(dz, weight).view(x.shape) if need_x else None
    dweight = torch.mm(dz.t(), rows_of(x)) if need_weight else None
    return dx, dweight, sum_partial_sums(partial, bias.dtype) if need_bias else None


def _tiling(itemsize: int) -> dict[str, int]:
    """As many bytes at a time in every dtype: with as many values, registers spill in float32."""
    tile = TILE * 2 // itemsize
    return {"TILES": ROWS // tile, "TILE": tile, "COLUMNS": COLUMNS}


def aot_cases() -> list[AotCase]:
    """Three presets' widths through TMA, with and without z; one width of every other configuration."""
    cases = [
        linear_case(BY_TMA, 4 * width, width, 0, "bf16", gelu=True, save_preactivation=saving)
        for width in (768, 1584, 2688)
        for saving in (False, True)
    ]
    cases += [
        linear_case(BY_TMA, 6336, 1584, 0, "fp16", gelu=True, save_preactivation=True),
        linear_case(BY_TMA_TF32, 6336, 1584, 0, "fp32", gelu=True, save_preactivation=True),
        linear_case(BY_POINTERS, 6336, 1584, 0, "bf16", gelu=True, save_preactivation=True),
        linear_case(IEEE, 6336, 1584, 0, "fp32", gelu=True, save_preactivation=True, precision="ieee"),
    ]
    cases += [_backward_case(4 * width, "bf16") for width in (768, 1584, 2688)]
    return [*cases, _backward_case(6336, "fp32"), second_stage_case(6336)]


def _backward_case(width: int, dtype: str) -> AotCase:
    pointers = {"dy": f"*{dtype}", "z": f"*{dtype}", "dz": f"*{dtype}", "partial": "*fp32"}
    return AotCase(
        kernel=_linear_gelu_bwd_kernel,
        signature=pointers | {"M": "i32", "stride_dy": "i32"},
        constexprs={"N": width} | _tiling(4 if dtype == "fp32" else 2),
        num_warps=4,
        shape=f"N={width}",
        dtype=dtype,
        divisible_by_16=(*pointers, "stride_dy"),
    )
