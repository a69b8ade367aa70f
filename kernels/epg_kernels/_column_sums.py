"""Sums of the columns of a matrix, in two stages and a fixed order: bitwise repeatable, without atomics."""

import torch
import triton
import triton.language as tl

ROWS = 128  # rows that one program of the first stage sums: at 16512 rows and 1584 columns, 903 programs
TILE = 16  # of those, loaded at a time: with 256 columns of bfloat16, four 16-byte accesses in each of 128 threads
COLUMNS = 256
LAST_TILE = 32  # the second stage has few programs, which therefore load more at a time; 64 spill with Triton 3.8
LAST_COLUMNS = 64


@triton.jit
def _column_sums_kernel(
    values, sums, rows,
    stride,
    N: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums[chunk] = sum of rows chunk * TILES * TILE and following, in float32, rounded to sums' dtype."""
    chunk = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < N
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    for tile in range(TILES):
        row = (chunk * TILES + tile) * TILE + tl.arange(0, TILE)
        mask = (row < rows)[:, None] & inside[None, :]
        total += tl.load(values + row[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + chunk * N + columns, tl.sum(total, 0).to(sums.dtype.element_ty), mask=inside)


def column_sums(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values: [M, N] with unit stride in rows. Returns their sum over M, [N], accumulated in float32."""
    partial = empty_partial_sums(values)
    with torch.cuda.device_of(values):
        grid = (triton.cdiv(values.shape[1], COLUMNS), partial.shape[0])
        _column_sums_kernel[grid](
            values, partial, values.shape[0],
            values.stride(0),
            N=values.shape[1], TILES=ROWS // TILE, TILE=TILE, COLUMNS=COLUMNS,
        )  # fmt: skip
    return sum_partial_sums(partial, dtype)


def empty_partial_sums(values: torch.Tensor) -> torch.Tensor:
    return torch.empty((triton.cdiv(values.shape[0], ROWS), values.shape[1]), dtype=torch.float32, device=values.device)


def sum_partial_sums(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The second stage alone, for a kernel that wrote the sums over each ROWS rows itself."""
    chunks, width = partial.shape
    sums = torch.empty(width, dtype=dtype, device=partial.device)
    with torch.cuda.device_of(partial):
        _column_sums_kernel[(triton.cdiv(width, LAST_COLUMNS), 1)](
            partial,
            sums,
            chunks,
            partial.stride(0),
            N=width,
            TILES=triton.next_power_of_2(triton.cdiv(chunks, LAST_TILE)),  # few compilations as the batch varies
            TILE=LAST_TILE,
            COLUMNS=LAST_COLUMNS,
        )
    return sums
