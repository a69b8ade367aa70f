"""Image to token sequence: patch embedding, behind the class and time tokens, and position embedding.

    tokens[:, T + n] = W . patch_n(image) + bias + position[T + n]      N = (H/p) (W/p) patches in row-major order
    tokens[:, :T] = prefix + position[:T]

Source: SPEC 2 and 3; Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), for the embedding, Conv2d with stride
p.

Shapes: image: [B, C, H, W]; weight: [E, C, p, p]; bias: [E]; position: [1, T+N, E]; prefix: [B, T, E]. Returns
[B, T+N, E].
Dtypes: any floating dtypes, mixed freely. The product's is autocast's, else what image and weight promote to; image and
weight are rounded to it, sums are float32 (float64 for float64 operands).
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from epg_fast.ops.backends import (
    autocast_dtype,
    check_backend,
    interpreting,
    require_dtypes,
    require_triton,
    without_none,
)
from epg_fast.ops.spec import OpSpec

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def patch_embed_ref(
    image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, position: torch.Tensor, prefix: torch.Tensor
) -> torch.Tensor:
    """The formula in plain PyTorch; shapes and dtypes as in the module's docstring."""
    product = _product_dtype(image, weight)
    patches = F.conv2d(image.to(product), weight.to(product), bias.to(product), stride=weight.shape[-1])
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1) + position


def _product_dtype(image: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    dtype = torch.promote_types(image.dtype, weight.dtype)
    return dtype if dtype == torch.float64 else autocast_dtype(image) or dtype


@torch.library.custom_op("epg_fast::patch_embed", mutates_args=(), device_types="cpu")
def _forward_op(
    image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, position: torch.Tensor, prefix: torch.Tensor
) -> torch.Tensor:
    """image has the dtype of the product, to which weight is rounded; its gradient has its own."""
    if interpreting():
        return _forward_triton(image, weight, bias, position, prefix)
    return patch_embed_ref(image, weight.to(image.dtype), bias, position, prefix).contiguous()


@_forward_op.register_kernel("cuda")
def _forward_triton(image, weight, bias, position, prefix):
    from epg_kernels.patch_embed import patch_embed_fwd

    return patch_embed_fwd(image, weight, bias, position, prefix, _token_dtype(image, position, prefix))


@_forward_op.register_fake
def _(image, weight, bias, position, prefix):
    dtype = _token_dtype(image, position, prefix)
    return image.new_empty((image.shape[0], *position.shape[1:]), dtype=dtype)


def _token_dtype(image, position, prefix) -> torch.dtype:
    """What torch.cat and the sum with position promote to."""
    return torch.promote_types(torch.promote_types(image.dtype, prefix.dtype), position.dtype)


@torch.library.custom_op("epg_fast::patch_embed_bwd", mutates_args=(), device_types="cpu")
def _backward_op(
    dtokens: torch.Tensor, image: torch.Tensor, weight: torch.Tensor, needs: Sequence[bool]
) -> list[torch.Tensor]:
    """Gradients of image and weight, in this order; an empty tensor where `needs` has no use for one."""
    if interpreting():
        return _backward_triton(dtokens, image, weight, needs)
    patch = weight.shape[-1]
    grid = (image.shape[2] // patch, image.shape[3] // patch)
    dpatches = dtokens[:, -math.prod(grid) :].to(image.dtype).transpose(1, 2).unflatten(2, grid)
    dimage = dweight = None
    if needs[0]:
        dimage = torch.nn.grad.conv2d_input(image.shape, weight.to(image.dtype), dpatches, patch).contiguous()
    if needs[1]:
        dweight = torch.nn.grad.conv2d_weight(image, weight.shape, dpatches, patch).contiguous().to(weight.dtype)
    return without_none(image, [dimage, dweight])


@_backward_op.register_kernel("cuda")
def _backward_triton(dtokens, image, weight, needs):
    from epg_kernels.patch_embed import patch_embed_bwd

    return without_none(image, patch_embed_bwd(dtokens, image, weight, needs))


@_backward_op.register_fake
def _(dtokens, image, weight, needs):
    made = [t.new_empty(t.shape) if needed else None for t, needed in zip((image, weight), needs, strict=True)]
    return without_none(image, made)


def _setup_context(ctx, inputs, output):
    image, weight, *others = inputs
    ctx.save_for_backward(image, weight)
    ctx.extras, ctx.dtypes = others[2].shape[1], [tensor.dtype for tensor in others]


def _backward(ctx, dtokens):
    needs_image, needs_weight, needs_bias, needs_position, needs_prefix = ctx.needs_input_grad
    bias_dtype, position_dtype, prefix_dtype = ctx.dtypes
    dimage = dweight = dposition = None
    if needs_image or needs_weight:
        dimage, dweight = _backward_op(dtokens, *ctx.saved_tensors, [needs_image, needs_weight])
    if needs_bias or needs_position:
        dposition = dtokens.sum(0, keepdim=True, dtype=torch.float32)
    return (
        dimage if needs_image else None,
        dweight if needs_weight else None,
        dposition[0, ctx.extras :].sum(0).to(bias_dtype) if needs_bias else None,
        dposition.to(position_dtype) if needs_position else None,
        dtokens[:, : ctx.extras].to(prefix_dtype) if needs_prefix else None,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.epg_fast.patch_embed)
def _forward_product_flops(image_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(image_shape) * weight_shape[0]


@register_flop_formula(torch.ops.epg_fast.patch_embed_bwd)
def _backward_product_flops(dtokens_shape, image_shape, weight_shape, needs, *args, out_shape=None, **kwargs) -> int:
    return sum(needs) * _forward_product_flops(image_shape, weight_shape)


def patch_embed(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position: torch.Tensor,
    prefix: torch.Tensor,
    *,
    backend: str = "plain",
) -> torch.Tensor:
    """Tokens [B, T+N, E]: prefix tokens, then the patches of the image, plus position.

    image: [B, C, H, W], with H and W multiples of p; weight: [E, C, p, p]; bias: [E]; position: [1, T+N, E]; prefix:
    [B, T, E]. All of them get gradients. The tokens' dtype is what torch.cat and the sum with position promote to.
    backend: "plain" (plain PyTorch), "triton" (the hand-written kernels).
    Raises ValueError for shapes that do not fit, and for a backend that cannot run here.
    """
    check_backend("patch_embed", backend, ("plain", "triton"))
    _check_shapes(image, weight, bias, position, prefix)
    if backend != "triton":
        return patch_embed_ref(image, weight, bias, position, prefix)
    require_triton("patch_embed", image, weight, bias, position, prefix)
    tensors = {"image": image, "weight": weight, "bias": bias, "position": position, "prefix": prefix}
    require_dtypes("patch_embed", _FLOATS, **tensors)
    return _forward_op(image.to(_product_dtype(image, weight)), weight, bias, position, prefix)


def _check_shapes(image, weight, bias, position, prefix) -> None:
    if image.dim() != 4:
        raise ValueError(f"patch_embed: got image of shape {tuple(image.shape)}, wanted [B, C, H, W]")
    if not image.is_floating_point():
        raise ValueError(f"patch_embed: got image in {image.dtype}, wanted a floating dtype; normalise its pixels")
    batch, channels, height, width = image.shape
    if weight.dim() != 4 or weight.shape[1] != channels or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"patch_embed: got weight of shape {tuple(weight.shape)}, wanted [E, {channels}, p, p] for an image of "
            f"{channels} channels"
        )
    embed, patch = weight.shape[0], weight.shape[-1]
    if height % patch or width % patch:
        raise ValueError(
            f"patch_embed: got an image of {height} x {width}, wanted multiples of the patch size {patch}; crop it to "
            f"{height // patch * patch} x {width // patch * patch}"
        )
    if bias.shape != (embed,):
        raise ValueError(f"patch_embed: got bias of shape {tuple(bias.shape)}, wanted [{embed}]")
    if prefix.dim() != 3 or prefix.shape[0] != batch or prefix.shape[2] != embed:
        raise ValueError(f"patch_embed: got prefix of shape {tuple(prefix.shape)}, wanted [{batch}, T, {embed}]")
    length = prefix.shape[1] + (height // patch) * (width // patch)
    if position.shape != (1, length, embed):
        raise ValueError(
            f"patch_embed: got position of shape {tuple(position.shape)}, wanted [1, {length}, {embed}]: one row per "
            "prefix token and patch"
        )


_EXTRAS = 2  # prefix tokens that the presets have: a class token and the time token


def _sizes(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Pixels, tokens, weights and rows of the position embedding."""
    batch, channels, size, patch, width = shape
    length = _EXTRAS + (size // patch) ** 2
    return batch * channels * size**2, batch * length * width, channels * patch**2 * width, length * width


def _bytes(shape: tuple[int, ...], itemsize: int, backward: bool = False) -> int:
    """Forward reads image and parameters and writes the tokens; backward reads the tokens' gradient and the image and
    writes the parameters' gradients. Parameters are float32.
    """
    pixels, tokens, weights, positions = _sizes(shape)
    return (pixels + tokens) * itemsize + 4 * (weights + positions + shape[-1])


def _flops(shape: tuple[int, ...], backward: bool = False) -> int:
    """The product, and bias and position; backward: the weight's gradient, and their sums."""
    pixels, tokens, _, _ = _sizes(shape)
    return 2 * pixels * shape[-1] + 2 * tokens


SPEC = OpSpec(
    name="patch_embed",
    shapes=((64, 3, 256, 16, 768), (256, 3, 256, 16, 768), (64, 3, 256, 16, 1024), (64, 3, 512, 32, 768)),
    odd_shapes=((3, 3, 8, 4, 40), (1, 1, 6, 3, 17), (2, 3, 32, 16, 24), (1, 3, 28, 14, 40)),
    bytes=_bytes,
    flops=_flops,
)
