"""Sinusoidal embedding of the time condition, and the condition of the decoder made from it.

    time[k] = cos(t 10000^(-k / h)), time[h + k] = sin(t 10000^(-k / h))     h = dim // 2, k < h
    condition = SiLU(time + label)

An odd dim ends with a zero column.

Source: Vaswani et al., "Attention Is All You Need" (2017); Peebles & Xie, "Scalable Diffusion Models with
Transformers" (2023); the time condition 250 ln(sigma): SPEC 2.

Dtypes: t any (float64: reference only); the embedding is computed in t's dtype, at least float32, and rounded to
`dtype`; the condition has the dtype that adding label to it gives.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients. It grows with
t: a float32 phase of 1600 is known to 1e-4.
"""

import torch
import torch.nn.functional as F

from epg_fast.ops.backends import FLOATS, accumulation_dtype, check_backend, require_dtypes, require_triton
from epg_fast.ops.checks import check_shapes
from epg_fast.ops.registration import Backward, operation
from epg_fast.ops.spec import OpSpec

_MAX_PERIOD = 10_000.0


def timestep_embedding_ref(t, dim, *, dtype=None) -> torch.Tensor:
    """`timestep_embedding` in plain PyTorch."""
    acc_dtype = accumulation_dtype(t)
    t = t.to(acc_dtype)
    half = dim // 2
    exponent = torch.arange(half, device=t.device, dtype=acc_dtype) / half
    base = torch.full((), _MAX_PERIOD, device=t.device, dtype=acc_dtype)
    phase = t[:, None] * torch.pow(base, -exponent)[None]
    return F.pad(torch.cat([phase.cos(), phase.sin()], dim=-1), (0, dim % 2)).to(dtype or acc_dtype)


def timestep_condition_ref(t, dim, label=None, *, dtype=None) -> tuple[torch.Tensor, torch.Tensor]:
    """`timestep_condition` in plain PyTorch."""
    time = timestep_embedding_ref(t, dim, dtype=dtype)
    u = time if label is None else time + label
    return time, F.silu(u.to(torch.promote_types(u.dtype, torch.float32))).to(u.dtype)


def _forward(t, label, dim: int, dtype: torch.dtype, with_condition: bool):
    time, condition = timestep_condition_ref(t, dim, label, dtype=dtype)
    return time, condition if with_condition else None


def _backward(dtime, dcondition, t, time, label):
    acc_dtype, half, dlabel = accumulation_dtype(t), time.shape[1] // 2, None
    grad = torch.zeros_like(time, dtype=acc_dtype) if dtime is None else dtime.to(acc_dtype)
    if dcondition is not None:
        u = (time if label is None else time + label).to(acc_dtype)
        opening = torch.sigmoid(u)
        through = dcondition.to(acc_dtype) * opening * (1 + u * (1 - opening))
        grad = grad + through
        dlabel = None if label is None else through.to(label.dtype, copy=True)
    exact = timestep_embedding_ref(t, 2 * half)
    frequency = _MAX_PERIOD ** (-torch.arange(half, device=t.device, dtype=acc_dtype) / half)
    slope = torch.cat([-exact[:, half:] * frequency, exact[:, :half] * frequency], dim=1)
    return (grad[:, : 2 * half] * slope).sum(1).to(t.dtype), dlabel


_operation = operation(
    "timestep_embedding",
    _forward,
    "epg_kernels.timestep_embedding:timestep_embedding_fwd",
    "time condition",
    Backward(_backward, "epg_kernels.timestep_embedding:timestep_embedding_bwd", "t label"),
)


def timestep_embedding(
    t: torch.Tensor,
    dim: int,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "plain",
) -> torch.Tensor:
    """Sinusoidal embedding of t [B]: [B, dim], cosines, then sines, then a zero column if dim is odd.

    t: 250 ln(sigma), may be negative. dtype: of the result, by default float32, or float64 when t is float64.
    backend: "plain" (plain PyTorch), "triton" (one kernel; t not in float64).
    Raises ValueError for shapes that do not fit and for a backend that cannot run here.
    """
    _check("timestep_embedding", backend, t, dim)
    if backend != "triton":
        return timestep_embedding_ref(t, dim, dtype=dtype)
    return _operation(t.float(), None, dim, dtype or torch.float32, False)[0]


def timestep_condition(
    t: torch.Tensor,
    dim: int,
    label: torch.Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "plain",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(embedding of t, SiLU(embedding + label)): [B, dim] each, the second in the dtype of the sum.

    label: class embedding [B, dim] or None. The other arguments, and the errors, are those of `timestep_embedding`.
    """
    _check("timestep_condition", backend, t, dim, label)
    if backend != "triton":
        return timestep_condition_ref(t, dim, label, dtype=dtype)
    return _operation(t.float(), label, dim, dtype or torch.float32, True)


def _check(op: str, backend: str, t: torch.Tensor, dim: int, label: torch.Tensor | None = None) -> None:
    check_backend(op, backend, ("plain", "triton"))
    sizes = {"D": dim}
    check_shapes(op, sizes, t=(t, "B"))
    if dim < 2:
        raise ValueError(f"{op}: got dim={dim}, wanted at least 2")
    check_shapes(op, sizes, label=(label, "BD"))
    if backend == "triton":
        require_triton(op, t, label)
        require_dtypes(op, (*FLOATS, torch.int64, torch.int32), t=t)
        require_dtypes(op, FLOATS, label=label)


def _bytes(shape: tuple[int, int], itemsize: int, backward: bool = False) -> int:
    """Forward reads t and label and writes time and condition; backward reads both gradients, time and label and writes
    dt and dlabel."""
    batch, dim = shape
    return ((5 if backward else 3) * batch * dim) * itemsize + (2 if backward else 1) * batch * 4


SPEC = OpSpec(
    name="timestep_embedding",
    shapes=((64, 768), (256, 768), (64, 1024)),
    odd_shapes=((9, 40), (17, 17), (33, 2), (5, 768)),
    bytes=_bytes,
)
