"""Linear layer followed by GELU, the first half of an MLP.

    z = x @ weight^T + bias
    y = z Phi(z)                    Phi: the normal distribution function, not its tanh approximation
    dz = dy (Phi(z) + z phi(z))     phi: the normal density

Source: Hendrycks & Gimpel, "Gaussian Error Linear Units" (2016).

Shapes: x: [..., K]; weight: [N, K]; bias: [N]; y: [..., N].
Dtypes: x float32, bfloat16 or float16 (float64: reference only), or under autocast its dtype; weight is converted to
x's dtype, which y has. Products are accumulated, bias added and GELU evaluated in float32.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients. For 16-bit
results the kernels take 1 - Phi from a polynomial with a relative error of 1.5e-5.
Backend "cuda" takes bfloat16 alone, contiguous, K and N multiples of 8, and adds the bias in x's dtype; its
backward pass is that of "triton".
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from epg_fast.ops.backends import (
    autocast_dtype,
    check_backend,
    interpreting,
    require_dtypes,
    require_gemm_operands,
    require_triton,
    require_triton_for_cuda,
)
from epg_fast.ops.extension import require_gemms
from epg_fast.ops.spec import OpSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_gelu_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The formula in plain PyTorch; shapes and dtypes as in the module's docstring."""
    return F.gelu(F.linear(x, weight.to(x.dtype), bias.to(x.dtype)))


@torch.library.custom_op("epg_fast::linear_gelu", mutates_args=(), device_types="cpu")
def _forward_op(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, save_preactivation: bool, backend: str = "triton"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, z); z is empty unless it is to be saved, without which there is no backward pass."""
    if interpreting() and backend == "triton":
        return _forward_triton(x, weight, bias, save_preactivation)
    z = F.linear(x, weight, bias.to(x.dtype))
    return F.gelu(z), z if save_preactivation else x.new_empty(0)


@_forward_op.register_kernel("cuda")
def _forward_kernel(x, weight, bias, save_preactivation, backend="triton"):
    forward = _forward_triton if backend == "triton" else _forward_cuda
    return forward(x, weight, bias, save_preactivation)


def _forward_triton(x, weight, bias, save_preactivation):
    from epg_kernels.linear_gelu import linear_gelu_fwd

    y, z = linear_gelu_fwd(x, weight, bias, save_preactivation)
    return y, x.new_empty(0) if z is None else z


def _forward_cuda(x, weight, bias, save_preactivation):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    z = torch.empty_like(y) if save_preactivation else None
    torch.ops.epg_fast.linear_gelu_out(y, z, x, weight, bias.to(x.dtype).contiguous())
    return y, x.new_empty(0) if z is None else z


@_forward_op.register_fake
def _(x, weight, bias, save_preactivation, backend="triton"):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, torch.empty_like(y) if save_preactivation else x.new_empty(0)


@torch.library.custom_op("epg_fast::linear_gelu_bwd", mutates_args=(), device_types="cpu")
def _backward_op(
    dy: torch.Tensor,
    z: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias), empty where not `needed`."""
    if interpreting():
        return _backward_triton(dy, z, x, weight, bias, needed)
    acc_dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    dz = torch.ops.aten.gelu_backward(dy.to(acc_dtype), z.to(acc_dtype))
    rows = dz.to(z.dtype).flatten(0, -2)
    dx = (rows @ weight).view(x.shape) if needed[0] else x.new_empty(0)
    dweight = rows.t() @ x.flatten(0, -2) if needed[1] else weight.new_empty(0)
    return dx, dweight, dz.flatten(0, -2).sum(0).to(bias.dtype) if needed[2] else bias.new_empty(0)


@_backward_op.register_kernel("cuda")
def _backward_triton(dy, z, x, weight, bias, needed):
    from epg_kernels.linear_gelu import linear_gelu_bwd

    grads = linear_gelu_bwd(dy, z, x, weight, bias, *needed)
    return tuple(
        tensor.new_empty(0) if grad is None else grad for tensor, grad in zip((x, weight, bias), grads, strict=True)
    )


@_backward_op.register_fake
def _(dy, z, x, weight, bias, needed):
    return tuple(
        tensor.new_empty(tensor.shape if need else 0) for tensor, need in zip((x, weight, bias), needed, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, *_ = inputs
    ctx.save_for_backward(output[1], x, weight, bias)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _dz):
    needed = ctx.needs_input_grad[:3]
    grads = _backward_op(dy, *ctx.saved_tensors, needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.epg_fast.linear_gelu)
def _forward_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _product_flops(x_shape, weight_shape)


@register_flop_formula(torch.ops.epg_fast.linear_gelu_bwd)
def _backward_flops(dy_shape, z_shape, x_shape, weight_shape, bias_shape, needed, out_shape=None, **kwargs) -> int:
    return _product_flops(x_shape, weight_shape) * (needed[0] + needed[1])


def _product_flops(x_shape, weight_shape) -> int:
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * weight_shape[0] * weight_shape[1]


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, backend: str = "plain") -> torch.Tensor:
    """gelu(x @ weight^T + bias), with the exact GELU.

    x: [..., K]; weight: [N, K]; bias: [N]. Returns [..., N] in x's dtype, or autocast's where it is on.
    backend: "plain" (plain PyTorch), "triton" (one kernel forward; it keeps z for the backward pass only where
    there will be one), "cuda" (the same in the C++/CUDA extension, for compute capability 9.0).
    Raises ValueError for shapes that do not fit and for a backend that cannot run here.
    """
    check_backend("linear_gelu", backend, ("plain", "triton", "cuda"))
    _check_shapes(x, weight, bias)
    dtype = autocast_dtype(x) or x.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    if backend not in ("triton", "cuda"):
        return linear_gelu_ref(x, weight, bias)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias))
    if backend == "cuda":
        _require_cuda(x, weight, bias, needs_gradient)
    else:
        require_triton("linear_gelu", x, weight, bias)
        require_dtypes("linear_gelu", _DTYPES, x=x, bias=bias)
    return _forward_op(x, weight, bias, needs_gradient, backend)[0]


def _require_cuda(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, needs_gradient: bool) -> None:
    require_dtypes("linear_gelu", (torch.bfloat16,), "cuda", x=x)
    require_dtypes("linear_gelu", _DTYPES, "cuda", bias=bias)
    require_gemm_operands("linear_gelu", weight.shape[0], {"x": x, "weight": weight}, {"bias": bias})
    if needs_gradient:
        require_triton_for_cuda("linear_gelu", "backward pass")
    require_gemms("linear_gelu", x.device)


def _check_shapes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_gelu: got x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}, wanted [..., K] "
            "and [N, K] with the same K; weight is that of a Linear, one row per output"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_gelu: got bias of shape {tuple(bias.shape)}, wanted [{weight.shape[0]}]")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if not tensor.is_floating_point():
            raise ValueError(f"linear_gelu: got {name} in {tensor.dtype}, wanted a floating dtype; convert it")


def _bytes(shape: tuple[int, int, int], itemsize: int, backward: bool = False) -> int:
    """Forward reads x, weight and bias and writes y; training also writes z, counted here with the backward pass.

    Backward reads dy and z and writes dz, reads dz and weight for dx, dz and x for dweight, and writes dx, dweight and
    dbias. bias and dbias are float32.
    """
    rows, k, n = shape
    x, weight, y, bias = rows * k * itemsize, n * k * itemsize, rows * n * itemsize, n * 4
    if backward:
        return (1 + 3 + 2) * y + 2 * x + 2 * weight + bias
    return x + weight + y + bias


def _flops(shape: tuple[int, int, int], backward: bool = False) -> int:
    """Of the matrix products alone: one forward, two backward."""
    rows, k, n = shape
    return (4 if backward else 2) * rows * k * n


SPEC = OpSpec(
    name="linear_gelu",
    shapes=(
        (16512, 1584, 6336),
        (66048, 768, 3072),
        (16512, 1024, 4096),
        (16512, 1920, 7680),
        (16512, 2688, 10752),
    ),
    odd_shapes=((5, 40, 24), (33, 72, 160), (1, 17, 40), (130, 64, 48)),
    bytes=_bytes,
    flops=_flops,
)
