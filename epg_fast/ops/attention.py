"""Softmax attention for short sequences, on packed queries, keys and values.

    p = softmax(scale * q k^T)        over the keys, per image and head
    o = p v

Source: Vaswani et al., "Attention Is All You Need" (2017). The kernel computes the softmax online (Milakov &
Gimelshein, 2018) and recomputes p in the backward pass from its log-sum-exp (Dao et al., "FlashAttention", 2022).

Dtypes: float32, bfloat16 or float16 (float64 in the reference and in PyTorch's), o has qkv's. The reference accumulates
in float32 (float64 for float64). The kernel does too, and rounds p and its gradient to qkv's dtype for the second
product; float32 products follow torch.set_float32_matmul_precision.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients; where scores
reach the hundreds, gradients are within 4e-3 of the largest, whatever the reference's error.

`attention_fp8` returns o / row_scale in float8_e4m3fn for a product in FP8, row_scale = max |v| / 448 over an image. No
pass has to look for the largest o: o is a mean of values v, and the product that makes them knows theirs. A scale that
is larger than a row needs costs float8_e4m3fn nothing but what is below 2^-15 of it.

With g = do v^T and delta = sum_d(do * o): dv = p^T do, ds = p * (g - delta), dq = scale * ds k, dk = scale * ds^T q.
"""

import contextlib
import functools
import importlib
import importlib.util
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from epg_fast.ops.backends import (
    accumulation_dtype,
    autocast_dtype,
    check_backend,
    refuse_gradient,
    require_at_most,
    require_triton,
)
from epg_fast.ops.checks import check_dtype, check_floating, check_shapes
from epg_fast.ops.linear_fp8_fused import COLUMNS
from epg_fast.ops.quantize_rows import scale_of
from epg_fast.ops.registration import Backward, operation
from epg_fast.ops.spec import OpSpec

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SDPA = ("plain", *_SDPA)
"""PyTorch's scaled_dot_product_attention: as it chooses itself, and each of its kernels."""
PACKAGES = {
    "flash_attn": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "flash_attn_3": ("flash_attn_interface", "build the folder hopper of flash-attention"),
    "flash_attn_4": ("flash_attn.cute", "pip install flash-attn-4"),
}
_BACKENDS = (*SDPA, *PACKAGES, "triton")
_WITHOUT_DROPOUT = ("triton", "flash_attn_3", "flash_attn_4")
_MAX_TRITON_HEAD_DIM = 128
_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def attention_ref(qkv: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """The formula in plain PyTorch; shapes and dtypes as in the module's docstring."""
    with torch.autocast(qkv.device.type, enabled=False):
        return _forward(qkv, _scale(qkv, scale))[0]


def _forward(qkv, scale: float):
    """(out, log-sum-exp of the scores [B, H, L])."""
    out, scores = _attend(qkv, scale)
    return out.to(qkv.dtype).contiguous(), scores.logsumexp(-1)


def _attend(qkv, scale: float):
    """(o, the scores [B, H, L, L])."""
    q, k, v = _heads(qkv, accumulation_dtype(qkv))
    scores = scale * (q @ k.transpose(-1, -2))
    return (scores.softmax(-1) @ v).transpose(1, 2), scores


def attention_fp8_ref(
    qkv: torch.Tensor, largest: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_fp8` in plain PyTorch."""
    with torch.autocast(qkv.device.type, enabled=False):
        return _forward_fp8(qkv, largest, _scale(qkv, scale))


def _forward_fp8(qkv, largest, scale: float):
    first = 2 * qkv.shape[3] * qkv.shape[4] // COLUMNS
    row_scale = scale_of(largest[first:].amax((0, 2), keepdim=True)[0].expand(qkv.shape[:2]))
    out = _attend(qkv, scale)[0] / row_scale[..., None, None]
    return out.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).contiguous(), row_scale.contiguous()


def _backward(dout, qkv, out, lse, scale: float):
    q, k, v = _heads(qkv, lse.dtype)
    g, o = (tensor.to(lse.dtype).transpose(1, 2) for tensor in (dout, out))
    p = (scale * (q @ k.transpose(-1, -2)) - lse.unsqueeze(-1)).exp()
    ds = p * (g @ v.transpose(-1, -2) - (g * o).sum(-1, keepdim=True))
    gradients = scale * (ds @ k), scale * (ds.transpose(-1, -2) @ q), p.transpose(-1, -2) @ g
    return torch.stack(gradients).permute(1, 3, 0, 2, 4).to(qkv.dtype).contiguous()


def _heads(qkv: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """q, k and v as [B, H, L, d]."""
    # unbind first: Inductor copies the gradient of a permuted qkv twice
    return tuple(part.transpose(1, 2) for part in qkv.to(dtype or qkv.dtype).unbind(2))


def _scale(qkv: torch.Tensor, scale: float | None) -> float:
    return qkv.shape[-1] ** -0.5 if scale is None else scale


_operation = operation(
    "attention",
    _forward,
    "epg_kernels.attention:attention_fwd",
    "out lse",
    Backward(_backward, "epg_kernels.attention:attention_bwd", "qkv"),
)
_fp8_operation = operation("attention_fp8", _forward_fp8, "epg_kernels.attention:attention_fp8_fwd", "out row_scale")


def attention(
    qkv: torch.Tensor, scale: float | None = None, dropout_p: float = 0.0, backend: str = "plain"
) -> torch.Tensor:
    """softmax(scale * q k^T) v for every image and head of packed queries, keys and values.

    qkv: [B, L, 3, H, d]; scale: positive, d^-1/2 if None; dropout_p: probability of dropping an attention weight, the
    others scaled by 1 / (1 - dropout_p), not for "triton", "flash_attn_3" and "flash_attn_4". Returns [B, L, H, d],
    contiguous, in qkv's dtype, or in autocast's where that is on.
    backend: "plain" (PyTorch's scaled_dot_product_attention), "flash", "cudnn", "efficient" or "math" (that kernel of
    it and no other), "triton" (the hand-written kernel, d <= 128), "flash_attn", "flash_attn_3" or "flash_attn_4" (the
    package).
    Raises ValueError for a shape, scale or dropout_p that does not fit and for a backend that cannot run here.
    """
    check_backend("attention", backend, _BACKENDS)
    _check(qkv, scale, dropout_p, backend)
    qkv, scale = qkv.to(autocast_dtype(qkv) or qkv.dtype), _scale(qkv, scale)
    if backend == "triton":
        _require_triton("attention", qkv)
        return _operation(qkv, scale)[0]
    if backend in PACKAGES:
        return _of_package(backend, qkv, scale, dropout_p)
    if backend in ("cudnn", "efficient") and qkv.device.type == "cpu":
        raise ValueError(
            f"attention: got qkv on {qkv.device}, wanted a CUDA device for backend={backend!r}; move it there or use "
            "backend='plain'"
        )
    with sdpa_kernel(_SDPA[backend]) if backend in _SDPA else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(*_heads(qkv), dropout_p=dropout_p, scale=scale)
    return out.transpose(1, 2).contiguous()


def attention_fp8(
    qkv: torch.Tensor, largest: torch.Tensor, scale: float | None = None, backend: str = "plain"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` quantised with a scale per image: (o / row_scale [B, L, H, d] in float8_e4m3fn, row_scale [B, L]).

    qkv: [B, L, 3, H, d]; largest: [T, B, L] in float32, |qkv|'s in each token and 128 of its 3 H d values, as
    `linear_fp8_fused` returns it; scale: as there. backend: "plain" or "triton". There is no gradient.
    Raises ValueError as `attention` does, and for a tensor that requires a gradient.
    """
    check_backend("attention_fp8", backend, ("plain", "triton"))
    _check(qkv, scale, 0.0, backend, "attention_fp8")
    parts = -(-math.prod(qkv.shape[2:]) // COLUMNS)
    sizes = {"T": parts, "B": qkv.shape[0], "L": qkv.shape[1]}
    check_shapes("attention_fp8", sizes, largest=(largest, "TBL"))
    check_dtype("attention_fp8", torch.float32, "convert it", largest=largest)
    refuse_gradient("attention_fp8", qkv, largest)
    if backend != "triton":
        return attention_fp8_ref(qkv, largest, scale)
    _require_triton("attention_fp8", qkv, largest, fp8=True)
    return _fp8_operation(qkv, largest, _scale(qkv, scale))


def _require_triton(op: str, qkv: torch.Tensor, *others: torch.Tensor, fp8: bool = False) -> None:
    require_triton(op, *others, fp8=fp8, qkv=qkv)
    require_at_most(op, _MAX_TRITON_HEAD_DIM, "head dimension d=", qkv.shape[-1])


def _of_package(backend: str, qkv: torch.Tensor, scale: float, dropout_p: float) -> torch.Tensor:
    """Attention of Dao et al.'s packages; raises ValueError where the package or what it needs is missing."""
    name, remedy = PACKAGES[backend]
    if not installed(name):
        raise ValueError(
            f"attention: got backend={backend!r}, but {name} is not installed; {remedy}, or use backend='plain'"
        )
    if not qkv.is_cuda or qkv.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention: got qkv in {qkv.dtype} on {qkv.device}, wanted bfloat16 or float16 on a CUDA device for "
            f"backend={backend!r}; convert it or use backend='plain'"
        )
    package = importlib.import_module(name)
    if backend == "flash_attn":
        return package.flash_attn_qkvpacked_func(qkv, dropout_p, softmax_scale=scale)
    out = package.flash_attn_func(*qkv.unbind(2), softmax_scale=scale)
    return out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp, too


@functools.cache
def installed(package: str) -> bool:
    """Whether the package can be imported; it is not."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of what the package would be a part of
        return False


def _check(qkv: torch.Tensor, scale: float | None, dropout_p: float, backend: str, op: str = "attention") -> None:
    remedy = "; reshape the projection's output with .view(B, L, 3, H, d)"
    check_shapes(op, {"3": 3}, qkv=(qkv, "BL3Hd", remedy))
    if 0 in qkv.shape:
        raise ValueError(f"{op}: got qkv of shape {tuple(qkv.shape)}, wanted no empty dimension")
    check_floating(op, qkv=qkv)
    if scale is not None and not (0 < scale < math.inf):
        raise ValueError(f"{op}: got scale={scale}, wanted a positive number, or None for d ** -0.5")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: got dropout_p={dropout_p}, wanted 0 <= dropout_p < 1")
    if dropout_p > 0 and backend in _WITHOUT_DROPOUT:
        raise ValueError(f"{op}: got dropout_p={dropout_p} with backend={backend!r}, wanted 0; use backend='plain'")


def _bytes(shape: tuple[int, int, int, int], itemsize: int, backward: bool = False) -> int:
    """Forward reads q, k, v and writes o and lse; backward reads q, k, v, o, do and lse and writes dq, dk, dv."""
    batch, length, heads, head_dim = shape
    return (8 if backward else 4) * batch * length * heads * head_dim * itemsize + batch * heads * length * 4


SPEC = OpSpec(  # shapes: (B, L, H, d)
    name="attention",
    shapes=((64, 258, 22, 72), (256, 258, 12, 64), (64, 258, 16, 64), (64, 258, 16, 120), (64, 258, 21, 128)),
    odd_shapes=((1, 17, 2, 72), (3, 5, 1, 40), (1, 199, 1, 64), (1, 33, 1, 120), (1, 18, 1, 128)),
    bytes=_bytes,
    multiply_adds=lambda batch, length, heads, head_dim: 2 * batch * heads * length**2 * head_dim,
    backward_products=2.5,
)
