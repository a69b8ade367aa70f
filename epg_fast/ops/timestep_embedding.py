"""Sinusoidal embedding of the time condition, and the condition of the decoder made from it.

    time[k] = cos(t max_period^(-k / h)), time[h + k] = sin(t max_period^(-k / h))     h = dim // 2, k < h
    condition = SiLU(time + label)

An odd dim ends with a zero column. With of_sigma, t holds noise levels sigma, and 250 ln(sigma) is embedded.

Source: Vaswani et al., "Attention Is All You Need" (2017); Peebles & Xie, "Scalable Diffusion Models with
Transformers" (2023); the time condition 250 ln(sigma): SPEC 2.

Shapes: t: [B]; label: [B, dim] or None; time, condition: [B, dim].
Dtypes: t any (float64: reference only); the embedding is computed in t's dtype, at least float32, and rounded to
`dtype`; the condition has the dtype that adding label to it gives.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients. It grows with
t: a float32 phase of 1600 is known to 1e-4.
"""

import math

import torch
import torch.nn.functional as F

from epg_fast.ops.backends import check_backend, interpreting, require_dtypes, require_triton
from epg_fast.ops.spec import OpSpec


def timestep_embedding_ref(
    t: torch.Tensor,
    dim: int,
    max_period: float = 10_000.0,
    *,
    of_sigma: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The embedding in plain PyTorch."""
    acc_dtype = _accumulation_dtype(t)
    t = t.to(acc_dtype)
    if of_sigma:
        t = 250 * t.log()
    half = dim // 2
    exponent = torch.arange(half, device=t.device, dtype=acc_dtype) / half
    base = torch.full((), max_period, device=t.device, dtype=acc_dtype)
    phase = t[:, None] * torch.pow(base, -exponent)[None]
    return F.pad(torch.cat([phase.cos(), phase.sin()], dim=-1), (0, dim % 2)).to(dtype or acc_dtype)


def timestep_condition_ref(
    t: torch.Tensor,
    dim: int,
    label: torch.Tensor | None = None,
    max_period: float = 10_000.0,
    *,
    of_sigma: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(embedding, condition) in plain PyTorch."""
    time = timestep_embedding_ref(t, dim, max_period, of_sigma=of_sigma, dtype=dtype)
    u = time if label is None else time + label
    return time, F.silu(u.to(torch.promote_types(u.dtype, torch.float32))).to(u.dtype)


def _accumulation_dtype(t: torch.Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@torch.library.custom_op("epg_fast::timestep_embedding", mutates_args=(), device_types="cpu")
def _forward_op(
    t: torch.Tensor,
    label: torch.Tensor | None,
    dim: int,
    max_period: float,
    of_sigma: bool,
    dtype: torch.dtype,
    with_condition: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(time, condition); the condition is empty if it is not wanted."""
    if interpreting():
        return _forward_triton(t, label, dim, max_period, of_sigma, dtype, with_condition)
    time, condition = timestep_condition_ref(t, dim, label, max_period, of_sigma=of_sigma, dtype=dtype)
    return time, condition if with_condition else t.new_empty(0)


@_forward_op.register_kernel("cuda")
def _forward_triton(t, label, dim, max_period, of_sigma, dtype, with_condition):
    from epg_kernels.timestep_embedding import timestep_embedding_fwd

    condition_dtype = _condition_dtype(label, dtype) if with_condition else None
    time, condition = timestep_embedding_fwd(t, label, dim, math.log(max_period), of_sigma, dtype, condition_dtype)
    return time, t.new_empty(0) if condition is None else condition


def _condition_dtype(label: torch.Tensor | None, dtype: torch.dtype) -> torch.dtype:
    return dtype if label is None else torch.promote_types(dtype, label.dtype)


@_forward_op.register_fake
def _(t, label, dim, max_period, of_sigma, dtype, with_condition):
    time = t.new_empty((t.shape[0], dim), dtype=dtype)
    return time, torch.empty_like(time, dtype=_condition_dtype(label, dtype)) if with_condition else t.new_empty(0)


@torch.library.custom_op("epg_fast::timestep_embedding_bwd", mutates_args=(), device_types="cpu")
def _backward_op(
    dtime: torch.Tensor | None,
    dcondition: torch.Tensor | None,
    t: torch.Tensor,
    time: torch.Tensor,
    label: torch.Tensor | None,
    max_period: float,
    of_sigma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dt, dlabel); dlabel is empty without a label or without dcondition."""
    if interpreting():
        return _backward_triton(dtime, dcondition, t, time, label, max_period, of_sigma)
    acc_dtype, half, dlabel = _accumulation_dtype(t), time.shape[1] // 2, t.new_empty(0)
    grad = torch.zeros_like(time, dtype=acc_dtype) if dtime is None else dtime.to(acc_dtype)
    if dcondition is not None:
        u = (time if label is None else time + label).to(acc_dtype)
        opening = torch.sigmoid(u)
        through = dcondition.to(acc_dtype) * opening * (1 + u * (1 - opening))
        grad = grad + through
        dlabel = dlabel if label is None else through.to(label.dtype, copy=True)
    exact = timestep_embedding_ref(t, 2 * half, max_period, of_sigma=of_sigma)
    frequency = timestep_embedding_frequencies(half, max_period, t.device, acc_dtype)
    slope = torch.cat([-exact[:, half:] * frequency, exact[:, :half] * frequency], dim=1)
    dt = (grad[:, : 2 * half] * slope).sum(1)
    return (250 * dt / t if of_sigma else dt).to(t.dtype), dlabel


def timestep_embedding_frequencies(half: int, max_period: float, device, dtype) -> torch.Tensor:
    """max_period^(-k / half): [half]."""
    return max_period ** (-torch.arange(half, device=device, dtype=dtype) / half)


@_backward_op.register_kernel("cuda")
def _backward_triton(dtime, dcondition, t, time, label, max_period, of_sigma):
    from epg_kernels.timestep_embedding import timestep_embedding_bwd

    dt, dlabel = timestep_embedding_bwd(
        dtime, dcondition, t, time, label, time.shape[1], math.log(max_period), of_sigma
    )
    return dt, t.new_empty(0) if dlabel is None else dlabel


@_backward_op.register_fake
def _(dtime, dcondition, t, time, label, max_period, of_sigma):
    empty = label is None or dcondition is None
    return t.new_empty(t.shape), t.new_empty(0) if empty else label.new_empty(label.shape)


def _setup_context(ctx, inputs, output):
    t, label, _, max_period, of_sigma, _, with_condition = inputs
    ctx.save_for_backward(t, output[0], label)
    ctx.arguments, ctx.with_condition = (max_period, of_sigma), with_condition
    ctx.set_materialize_grads(False)


def _backward(ctx, dtime, dcondition):
    t, time, label = ctx.saved_tensors
    dcondition = dcondition if ctx.with_condition else None
    if dtime is None and dcondition is None:
        return (None,) * 7
    dt, dlabel = _backward_op(dtime, dcondition, t, time, label, *ctx.arguments)
    has_label_gradient = label is not None and dcondition is not None
    return dt, dlabel if has_label_gradient else None, None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)

# No FLOP formula is registered: torch.utils.flop_counter counts matrix products, and this operation has none.


def timestep_embedding(
    t: torch.Tensor,
    dim: int,
    max_period: float = 10_000.0,
    *,
    of_sigma: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "plain",
) -> torch.Tensor:
    """Sinusoidal embedding of t [B]: [B, dim], cosines, then sines, then a zero column if dim is odd.

    t: 250 ln(sigma), may be negative; with of_sigma the level sigma > 0 itself (shifted). dtype: of the result, by
    default float32, or float64 when t is float64.
    backend: "plain" (plain PyTorch), "triton" (one kernel; t not in float64).
    Raises ValueError for shapes that do not fit and for a backend that cannot run here.
    """
    check_backend("timestep_embedding", backend, ("plain", "triton"))
    _check("timestep_embedding", t, dim, max_period, None)
    if backend != "triton":
        return timestep_embedding_ref(t, dim, max_period, of_sigma=of_sigma, dtype=dtype)
    _require_triton("timestep_embedding", t)
    return _forward_op(t.float(), None, dim, max_period, of_sigma, dtype or torch.float32, False)[0]


def timestep_condition(
    t: torch.Tensor,
    dim: int,
    label: torch.Tensor | None = None,
    max_period: float = 10_000.0,
    *,
    of_sigma: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "plain",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(embedding of t, SiLU(embedding + label)): [B, dim] each, the second in the dtype of the sum.

    label: class embedding [B, dim] or None. The other arguments, and the errors, are those of `timestep_embedding`.
    """
    check_backend("timestep_condition", backend, ("plain", "triton"))
    _check("timestep_condition", t, dim, max_period, label)
    if backend != "triton":
        return timestep_condition_ref(t, dim, label, max_period, of_sigma=of_sigma, dtype=dtype)
    _require_triton("timestep_condition", t, label)
    return _forward_op(t.float(), label, dim, max_period, of_sigma, dtype or torch.float32, True)


def _require_triton(op: str, t: torch.Tensor, label: torch.Tensor | None = None) -> None:
    require_triton(op, t, label)
    require_dtypes(op, (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32), t=t)
    require_dtypes(op, (torch.float32, torch.bfloat16, torch.float16), label=label)


def _check(op: str, t: torch.Tensor, dim: int, max_period: float, label: torch.Tensor | None) -> None:
    if t.dim() != 1:
        raise ValueError(f"{op}: got t of shape {tuple(t.shape)}, wanted [B]")
    if not max_period > 0:
        raise ValueError(f"{op}: got max_period={max_period}, wanted a positive number")
    if dim < 2:
        raise ValueError(f"{op}: got dim={dim}, wanted at least 2")
    if label is not None and label.shape != (t.shape[0], dim):
        raise ValueError(f"{op}: got label of shape {tuple(label.shape)}, wanted [{t.shape[0]}, {dim}]")


def _bytes(shape: tuple[int, int], itemsize: int, backward: bool = False) -> int:
    """Forward reads t and label and writes time and condition; backward reads both gradients, time and label and writes
    dt and dlabel."""
    batch, dim = shape
    return ((5 if backward else 3) * batch * dim) * itemsize + (2 if backward else 1) * batch * 4


def _flops(shape: tuple[int, int], backward: bool = False) -> int:
    """Per value: about 20 for frequency, phase, sine or cosine, 5 for the condition; 30 in the backward pass."""
    batch, dim = shape
    return (30 if backward else 25) * batch * dim


SPEC = OpSpec(
    name="timestep_embedding",
    shapes=((64, 768), (256, 768), (64, 1024)),
    odd_shapes=((3, 40), (1, 17), (5, 2), (2, 768)),
    bytes=_bytes,
    flops=_flops,
)
