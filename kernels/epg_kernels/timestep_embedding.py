"""Sinusoidal embedding of the time condition and SiLU(embedding + label), one image per program.

The network sees t up to about 1600, where the GPU's sine instruction has lost its accuracy, and float64's keeps a table
in local memory: the phase, computed in float32 as the reference has it, is reduced to an eighth of a turn in float64,
and two short polynomials do the rest.
"""

import math

import torch
import triton
import triton.language as tl

from epg_kernels._launch import strides, unit_stride


@triton.jit
def _sine_and_cosine(t, k, HALF: tl.constexpr, LOG_MAX_PERIOD: tl.constexpr):
    """sin(t f), cos(t f) and f = 10000^(-k / HALF)."""
    frequency = tl.exp(k.to(tl.float64) * (-LOG_MAX_PERIOD / HALF)).to(tl.float32)
    phase = (t * frequency).to(tl.float64)
    quarter = tl.floor(phase * 0.6366197723675814 + 0.5)
    r = (phase - quarter * 1.5707963267948966).to(tl.float32)  # within an eighth of a turn
    # Taylor series, whose next terms are below 2e-9 there.
    r2 = r * r
    sine = r + r * r2 * (-1 / 6 + r2 * (1 / 120 + r2 * (-1 / 5040 + r2 * (1 / 362880))))
    cosine = 1.0 + r2 * (-0.5 + r2 * (1 / 24 + r2 * (-1 / 720 + r2 * (1 / 40320 + r2 * (-1 / 3628800)))))
    turns = quarter.to(tl.int32)
    odd = (turns & 1) != 0
    swapped_sine, swapped_cosine = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    sine = tl.where((turns & 2) != 0, -swapped_sine, swapped_sine)
    cosine = tl.where(((turns + 1) & 2) != 0, -swapped_cosine, swapped_cosine)
    return sine, cosine, frequency


@triton.jit
def _timestep_embedding_fwd_kernel(
    t, label, time, condition,
    stride_label,
    DIM: tl.constexpr, HALF: tl.constexpr, LOG_MAX_PERIOD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    # Column k and column HALF + k share a frequency: cosine, then sine, then a zero if DIM is odd.
    sine = column >= HALF
    k = tl.where(sine, column - HALF, column)
    sines, cosines, _ = _sine_and_cosine(tl.load(t + batch), k, HALF, LOG_MAX_PERIOD)
    values = tl.where(column < 2 * HALF, tl.where(sine, sines, cosines), 0.0)
    embedding = values.to(time.dtype.element_ty)
    tl.store(time + batch * DIM + column, embedding, mask=inside)
    if condition is not None:
        u = embedding.to(tl.float32)
        if label is not None:
            u += tl.load(label + batch * stride_label + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(condition + batch * DIM + column, (u * tl.sigmoid(u)).to(condition.dtype.element_ty), mask=inside)


@triton.jit
def _timestep_embedding_bwd_kernel(
    dtime, dcondition, t, time, label, dt, dlabel,
    stride_dtime, stride_dcondition, stride_label,
    DIM: tl.constexpr, HALF: tl.constexpr, LOG_MAX_PERIOD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    sine = column >= HALF
    k = tl.where(sine, column - HALF, column)
    sines, cosines, frequency = _sine_and_cosine(tl.load(t + batch), k, HALF, LOG_MAX_PERIOD)
    live = column < 2 * HALF
    grad = tl.zeros([BLOCK], tl.float32)
    if dtime is not None:
        grad += tl.load(dtime + batch * stride_dtime + column, mask=inside, other=0.0).to(tl.float32)
    if dcondition is not None:
        u = tl.load(time + batch * DIM + column, mask=inside, other=0.0).to(tl.float32)
        if label is not None:
            u += tl.load(label + batch * stride_label + column, mask=inside, other=0.0).to(tl.float32)
        opening = tl.sigmoid(u)
        through = tl.load(dcondition + batch * stride_dcondition + column, mask=inside, other=0.0).to(tl.float32)
        through *= opening * (1.0 + u * (1.0 - opening))
        grad += through
        if label is not None:
            tl.store(dlabel + batch * DIM + column, through.to(dlabel.dtype.element_ty), mask=inside)
    slope = tl.where(sine, cosines, -sines) * frequency
    tl.store(dt + batch, tl.sum(tl.where(live, grad * slope, 0.0), 0))


def timestep_embedding_fwd(
    t, label, dim: int, dtype: torch.dtype, with_condition: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(embedding, SiLU(embedding + label), if that is wanted) of t in float32."""
    time = torch.empty((t.shape[0], dim), dtype=dtype, device=t.device)
    condition_dtype = dtype if label is None else torch.promote_types(dtype, label.dtype)
    condition = torch.empty_like(time, dtype=condition_dtype) if with_condition else None
    label = unit_stride(label)
    with torch.cuda.device_of(t):
        _timestep_embedding_fwd_kernel[(t.shape[0],)](
            t.contiguous(), label, time, condition, *strides(label), **_constants(dim)
        )
    return time, condition


def timestep_embedding_bwd(dtime, dcondition, t, time, label) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dt, dlabel, None without a label or without dcondition); time: the embedding that was returned."""
    dt = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    dtime, dcondition, label = map(unit_stride, (dtime, dcondition, label))
    dlabel = None
    if label is not None and dcondition is not None:
        dlabel = torch.empty(time.shape, dtype=label.dtype, device=t.device)
    with torch.cuda.device_of(t):
        _timestep_embedding_bwd_kernel[(t.shape[0],)](
            dtime, dcondition, t.contiguous(), time, label, dt, dlabel,
            *strides(dtime), *strides(dcondition), *strides(label), **_constants(time.shape[1]),
        )  # fmt: skip
    return dt, dlabel


def _constants(dim: int) -> dict:
    return {"DIM": dim, "HALF": dim // 2, "LOG_MAX_PERIOD": math.log(10_000), "BLOCK": triton.next_power_of_2(dim)}
