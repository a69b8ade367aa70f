"""Rounding of rows to float8_e4m3fn, for the kernels that write it."""

import triton
import triton.language as tl

FP8_MAX = 448.0  # largest value of float8_e4m3fn


@triton.jit
def row_step(largest, FP8_MAX: tl.constexpr):
    """The scale of rows with these largest values."""
    return tl.where(largest > 1e-30, largest / FP8_MAX, 1.0)  # it stays a normal number


@triton.jit
def in_steps(values, step, FP8_MAX: tl.constexpr):
    """values / step in float8_e4m3fn's range, to be converted."""
    values /= step
    return tl.where(values == values, tl.minimum(tl.maximum(values, -FP8_MAX), FP8_MAX), values)  # NaN stays
