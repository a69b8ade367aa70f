"""Linear layer over a long skip connection, followed by LayerNorm.

    z = concat[x, skip] @ weight^T + bias = x @ weight[:, :D]^T + skip @ weight[:, D:]^T + bias
    y = LayerNorm(z) * norm_weight + norm_bias        or z without norm_weight

and, as a block begins with a norm of y, that norm with its modulation in the same pass if it is wanted;
`skip_norms_fp8` is these two norms alone, the second as `layer_norm_modulate_fp8` returns it.

Source: Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models" (2023); the norm: SPEC 3.

Shapes: x: [B, L, D]; skip: [B, L, E]; weight: [N, D + E]; bias, norm_weight, norm_bias: [N]; y: [B, L, N].
Dtypes: x float32, bfloat16 or float16 (float64: reference only), or under autocast its dtype; skip and weight are
converted to x's dtype, z and y have it. Products are accumulated and the norm is computed in float32.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients.
Backend "cuda" computes z for bfloat16 alone, contiguous, D, E and N multiples of 8, and adds the bias in
x's dtype; its norm and its backward pass are those of "triton".
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from epg_fast.ops.backends import (
    accumulation_dtype,
    autocast_dtype,
    check_backend,
    interpreting,
    product_operand,
    require_dtypes,
    require_gemm_operands,
    require_grid,
    require_triton,
    require_triton_for_cuda,
    without_none,
)
from epg_fast.ops.extension import require_gemms
from epg_fast.ops.fp8 import refuse_gradient
from epg_fast.ops.layer_norm_modulate import (
    check_norm_shapes,
    layer_norm_modulate_bwd_ref,
    layer_norm_modulate_fp8_ref,
    layer_norm_modulate_ref,
    norm_statistics,
    per_sample,
    require_triton_norm,
    residual_norm_modulate,
)
from epg_fast.ops.spec import OpSpec

NextNorm = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def skip_linear_ref(
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    next_norm: NextNorm | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The formula in plain PyTorch; shapes and dtypes as in the module's docstring."""
    y = F.linear(torch.cat([x, skip.to(x.dtype)], dim=-1), weight.to(x.dtype), bias.to(x.dtype))
    if norm_weight is not None:
        y = layer_norm_modulate_ref(y, norm_weight, norm_bias, eps=eps)
    return y if next_norm is None else (y, layer_norm_modulate_ref(y, *next_norm, eps))


@torch.library.custom_op("epg_fast::skip_linear", mutates_args=(), device_types="cpu")
def _forward_op(
    x: torch.Tensor,
    skip: torch.Tensor,
    parameter: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    next_weight: torch.Tensor | None,
    next_bias: torch.Tensor | None,
    next_shift: torch.Tensor | None,
    next_scale: torch.Tensor | None,
    eps: float,
    backend: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, the next norm of y, z, mean and rstd of z, of y); empty what the norms that are there do not make.

    weight: parameter in x's dtype. Products read the one, and the gradient of the other is written in its own dtype.
    """
    norms = norm_weight, norm_bias, next_weight, next_bias, next_shift, next_scale
    if interpreting():
        return _forward_kernel(x, skip, parameter, weight, bias, *norms, eps, backend)
    z = skip_linear_ref(x, skip, weight, bias)
    if norm_weight is None:
        return z, *_empty(x, 6)
    y = layer_norm_modulate_ref(z, norm_weight, norm_bias, eps=eps)
    made = y, z, *norm_statistics(z, eps)
    if next_weight is None:
        return y, *_empty(x, 1), *made[1:], *_empty(x, 2)
    after = layer_norm_modulate_ref(y, next_weight, next_bias, next_shift, next_scale, eps)
    return y, after, *made[1:], *norm_statistics(y, eps)


def _empty(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    return tuple(x.new_empty(0) for _ in range(count))


@_forward_op.register_kernel("cuda")
def _forward_kernel(x, skip, parameter, weight, bias, *norms_and_eps, backend="triton"):
    if len(norms_and_eps) == 8:
        *norms_and_eps, backend = norms_and_eps
    forward = _forward_triton if backend == "triton" else _forward_cuda
    return forward(x, skip, weight, bias, *norms_and_eps)


def _forward_triton(x, skip, weight, bias, *norms_and_eps):
    from epg_kernels.skip_linear import skip_linear_fwd, skip_norms_fwd

    return tuple(without_none(x, skip_norms_fwd(skip_linear_fwd(x, skip, weight, bias), *norms_and_eps)))


def _forward_cuda(x, skip, weight, bias, norm_weight, *norms_and_eps):
    z = x.new_empty((*x.shape[:-1], weight.shape[0]))
    torch.ops.epg_fast.skip_linear_out(z, x, skip, weight, bias.to(x.dtype).contiguous())
    if norm_weight is None:
        return z, *_empty(x, 6)
    from epg_kernels.skip_linear import skip_norms_fwd

    return tuple(without_none(x, skip_norms_fwd(z, norm_weight, *norms_and_eps)))


@_forward_op.register_fake
def _(x, skip, parameter, weight, bias, norm_weight, norm_bias, next_weight, *_):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if norm_weight is None:
        return y, *_empty(x, 6)
    dtype = accumulation_dtype(y)
    statistics = [y.new_empty(y.shape[:-1], dtype=dtype) for _ in range(4)]
    if next_weight is None:
        return y, *_empty(x, 1), torch.empty_like(y), *statistics[:2], *_empty(x, 2)
    return y, torch.empty_like(y), torch.empty_like(y), *statistics


@torch.library.custom_op("epg_fast::skip_linear_bwd", mutates_args=(), device_types="cpu")
def _backward_op(
    dy: torch.Tensor | None,
    dnext: torch.Tensor | None,
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    weight_dtype: torch.dtype,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    next_weight: torch.Tensor | None,
    next_bias: torch.Tensor | None,
    next_shift: torch.Tensor | None,
    next_scale: torch.Tensor | None,
    z: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    next_mean: torch.Tensor,
    next_rstd: torch.Tensor,
    needed: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of x, skip, weight and bias, empty where not `needed`, then of the norms, empty for what is not there.

    dy: the gradient of y, None if only the next norm's result has one; dnext: of that, None without a next norm.
    """
    norm, after = (norm_weight, norm_bias), (next_weight, next_bias, next_shift, next_scale)
    if interpreting():
        saved = *norm, *after, z, mean, rstd, next_mean, next_rstd
        return _backward_triton(dy, dnext, x, skip, weight, weight_dtype, bias, *saved, needed)
    dz, norm_grads, next_grads = dy, (None, None), (None, None, None, None)
    if next_weight is not None:
        y = (z.to(mean.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) * norm_weight + norm_bias
        y = y.to(z.dtype).to(mean.dtype)  # rounded as it left
        dz, *next_grads = layer_norm_modulate_bwd_ref(dnext, y, *after, next_mean, next_rstd)
        dz = dz if dy is None else dz + dy.to(dz.dtype)
    if norm_weight is not None:
        # In the statistics' dtype, so that what leaves is rounded once.
        dz, *norm_grads = layer_norm_modulate_bwd_ref(dz, z.to(mean.dtype), *norm, None, None, mean, rstd)[:3]
    rows, split = dz.to(z.dtype if norm_weight is not None else dz.dtype).flatten(0, -2), x.shape[-1]
    dx = (rows @ weight[:, :split]).view(x.shape) if needed[0] else None
    dskip = (rows @ weight[:, split:]).view(skip.shape) if needed[1] else None
    dweight = (rows.t() @ torch.cat([x, skip], dim=-1).flatten(0, -2)).to(weight_dtype) if needed[2] else None
    acc_dtype = torch.promote_types(dz.dtype, torch.float32)
    dbias = dz.flatten(0, -2).sum(0, dtype=acc_dtype).to(bias.dtype) if needed[3] else None
    grads = [dx, dskip, dweight, dbias, *norm_grads, *next_grads]
    return without_none(x, [g if g is None or g.numel() else None for g in grads])


@_backward_op.register_kernel("cuda")
def _backward_triton(dy, dnext, x, *arguments):
    from epg_kernels.skip_linear import skip_linear_bwd

    *arguments, needed = arguments
    return without_none(x, skip_linear_bwd(dy, dnext, x, *arguments, *needed))


@_backward_op.register_fake
def _(dy, dnext, x, skip, weight, weight_dtype, bias, *norms_and_saved):
    *norms_and_saved, needed = norms_and_saved
    grads = [tensor.new_empty(tensor.shape) for tensor in (x, skip, weight, bias)]
    grads[2] = grads[2].to(weight_dtype)
    grads = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    norms = [None if tensor is None else tensor.new_empty(tensor.shape) for tensor in norms_and_saved[:6]]
    return without_none(x, (*grads, *norms))


def _setup_context(ctx, inputs, output):
    x, skip, parameter, *others = inputs[:11]
    ctx.weight_dtype = parameter.dtype
    ctx.save_for_backward(x, skip, *others, *output[2:])
    ctx.mark_non_differentiable(*output[2:], *(() if inputs[7] is not None else output[1:2]))
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dnext, *_):
    saved = ctx.saved_tensors
    if dnext is None and saved[6] is not None:
        dnext = torch.zeros_like(saved[10])  # z's shape
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    grads = _backward_op(dy, dnext, *saved[:3], ctx.weight_dtype, *saved[3:], needed)
    wanted = [*needed, *(tensor is not None for tensor in saved[4:10])]
    dx, dskip, dparameter, *others = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return dx, dskip, dparameter, None, *others, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.epg_fast.skip_linear)
def _forward_flops(x_shape, skip_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.epg_fast.skip_linear_bwd)
def _backward_flops(dy_shape, dnext_shape, x_shape, skip_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    need_x, need_skip, need_weight, _ = args[-1]
    width, skip_width = x_shape[-1], skip_shape[-1]
    columns = width * (need_x + need_weight) + skip_width * (need_skip + need_weight)
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0] * columns


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
        require_triton("skip_linear", x, skip, weight, bias, norm_weight, norm_bias)
        require_dtypes("skip_linear", _DTYPES, x=x, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    if norm_weight is not None:
        require_triton_norm("skip_linear", weight.t())
        require_grid("skip_linear", x.shape[0])
    if next_norm is None:
        return _forward_op(x, skip, parameter, weight, bias, norm_weight, norm_bias, *[None] * 4, eps, backend)[0]
    after, *modulation = next_norm[:2], *(per_sample(tensor) for tensor in next_norm[2:])
    check_norm_shapes(
        "skip_linear", x[..., :1].expand(*x.shape[:2], len(weight)), *after, shift=modulation[0], scale=modulation[1]
    )
    require_triton_norm("skip_linear", x, *after, *modulation)
    norm = norm_weight, norm_bias
    return _forward_op(x, skip, parameter, weight, bias, *norm, *after, *modulation, eps, backend)[:2]


@torch.library.custom_op("epg_fast::skip_norms_fp8", mutates_args=(), device_types="cpu")
def _norms_fp8_op(
    z: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    next_weight: torch.Tensor,
    next_bias: torch.Tensor,
    next_shift: torch.Tensor | None,
    next_scale: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    norms = norm_weight, norm_bias, next_weight, next_bias, next_shift, next_scale
    if interpreting():
        return _norms_fp8_triton(z, *norms, eps)
    return tuple(tensor.contiguous() for tensor in _skip_norms_fp8_ref(z, *norms, eps))


def _skip_norms_fp8_ref(z, norm_weight, norm_bias, next_weight, next_bias, next_shift, next_scale, eps):
    y = layer_norm_modulate_ref(z, norm_weight, norm_bias, eps=eps)
    return y, *layer_norm_modulate_fp8_ref(y, next_weight, next_bias, next_shift, next_scale, eps)


@_norms_fp8_op.register_kernel("cuda")
def _norms_fp8_triton(z, *norms_and_eps):
    from epg_kernels.skip_linear import skip_norms_fp8

    return skip_norms_fp8(z, *norms_and_eps)


@_norms_fp8_op.register_fake
def _(z, *norms_and_eps):
    row_scale = z.new_empty(z.shape[:-1], dtype=accumulation_dtype(z))
    return z.new_empty(z.shape), z.new_empty(z.shape, dtype=torch.float8_e4m3fn), row_scale


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
    op, after, modulation = "skip_norms_fp8", next_norm[:2], [per_sample(tensor) for tensor in next_norm[2:]]
    check_backend(op, backend, ("plain", "triton"))
    check_norm_shapes(op, z, norm_weight, norm_bias, shift=modulation[0], scale=modulation[1])
    check_norm_shapes(op, z, *after, shift=None, scale=None)
    refuse_gradient(op, z, norm_weight, norm_bias, *after, *modulation)
    if backend != "triton":
        return _skip_norms_fp8_ref(z, norm_weight, norm_bias, *after, *modulation, eps)
    require_triton_norm(op, z, norm_weight, norm_bias, *after, *modulation, fp8=True)
    return _norms_fp8_op(z, norm_weight, norm_bias, *after, *modulation, eps)


def _require_cuda(x, skip, parameter, weight, bias, norm_weight, norm_bias) -> None:
    require_dtypes("skip_linear", (torch.bfloat16,), "cuda", x=x)
    require_dtypes("skip_linear", _DTYPES, "cuda", bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    norm = {} if norm_weight is None else {"norm_weight": norm_weight, "norm_bias": norm_bias}
    operands = {"x": x, "skip": skip, "weight": weight}
    require_gemm_operands("skip_linear", weight.shape[0], operands, {"bias": bias, **norm})
    if norm:
        require_triton_for_cuda("skip_linear", "norm")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, skip, parameter, bias)):
        require_triton_for_cuda("skip_linear", "backward pass")
    require_gemms("skip_linear", x.device)


def _check_shapes(x, skip, weight, bias, norm_weight, norm_bias) -> None:
    for name, tensor in (("x", x), ("skip", skip), ("weight", weight), ("bias", bias)):
        if not tensor.is_floating_point():
            raise ValueError(f"skip_linear: got {name} in {tensor.dtype}, wanted a floating dtype; convert it")
    if x.dim() != 3 or skip.dim() != 3 or x.shape[:2] != skip.shape[:2]:
        raise ValueError(
            f"skip_linear: got x of shape {tuple(x.shape)} and skip of shape {tuple(skip.shape)}, wanted [B, L, D] and "
            "[B, L, E] with the same B and L"
        )
    width = x.shape[2] + skip.shape[2]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(
            f"skip_linear: got weight of shape {tuple(weight.shape)}, wanted [N, {width}]: the columns of x "
            f"({x.shape[2]}), then those of skip ({skip.shape[2]})"
        )
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_weight" if norm_weight is None else "norm_bias"
        raise ValueError(f"skip_linear: got no {missing}, wanted both norm_weight and norm_bias, or neither")
    for name, parameter in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is not None and parameter.shape != weight.shape[:1]:
            raise ValueError(f"skip_linear: got {name} of shape {tuple(parameter.shape)}, wanted [{weight.shape[0]}]")


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


def _flops(shape: tuple[int, int, int, int], backward: bool = False) -> int:
    """Of the matrix products alone, for N = D: one forward, two backward."""
    batch, tokens, width, skip_width = shape
    return (4 if backward else 2) * batch * tokens * width * (width + skip_width)


SPEC = OpSpec(
    name="skip_linear",
    shapes=(
        (64, 258, 1584, 768),
        (64, 258, 768, 768),
        (64, 258, 1024, 1024),
        (64, 258, 1920, 768),
        (64, 258, 2688, 768),
    ),
    odd_shapes=((3, 17, 40, 24), (1, 5, 72, 40), (2, 3, 17, 9)),
    bytes=_bytes,
    flops=_flops,
)
