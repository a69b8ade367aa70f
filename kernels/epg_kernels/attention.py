"""Softmax attention for short sequences on packed qkv, forward and backward: one program per image and head.

258 tokens and head dimension 72 make general kernels compute on 384 rows and 96 or 128 columns. Here a head's columns
are a power of two plus a remainder (72 = 64 + 8, padded to 16), and its keys are full blocks without masks plus one
small masked block (258 = 2 * 128 + 2, padded to 16).

Forward, the keys and values of a head are read once and stay in shared memory while its queries pass by. Backward, the
gradients of a block of keys and values stay in registers while the queries pass by, and the gradient of the queries is
added up in memory that no other program touches, which takes five matrix products where two passes would take seven.
On Hopper, where registers allow it, programs take several heads, so that this memory stays in the L2 cache.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from epg_kernels._launch import capability, matmul_precision
from epg_kernels._quantize import FP8_MAX, row_step

_LOG2_E = math.log2(math.e)
COLUMNS = 128  # of the rows of qkv, whose largest value is given
_FEW = 2  # keys beyond full blocks that the backward pass takes one by one
_RESIDENT_BYTES = 160 * 1024  # of the 227 KiB of shared memory that a program may have on Hopper and Blackwell


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b with a in b's dtype; both in float32 if UPCAST: Triton's interpreter gets bfloat16 wrong."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)


@triton.jit
def _dot_heads(a, b, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b^T [M, N], summed over the parts of the head's columns."""
    out = tl.zeros([M, N], tl.float32)
    for part in tl.static_range(len(a)):
        out = _dot(a[part], tl.trans(b[part]), out, PRECISION, UPCAST)
    return out


@triton.jit
def _dot_rows(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b, for each part of b's columns."""
    out = ()
    for part in tl.static_range(len(b)):
        out = out + (_dot(a, b[part], acc[part], PRECISION, UPCAST),)
    return out


@triton.jit
def _scaled(parts, factor):
    out = ()
    for part in tl.static_range(len(parts)):
        out = out + (parts[part] * factor,)
    return out


@triton.jit
def _value_step(
    largest, stride, L: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, TOKENS: tl.constexpr,
    FP8_MAX: tl.constexpr,
):  # fmt: skip
    """The scale of rows as large as an image's largest value, the largest of FIRST to LAST of its L tokens."""
    tokens = tl.arange(0, TOKENS)
    found = tl.zeros([TOKENS], tl.float32)
    for part in range(FIRST, LAST):
        found = tl.maximum(found, tl.load(largest + part * stride + tokens, mask=tokens < L, other=0.0))
    return row_step(tl.max(found, 0), FP8_MAX)


@triton.jit
def _zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    parts = (tl.zeros([ROWS, MAIN], tl.float32),)
    if REST > 0:
        parts = parts + (tl.zeros([ROWS, REST], tl.float32),)
    return parts


@triton.jit
def _load_part(head, rows, stride, L, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = head + rows[:, None] * stride + columns[None, :]
    if MASKED:
        return tl.load(pointers, mask=(rows < L)[:, None] & (columns < D)[None, :], other=0.0)
    if FIRST + WIDTH > D:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _load(head, rows, stride, L, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a head, in parts of MAIN and REST columns, zeros beyond D and, if MASKED, beyond row L."""
    parts = (_load_part(head, rows, stride, L, D, 0, MAIN, MASKED),)
    if REST > 0:
        parts = parts + (_load_part(head, rows, stride, L, D, MAIN, REST, MASKED),)
    return parts


@triton.jit
def _store(head, rows, stride, parts, L, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    dtype = head.dtype.element_ty
    columns = tl.arange(0, MAIN)
    mask = (rows < L)[:, None] & (columns < D)[None, :]
    tl.store(head + rows[:, None] * stride + columns[None, :], parts[0].to(dtype), mask=mask)
    if REST > 0:
        columns = MAIN + tl.arange(0, REST)
        mask = (rows < L)[:, None] & (columns < D)[None, :]
        tl.store(head + rows[:, None] * stride + columns[None, :], parts[1].to(dtype), mask=mask)


@triton.jit
def _attend(
    q, k, v, acc, maximum, total, scale_log2, keys_left,
    M: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax in base 2: M queries see N keys, of which `keys_left` exist."""
    s = _dot_heads(q, k, M, N, PRECISION, UPCAST)
    if MASKED:
        s = tl.where((tl.arange(0, N) < keys_left)[None, :], s, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - new_maximum[:, None])
    shrink = tl.exp2(maximum - new_maximum)
    total = total * shrink + tl.sum(p, 1)
    return _dot_rows(p, v, _scaled(acc, shrink[:, None]), PRECISION, UPCAST), new_maximum, total


@triton.jit
def _attend_tile(
    q_head, k_head, v_head, o_head, lse_head, step_head, ks, vs, first_row,
    stride, stride_o,
    scale_log2, step,
    L: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    TAIL: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """M queries from first_row on, through all keys: ks and vs or, if STREAM, those in memory.

    With a step the result is in steps of that, which is written beside it.
    """
    LN2: tl.constexpr = 0.6931471805599453
    FULL: tl.constexpr = L // N
    rows = first_row + tl.arange(0, M)
    q = _load(q_head, rows, stride, L, D, MAIN, REST, True)
    acc = _zeros(M, MAIN, REST)
    maximum = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if STREAM:
        for block in range(FULL):
            keys = block * N + tl.arange(0, N)
            k = _load(k_head, keys, stride, L, D, MAIN, REST, False)
            v = _load(v_head, keys, stride, L, D, MAIN, REST, False)
            acc, maximum, total = _attend(q, k, v, acc, maximum, total, scale_log2, N, M, N, False, PRECISION, UPCAST)
    else:
        for block in tl.static_range(FULL):
            k, v = ks[block], vs[block]
            acc, maximum, total = _attend(q, k, v, acc, maximum, total, scale_log2, N, M, N, False, PRECISION, UPCAST)
    if TAIL > 0:
        if STREAM:
            keys = FULL * N + tl.arange(0, TAIL)
            k_tail = _load(k_head, keys, stride, L, D, MAIN, REST, True)
            v_tail = _load(v_head, keys, stride, L, D, MAIN, REST, True)
        else:
            k_tail, v_tail = ks[FULL], vs[FULL]
        acc, maximum, total = _attend(
            q, k_tail, v_tail, acc, maximum, total, scale_log2, L - FULL * N, M, TAIL, True, PRECISION, UPCAST
        )
    unit = total
    if step is not None:
        unit *= step  # a mean of values: none is above the largest by more than rounding, so that nothing overflows
        tl.store(step_head + rows, step, mask=rows < L)
    _store(o_head, rows, stride_o, _scaled(acc, (1.0 / unit)[:, None]), L, D, MAIN, REST)
    if lse_head is not None:
        tl.store(lse_head + rows, (maximum + tl.log2(total)) * LN2, mask=rows < L)


@triton.jit
def _attention_fwd_kernel(
    qkv, out, lse, largest, out_scale, scale_log2, heads,
    stride_batch, stride_token, stride_slot, stride_head,
    L: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ALIGN: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, TAIL: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, TOKENS: tl.constexpr, FP8_MAX: tl.constexpr,
):  # fmt: skip
    """The strides of qkv come divided by ALIGN, so that the compiler knows what divides them: 72 values are aligned.

    With `largest` [T, B, L], of which FIRST to LAST are those of the values, `out` is in FP8, and heads write the same
    `out_scale` [B, L].
    """
    program = tl.program_id(0)
    batch, head = (program // heads).to(tl.int64), program % heads
    stride = stride_token * ALIGN
    q_head = qkv + batch * stride_batch * ALIGN + head * stride_head * ALIGN
    k_head = q_head + stride_slot * ALIGN
    v_head = k_head + stride_slot * ALIGN
    o_head = out + (batch * L * heads + head) * D
    lse_head, step_head, step = None, None, None
    if lse is not None:
        lse_head = lse + program.to(tl.int64) * L
    if largest is not None:
        step_head = out_scale + batch * L
        step = _value_step(
            largest + batch * L, (tl.num_programs(0) // heads).to(tl.int64) * L, L, FIRST, LAST, TOKENS, FP8_MAX
        )
    stride_o = heads * D
    FULL: tl.constexpr = L // N
    ks = ()
    vs = ()
    if not STREAM:
        for block in tl.static_range(FULL):
            keys = block * N + tl.arange(0, N)
            ks = ks + (_load(k_head, keys, stride, L, D, MAIN, REST, False),)
            vs = vs + (_load(v_head, keys, stride, L, D, MAIN, REST, False),)
        if TAIL > 0:
            keys = FULL * N + tl.arange(0, TAIL)
            ks = ks + (_load(k_head, keys, stride, L, D, MAIN, REST, True),)
            vs = vs + (_load(v_head, keys, stride, L, D, MAIN, REST, True),)
        for tile in range((L + M - 1) // M):
            _attend_tile(
                q_head, k_head, v_head, o_head, lse_head, step_head, ks, vs, tile * M, stride, stride_o,
                scale_log2, step,
                L, D, MAIN, REST, M, N, TAIL, STREAM, PRECISION, UPCAST,
            )  # fmt: skip
    else:
        _attend_tile(
            q_head, k_head, v_head, o_head, lse_head, step_head, ks, vs, tl.program_id(1) * M, stride, stride_o,
            scale_log2, step,
            L, D, MAIN, REST, M, N, TAIL, STREAM, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def _row_dot(a, b):
    """The sum over a head's columns of a * b."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for part in tl.static_range(1, len(a)):
        total += tl.sum(a[part].to(tl.float32) * b[part].to(tl.float32), 1)
    return total


@triton.jit
def _add_scaled(acc, parts, factor):
    """acc + factor * parts."""
    out = ()
    for part in tl.static_range(len(parts)):
        out = out + (acc[part] + factor * parts[part].to(tl.float32),)
    return out


@triton.jit
def _column_sums(parts):
    """The sum over the rows, as one row."""
    out = ()
    for part in tl.static_range(len(parts)):
        out = out + (tl.sum(parts[part], 0)[None, :],)
    return out


@triton.jit
def _finish_dq(
    q_head, k_head, v_head, do_head, lse_head, delta_head, sum_head, dq_head, dk_head, dv_head,
    stride, stride_o, stride_sum, stride_dkv,
    scale, scale_log2,
    L: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, M: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Stores the sum as dq, after adding the share of the last FEW keys, in float32 and without matrix products."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    ks, vs, dks, dvs = (), (), (), ()
    for i in tl.static_range(FEW):
        key = L - FEW + i + tl.arange(0, 1)
        ks = ks + (_load(k_head, key, stride, L, D, MAIN, REST, False),)
        vs = vs + (_load(v_head, key, stride, L, D, MAIN, REST, False),)
        dks = dks + (_zeros(M, MAIN, REST),)
        dvs = dvs + (_zeros(M, MAIN, REST),)
    for tile in range((L + M - 1) // M):
        rows = tile * M + tl.arange(0, M)
        dq = _load(sum_head, rows, stride_sum, L, D, MAIN, REST, True)
        if FEW > 0:
            q = _load(q_head, rows, stride, L, D, MAIN, REST, True)
            do = _load(do_head, rows, stride_o, L, D, MAIN, REST, True)
            lse = tl.load(lse_head + rows, mask=rows < L, other=0.0) * LOG2_E
            delta = tl.load(delta_head + rows, mask=rows < L, other=0.0)
            new_dks, new_dvs = (), ()
            for i in tl.static_range(FEW):
                p = tl.exp2(_row_dot(q, ks[i]) * scale_log2 - lse)
                ds = p * (_row_dot(do, vs[i]) - delta) * scale
                dq = _add_scaled(dq, ks[i], ds[:, None])
                new_dks = new_dks + (_add_scaled(dks[i], q, ds[:, None]),)
                new_dvs = new_dvs + (_add_scaled(dvs[i], do, p[:, None]),)
            dks, dvs = new_dks, new_dvs
        _store(dq_head, rows, stride_dkv, dq, L, D, MAIN, REST)
    for i in tl.static_range(FEW):
        key = L - FEW + i + tl.arange(0, 1)
        _store(dk_head, key, stride_dkv, _column_sums(dks[i]), L, D, MAIN, REST)
        _store(dv_head, key, stride_dkv, _column_sums(dvs[i]), L, D, MAIN, REST)


@triton.jit
def _dq(ds, k, M: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """ds^T @ k, as (k^T @ ds)^T, whose operands the matrix instructions read in shared memory."""
    dq = ()
    for part in tl.static_range(len(k)):
        acc = tl.zeros([k[part].shape[1], M], tl.float32)
        dq = dq + (tl.trans(_dot(tl.trans(k[part]), ds, acc, PRECISION, UPCAST)),)
    return dq


@triton.jit
def _key_block(
    q_head, k_head, v_head, do_head, lse_head, delta_head, sum_head, dk_head, dv_head, first_key,
    stride, stride_o, stride_sum, stride_dkv,
    scale, scale_log2, add,
    L: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys from first_key on, and their share of dq: added to dq if `add`."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    keys = first_key + tl.arange(0, N)
    k = _load(k_head, keys, stride, L, D, MAIN, REST, MASKED)
    v = _load(v_head, keys, stride, L, D, MAIN, REST, MASKED)
    dk, dv = _zeros(N, MAIN, REST), _zeros(N, MAIN, REST)
    TILES: tl.constexpr = (L + M - 1) // M
    for tile in range(TILES):
        rows = tile * M + tl.arange(0, M)
        q = _load(q_head, rows, stride, L, D, MAIN, REST, True)
        do = _load(do_head, rows, stride_o, L, D, MAIN, REST, True)
        lse = tl.load(lse_head + rows, mask=rows < L, other=0.0) * LOG2_E
        p = tl.exp2(_dot_heads(k, q, N, M, PRECISION, UPCAST) * scale_log2 - lse[None, :])
        if MASKED:
            p = tl.where((keys < L)[:, None], p, 0.0)
        dv = _dot_rows(p, do, dv, PRECISION, UPCAST)
        delta = tl.load(delta_head + rows, mask=rows < L, other=0.0)
        ds = (p * (_dot_heads(v, do, N, M, PRECISION, UPCAST) - delta[None, :])).to(q[0].dtype)
        dk = _dot_rows(ds, q, dk, PRECISION, UPCAST)
        dq = _dq(ds, k, M, MAIN, REST, PRECISION, UPCAST)
        there = _load(sum_head, rows, stride_sum, L if add else 0, D, MAIN, REST, True)
        dq = _add_scaled(there, dq, scale)
        _store(sum_head, rows, stride_sum, dq, L, D, MAIN, REST)
    _store(dk_head, keys, stride_dkv, _scaled(dk, scale), L, D, MAIN, REST)
    _store(dv_head, keys, stride_dkv, dv, L, D, MAIN, REST)


@triton.jit
def _head_bwd(
    do, qkv, out, lse, delta, dqkv, partial, scale, scale_log2, program, heads,
    stride_batch, stride_token, stride_slot, stride_head,
    L: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ALIGN: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, TAIL: tl.constexpr, FEW: tl.constexpr, ROWS: tl.constexpr, IN_PLACE: tl.constexpr,
    SEVERAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients of one head of one image, the `program`-th of all."""
    batch, head = (program // heads).to(tl.int64), program % heads
    stride, stride_o, stride_dkv = stride_token * ALIGN, heads * D, 3 * heads * D
    q_head = qkv + batch * stride_batch * ALIGN + head * stride_head * ALIGN
    k_head = q_head + stride_slot * ALIGN
    v_head = k_head + stride_slot * ALIGN
    o_head = out + (batch * L * heads + head) * D
    do_head = do + (batch * L * heads + head) * D
    dq_head = dqkv + (batch * L * 3 * heads + head) * D
    dk_head = dq_head + heads * D
    dv_head = dk_head + heads * D
    lse_head = lse + program.to(tl.int64) * L
    delta_head = delta + program.to(tl.int64) * L
    if IN_PLACE:
        sum_head, stride_sum = dq_head, stride_dkv
    elif SEVERAL:
        sum_head, stride_sum = partial + tl.program_id(0) * (L * D), D
    else:
        sum_head, stride_sum = partial + (batch * L * heads + head) * D, stride_o

    for tile in range((L + ROWS - 1) // ROWS):
        rows = tile * ROWS + tl.arange(0, ROWS)
        do_rows = _load(do_head, rows, stride_o, L, D, MAIN, REST, True)
        o_rows = _load(o_head, rows, stride_o, L, D, MAIN, REST, True)
        tl.store(delta_head + rows, _row_dot(do_rows, o_rows), mask=rows < L)
    tl.debug_barrier()
    FULL: tl.constexpr = L // N
    for block in range(FULL):
        _key_block(
            q_head, k_head, v_head, do_head, lse_head, delta_head, sum_head, dk_head, dv_head, block * N,
            stride, stride_o, stride_sum, stride_dkv, scale, scale_log2, block > 0,
            L, D, MAIN, REST, M, N, False, PRECISION, UPCAST,
        )  # fmt: skip
        tl.debug_barrier()
    if TAIL > 0:
        _key_block(
            q_head, k_head, v_head, do_head, lse_head, delta_head, sum_head, dk_head, dv_head, FULL * N,
            stride, stride_o, stride_sum, stride_dkv, scale, scale_log2, FULL > 0,
            L, D, MAIN, REST, M, TAIL, True, PRECISION, UPCAST,
        )  # fmt: skip
        tl.debug_barrier()
    if FEW > 0 or not IN_PLACE:
        _finish_dq(
            q_head, k_head, v_head, do_head, lse_head, delta_head, sum_head, dq_head, dk_head, dv_head,
            stride, stride_o, stride_sum, stride_dkv, scale, scale_log2, L, D, MAIN, REST, ROWS, FEW,
        )  # fmt: skip


@triton.jit
def _attention_bwd_kernel(
    do, qkv, out, lse, delta, dqkv, partial, scale, scale_log2, heads, count,
    stride_batch, stride_token, stride_slot, stride_head,
    L: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ALIGN: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, TAIL: tl.constexpr, FEW: tl.constexpr, ROWS: tl.constexpr, IN_PLACE: tl.constexpr,
    SEVERAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq is added up in `partial` [B, L, H, d] or, if IN_PLACE, in dqkv itself: only one program touches its part.

    If SEVERAL, a program takes every so many of the `count` heads of all images, one after the other, and `partial`,
    [programs, L, d], stays in the L2 cache. The barriers let its threads read there what others of them wrote.
    """
    if SEVERAL:
        # What is hoisted out of this loop would take the registers of the loops inside.
        for first in tl.range(0, count, tl.num_programs(0), disable_licm=True):
            program = first + tl.program_id(0)
            if program < count:
                _head_bwd(
                    do, qkv, out, lse, delta, dqkv, partial, scale, scale_log2, program, heads,
                    stride_batch, stride_token, stride_slot, stride_head,
                    L, D, MAIN, REST, ALIGN, M, N, TAIL, FEW, ROWS, IN_PLACE, SEVERAL, PRECISION, UPCAST,
                )  # fmt: skip
                tl.debug_barrier()
    else:
        _head_bwd(
            do, qkv, out, lse, delta, dqkv, partial, scale, scale_log2, tl.program_id(0), heads,
            stride_batch, stride_token, stride_slot, stride_head,
            L, D, MAIN, REST, ALIGN, M, N, TAIL, FEW, ROWS, IN_PLACE, SEVERAL, PRECISION, UPCAST,
        )  # fmt: skip


@dataclass(frozen=True)
class Config:
    M: int  # queries per tile
    N: int  # keys per full block
    num_warps: int
    num_stages: int = 2


def _columns(head_dim: int) -> tuple[int, int]:
    """A head's columns as a power of two and a padded remainder, which is 0 where the next power of two is as small."""
    padded = max(16, triton.next_power_of_2(head_dim))
    main = padded // 2
    rest = max(16, triton.next_power_of_2(head_dim - main)) if head_dim > main else 0
    return (main, rest) if main >= 16 and main + rest < padded else (padded, 0)


def _tail(length: int, block: int) -> int:
    """What holds the rest of `length` after full blocks: a power of two, at least 16, or 0."""
    rest = length % block
    return max(16, triton.next_power_of_2(rest)) if rest else 0


def _resident_config(head_dim: int, fp8: bool = False) -> Config:
    """fp8: a result whose addresses take registers of their own, which blocks of 32 keys leave."""
    # Up to 80 columns two programs of 4 warps share a multiprocessor; beyond, its shared memory holds one, of 8 warps,
    # whose registers hold the scores of 64 keys.
    m, n, num_warps = (64, 128, 4) if sum(_columns(head_dim)) <= 80 else (128, 64, 8)
    return Config(m, 32 if fp8 else n, num_warps, num_stages=1)


def _stream_config(head_dim: int, itemsize: int) -> Config:
    # Two stages of keys and values in less than the 99 KiB of shared memory that every GPU since Ampere has.
    if itemsize == 4:
        return Config(32 if sum(_columns(head_dim)) <= 80 else 16, 32, 8)
    return Config(64, 64, 4)


def _bwd_config(head_dim: int, itemsize: int, major: int) -> Config:
    # As many keys as the registers of 8 warps hold the gradients of: dq is read and written once per block.
    columns = sum(_columns(head_dim))
    if itemsize == 4:
        return Config(32, 32, 8, num_stages=1)
    if major not in (9, 10):  # shared memory may be 99 KiB
        return Config(32, 128 if columns <= 64 else 64, 8)
    return Config(64 if columns <= 64 else 32, 128, 8)


def _streams(length: int, head_dim: int, itemsize: int, programs: int, device: torch.device) -> bool:
    """Whether keys and values are read again for each tile of queries, by a program of its own.

    They are where they do not fit in shared memory, where Triton keeps them in registers (float32, and GPUs other than
    Hopper), and where one program per head would leave multiprocessors idle.
    """
    rows = length // 128 * 128 + _tail(length, 128)
    if itemsize == 4 or 2 * rows * sum(_columns(head_dim)) * itemsize > _RESIDENT_BYTES or capability(device)[0] != 9:
        return True
    return device.type == "cuda" and programs < torch.cuda.get_device_properties(device).multi_processor_count


def _takes_several(head_dim: int, itemsize: int, major: int) -> bool:
    """Whether a program of the backward kernel has the registers for a loop over heads, where it needs `partial`."""
    return itemsize == 2 and major == 9 and sum(_columns(head_dim)) <= 80


def _resident_programs(device: torch.device) -> int:
    """Of the backward kernel on Hopper: its registers fill a multiprocessor. Two in the interpreter, to see a loop."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _addressable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied unless a head's rows are contiguous and 32 bits address an image."""
    *_, last = tensor.stride()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    return tensor if last == 1 and reach < 2**31 else tensor.contiguous()


def _alignment(tensor: torch.Tensor) -> int:
    """The largest power of two, at most 8, that divides every stride but the last; 1 if the address is not aligned."""
    divisor = math.gcd(8, *tensor.stride()[:-1])
    return divisor if tensor.data_ptr() % 16 == 0 else 1


def _precision(tensor: torch.Tensor) -> str:
    return matmul_precision() if tensor.dtype == torch.float32 else "tf32"


def _upcast(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and triton.knobs.runtime.interpret


def attention_fwd(qkv: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, log-sum-exp of each query's scores [B, H, L] in float32)."""
    batch, length, _, heads, head_dim = qkv.shape
    out = torch.empty((batch, length, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=qkv.device)
    _launch_fwd(qkv, scale, out, lse)
    return out, lse


def attention_fp8_fwd(qkv: torch.Tensor, largest: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(out / row_scale in float8_e4m3fn, row_scale [B, L], each image's own)."""
    batch, length, _, heads, head_dim = qkv.shape
    out = torch.empty((batch, length, heads, head_dim), dtype=torch.float8_e4m3fn, device=qkv.device)
    row_scale = torch.empty((batch, length), dtype=torch.float32, device=qkv.device)
    _launch_fwd(qkv, scale, out, None, largest.contiguous(), row_scale)
    return out, row_scale


def _launch_fwd(qkv: torch.Tensor, scale: float, out, lse, largest=None, row_scale=None) -> None:
    batch, length, _, heads, head_dim = qkv.shape
    qkv, itemsize, width = _addressable(qkv), qkv.element_size(), heads * head_dim
    stream = _streams(length, head_dim, itemsize, batch * heads, qkv.device)
    config = _stream_config(head_dim, itemsize) if stream else _resident_config(head_dim, largest is not None)
    with torch.cuda.device_of(qkv):
        _attention_fwd_kernel[(batch * heads, triton.cdiv(length, config.M) if stream else 1)](
            qkv, out, lse, largest, row_scale, scale * _LOG2_E, heads,
            TAIL=_tail(length, config.N), STREAM=stream, FIRST=2 * width // COLUMNS,
            LAST=triton.cdiv(3 * width, COLUMNS), TOKENS=triton.next_power_of_2(length), FP8_MAX=FP8_MAX,
            **_shared(qkv, config),
        )  # fmt: skip


def attention_bwd(dout, qkv, out, lse, scale: float) -> torch.Tensor:
    """dqkv."""
    batch, length, _, heads, head_dim = qkv.shape
    qkv, dout, out, itemsize = _addressable(qkv), dout.contiguous(), out.contiguous(), qkv.element_size()
    major, _ = capability(qkv.device)
    config = _bwd_config(head_dim, itemsize, major)
    dqkv = torch.empty((batch, length, 3, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    count = programs = batch * heads
    if _takes_several(head_dim, itemsize, major):
        programs = min(count, _resident_programs(qkv.device))
    in_place, partial = qkv.dtype == torch.float32, None
    if not in_place:  # elsewhere each block of keys would round dq
        partial = lse.new_empty((programs, length, head_dim) if programs < count else out.shape)
    rest = length % config.N
    few = rest if length >= config.N and rest <= _FEW else 0
    with torch.cuda.device_of(qkv):
        _attention_bwd_kernel[(programs,)](
            dout, qkv, out, lse, torch.empty_like(lse), dqkv, partial, scale, scale * _LOG2_E, heads, count,
            TAIL=0 if few else _tail(length, config.N), FEW=few, ROWS=4 * config.num_warps, IN_PLACE=in_place,
            SEVERAL=programs < count, **_shared(qkv, config),
        )  # fmt: skip
    return dqkv


def _shared(qkv: torch.Tensor, config: Config) -> dict:
    """What both kernels take."""
    align, (main, rest) = _alignment(qkv), _columns(qkv.shape[-1])
    names = ("stride_batch", "stride_token", "stride_slot", "stride_head")
    given = {name: stride // align for name, stride in zip(names, qkv.stride()[:-1], strict=True)}
    given |= {"L": qkv.shape[1], "D": qkv.shape[-1], "MAIN": main, "REST": rest, "ALIGN": align}
    given |= {"M": config.M, "N": config.N, "num_warps": config.num_warps, "num_stages": config.num_stages}
    return given | {"PRECISION": _precision(qkv), "UPCAST": _upcast(qkv)}
