"""Linear layer over a long skip connection, followed by LayerNorm.

    z = concat[x, skip] @ weight^T + bias = x @ weight[:, :D]^T + skip @ weight[:, D:]^T + bias
    y = LayerNorm(z) * norm_weight + norm_bias        or z without norm_weight

and, as a block begins with a norm of y, that norm with its modulation in the same pass if it is wanted;
`skip_norms_fp8` is these two norms alone, the second as `layer_norm_modulate_fp8` returns it.

Source: Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models" (2023); the norm: SPEC 3.

Dtypes: x float32, bfloat16 or float16 (float64: reference only), or under autocast its dtype; skip and weight are
converted to x's dtype, z and y have it. Products are accumulated and the norm is computed in float32.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients.
Backend "cuda" computes z for bfloat16 alone, contiguous, D, E and N multiples of 8, and adds the bias in
x's dtype; its norm and its backward pass are those of "triton".
"""

import torch
import torch.nn.functional as F

from epg_fast.ops.backends import (
    FLOATS,
    autocast_dtype,
    check_backend,
    needs_gradient,
    product_operand,
    require_dtypes,
    require_gemm_operands,
    require_installed_triton,
    require_triton,
)
from epg_fast.ops.checks import check_both, check_floating, check_shapes
from epg_fast.ops.extension import require_gemms
from epg_fast.ops.layer_norm_modulate import (
    checked_norm,
    layer_norm_modulate_bwd_ref,
    layer_norm_modulate_ref,
    norm_fp8,
    norm_statistics,
    require_triton_norm,
    residual_norm_modulate,
)
from epg_fast.ops.registration import Backward, operation
from epg_fast.ops.spec import OpSpec, of_tokens

NextNorm = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def skip_linear_ref(x, skip, weight, bias, norm_weight=None, norm_bias=None, eps=1e-5, next_norm=None):
    """`skip_linear` in plain PyTorch."""
    y = F.linear(torch.cat([x, skip.to(x.dtype)], dim=-1), weight.to(x.dtype), bias.to(x.dtype))
    if norm_weight is not None:
        y = layer_norm_modulate_ref(y, norm_weight, norm_bias, eps=eps)
    return y if next_norm is None else (y, layer_norm_modulate_ref(y, *next_norm, eps))


def _forward(
    x, skip, parameter, weight, bias, norm_weight, norm_bias,
    next_weight, next_bias, next_shift, next_scale, eps: float, backend: str,
):  # fmt: skip
    """(y, the next norm of y, z, mean and rstd of z, of y); None what the norms that are there do not make.

    weight: parameter in x's dtype. Products read the one, and the gradient of the other is written in its own dtype.
    """
    z = skip_linear_ref(x, skip, weight, bias)
    if norm_weight is None:
        return z, *[None] * 6
    y = layer_norm_modulate_ref(z, norm_weight, norm_bias, eps=eps)
    made = z, *norm_statistics(z, eps)
    if next_weight is None:
        return y, None, *made, None, None
    after = layer_norm_modulate_ref(y, next_weight, next_bias, next_shift, next_scale, eps)
    return y, after, *made, *norm_statistics(y, eps)


def _kernel(x, skip, _, weight, bias, norm_weight, *norms_eps_and_backend):
    *norms_and_eps, backend = norms_eps_and_backend
    if backend == "cuda":
        z = x.new_empty((*x.shape[:-1], weight.shape[0]))
        torch.ops.epg_fast.skip_linear_out(z, x, skip, weight, bias.to(x.dtype).contiguous())
    else:
        from epg_kernels.skip_linear import skip_linear_fwd

        z = skip_linear_fwd(x, skip, weight, bias)
    if norm_weight is None:
        return z, *[None] * 6
    from epg_kernels.skip_linear import skip_norms_fwd

    return skip_norms_fwd(z, norm_weight, *norms_and_eps)


def _backward(
    dy, dnext, x, skip, weight, parameter_dtype: torch.dtype, bias, norm_weight, norm_bias,
    next_weight, next_bias, next_shift, next_scale, z, mean, rstd, next_mean, next_rstd,
    need_x: bool, need_skip: bool, need_parameter: bool, need_bias: bool,
):  # fmt: skip
    """dy: the gradient of y; dnext: of the next norm's result; either may be missing."""
    norm, after = (norm_weight, norm_bias), (next_weight, next_bias, next_shift, next_scale)
    dz, norm_grads, next_grads = dy, (None, None), (None, None, None, None)
    if next_weight is not None:
        y = (z.to(mean.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) * norm_weight + norm_bias
        dnext, y = torch.zeros_like(z) if dnext is None else dnext, y.to(z.dtype)  # rounded as it left
        dz, *next_grads = layer_norm_modulate_bwd_ref(dnext, y, *after, next_mean, next_rstd, dy)
    if norm_weight is not None:
        dz, *norm_grads = layer_norm_modulate_bwd_ref(dz, z, *norm, None, None, mean, rstd)[:3]
    rows, split = dz.to(z.dtype if norm_weight is not None else dz.dtype).flatten(0, -2), x.shape[-1]
    dx = (rows @ weight[:, :split]).view(x.shape) if need_x else None
    dskip = (rows @ weight[:, split:]).view(skip.shape) if need_skip else None
    dweight = None
    if need_parameter:
        dweight = (rows.t() @ torch.cat([x, skip], dim=-1).flatten(0, -2)).to(parameter_dtype)
    acc_dtype = torch.promote_types(dz.dtype, torch.float32)
    dbias = dz.flatten(0, -2).sum(0, dtype=acc_dtype).to(bias.dtype) if need_bias else None
    return dx, dskip, dweight, dbias, *norm_grads, *next_grads


_operation = operation(
    "skip_linear",
    _forward,
    _kernel,
    "y next z mean rstd next_mean next_rstd",
    Backward(
        _backward,
        "epg_kernels.skip_linear:skip_linear_bwd",
        "x skip parameter bias norm_weight norm_bias next_weight next_bias next_shift next_scale",
    ),
)


def skip_linear(
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "plain",
    next_norm: NextNorm | None = None,
    operand: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm(concat[x, skip] @ weight^T + bias), without the norm if norm_weight is None.

    x: [B, L, D]; skip: [B, L, E]; weight: [N, D + E], x's columns first; bias, norm_weight, norm_bias: [N]. Returns
    [B, L, N] in x's dtype, or autocast's where it is on. next_norm: weight, bias [N], shift, scale [B, N], [B, 1, N] or
    None: returns (y, LayerNorm(y) * (1 + scale) + shift); kernels make both in one pass each way.
    backend: "plain" (plain PyTorch, which stores the concatenation), "triton" (which does not), "cuda"
    (nor does the C++/CUDA extension, for compute capability 9.0). operand: a copy of weight in the dtype of products,
    which kernels read instead of casting it; "plain" leaves it.
    Raises ValueError for shapes that do not fit and for a backend that cannot run here.
    """
    check_backend("skip_linear", backend, ("plain", "triton", "cuda"))
    _check_shapes(x, skip, weight, bias, norm_weight, norm_bias)
    dtype = autocast_dtype(x) or x.dtype
    x, skip = x.to(dtype), skip.to(dtype)
    if backend not in ("triton", "cuda"):
        return skip_linear_ref(x, skip, weight, bias, norm_weight, norm_bias, eps, next_norm)
    if next_norm is not None and norm_weight is None:
        z = skip_linear(x, skip, weight, bias, backend=backend, operand=operand)
        return residual_norm_modulate(z, *next_norm, eps, backend="triton")[:2]
    parameter, weight = weight, product_operand("skip_linear", weight, operand, dtype)
    if backend == "cuda":
        _require_cuda(x, skip, parameter, weight, bias, norm_weight, norm_bias)
    else:
        floats = {"x": x, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
        require_triton("skip_linear", skip, weight, **floats)
    like_z = x[..., :1].expand(*x.shape[:2], len(weight))
    if norm_weight is not None:
        require_triton_norm("skip_linear", len(weight), x)
    if next_norm is not None:
        next_norm = *next_norm[:2], *checked_norm("skip_linear", "triton", like_z, *next_norm)[:2]
    norms = norm_weight, norm_bias, *(next_norm or [None] * 4)
    made = _operation(x, skip, parameter, weight, bias, *norms, eps, backend)
    return made[0] if next_norm is None else made[:2]


def skip_norms_fp8(
    z: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    next_norm: NextNorm,
    eps: float = 1e-5,
    backend: str = "plain",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norms of `skip_linear` alone, of a z that is there, the second quantised row by row.

    Returns (y [B, L, N], next norm of y / row_scale [B, L, N] in float8_e4m3fn, row_scale [B, L]). backend: "plain" or
    "triton". Arguments and errors as there. There is no gradient: ValueError if one would be needed.
    """
    checked_norm("skip_norms_fp8", backend, z, norm_weight, norm_bias, None, None, fp8=True)
    return norm_fp8("skip_norms_fp8", backend, z, *next_norm, eps, first=(norm_weight, norm_bias))


def _require_cuda(x, skip, parameter, weight, bias, norm_weight, norm_bias) -> None:
    require_dtypes("skip_linear", (torch.bfloat16,), "cuda", x=x)
    require_dtypes("skip_linear", FLOATS, "cuda", bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    norm = {} if norm_weight is None else {"norm_weight": norm_weight, "norm_bias": norm_bias}
    operands = {"x": x, "skip": skip, "weight": weight}
    require_gemm_operands("skip_linear", weight.shape[0], operands, {"bias": bias, **norm})
    if norm or needs_gradient(x, skip, parameter, bias):
        require_installed_triton("skip_linear")
    require_gemms("skip_linear", x.device)


def _check_shapes(x, skip, weight, bias, norm_weight, norm_bias) -> None:
    check_floating("skip_linear", x=x, skip=skip, weight=weight, bias=bias)
    if x.dim() != 3 or skip.dim() != 3 or x.shape[:2] != skip.shape[:2]:
        raise ValueError(
            f"skip_linear: got x of shape {tuple(x.shape)} and skip of shape {tuple(skip.shape)}, wanted [B, L, D] and "
            "[B, L, E] with the same B and L"
        )
    sizes, columns = {"K": x.shape[2] + skip.shape[2]}, f": the columns of x ({x.shape[2]}), then of skip"
    check_shapes("skip_linear", sizes, weight=(weight, "NK", f"{columns} ({skip.shape[2]})"))
    check_both("skip_linear", norm_weight=norm_weight, norm_bias=norm_bias)
    vectors = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    check_shapes("skip_linear", sizes, **{name: (tensor, "N") for name, tensor in vectors.items()})


def _bytes(shape: tuple[int, int, int, int], itemsize: int, backward: bool = False) -> int:
    """For N = D, with the norm. Forward reads x, skip, weight and parameters, writes z, and reads it to write y.

    Backward reads dy and z and writes dz, reads dz for dx and dskip, for dweight and for dbias, weight, x and skip each
    once, and writes the gradients. Parameters and statistics are float32.
    """
    batch, tokens, width, skip_width = shape
    rows = batch * tokens
    operands = rows * (width + skip_width) * itemsize
    weight = width * (width + skip_width) * itemsize
    y, vector, statistics = rows * width * itemsize, width * 4, rows * 4
    if backward:
        return (3 + 3) * y + 2 * operands + 2 * weight + 4 * vector + 2 * statistics
    return operands + weight + 3 * y + 3 * vector + 2 * statistics


SPEC = OpSpec(
    name="skip_linear",
    shapes=of_tokens((1584, 768), (768, 768), (1024, 1024), (1920, 768), (2688, 768)),
    odd_shapes=((3, 17, 40, 24), (1, 5, 72, 40), (2, 3, 17, 9)),
    bytes=_bytes,
    multiply_adds=lambda batch, tokens, width, skip: batch * tokens * width * (width + skip),
)
