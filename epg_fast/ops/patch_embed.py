"""Image to token sequence: patch embedding, behind the class and time tokens, and position embedding.

    tokens[:, T + n] = W . patch_n(image) + bias + position[T + n]      N = (H/p) (W/p) patches in row-major order
    tokens[:, :T] = prefix + position[:T]

Source: SPEC 2 and 3; Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), for the embedding, Conv2d with stride
p.

Dtypes: any floating dtypes, mixed freely. The product's is autocast's, else what image and weight promote to; image and
weight are rounded to it, sums are float32 (float64 for float64 operands).
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients.
"""

import math

import torch
import torch.nn.functional as F

from epg_fast.ops.backends import autocast_dtype, check_backend, require_triton
from epg_fast.ops.checks import check_shapes
from epg_fast.ops.registration import Backward, operation
from epg_fast.ops.spec import OpSpec


def patch_embed_ref(image, weight, bias, position, prefix) -> torch.Tensor:
    """`patch_embed` in plain PyTorch."""
    product = _product_dtype(image, weight)
    patches = F.conv2d(image.to(product), weight.to(product), bias.to(product), stride=weight.shape[-1])
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1) + position


def _product_dtype(image: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    dtype = torch.promote_types(image.dtype, weight.dtype)
    return dtype if dtype == torch.float64 else autocast_dtype(image) or dtype


def _forward(image, weight, bias, position, prefix):
    """image has the dtype of the product, to which weight is rounded; its gradient has its own."""
    return patch_embed_ref(image, weight.to(image.dtype), bias, position, prefix)


def _backward(dtokens, image, weight, need_image: bool, need_weight: bool):
    patch = weight.shape[-1]
    grid = (image.shape[2] // patch, image.shape[3] // patch)
    dpatches = dtokens[:, -math.prod(grid) :].to(image.dtype).transpose(1, 2).unflatten(2, grid)
    dimage = dweight = None
    if need_image:
        dimage = torch.nn.grad.conv2d_input(image.shape, weight.to(image.dtype), dpatches, patch)
    if need_weight:
        dweight = torch.nn.grad.conv2d_weight(image, weight.shape, dpatches, patch).to(weight.dtype)
    return dimage, dweight


def _sums(_, given: dict) -> dict[str, torch.Tensor]:
    """Of bias, position and prefix: no work for a kernel of their own."""
    dtokens, image, weight = given["dtokens"], given["image"], given["weight"]
    extras = dtokens.shape[1] - (image.shape[2] // weight.shape[-1]) * (image.shape[3] // weight.shape[-1])
    made = {"prefix": dtokens[:, :extras]} if given["need_prefix"] else {}
    if given["need_bias"] or given["need_position"]:
        made["position"] = dtokens.sum(0, keepdim=True, dtype=torch.float32)
    if given["need_bias"]:
        made["bias"] = made["position"][0, extras:].sum(0)
    return made


_operation = operation(
    "patch_embed",
    _forward,
    "epg_kernels.patch_embed:patch_embed_fwd",
    "tokens",
    Backward(_backward, "epg_kernels.patch_embed:patch_embed_bwd", "image weight", others=_sums),
)


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
    require_triton("patch_embed", image=image, weight=weight, bias=bias, position=position, prefix=prefix)
    return _operation(image.to(_product_dtype(image, weight)), weight, bias, position, prefix)


def _check_shapes(image, weight, bias, position, prefix) -> None:
    sizes = {}
    check_shapes("patch_embed", sizes, image=(image, "BCHW"))
    if not image.is_floating_point():
        raise ValueError(f"patch_embed: got image in {image.dtype}, wanted a floating dtype; normalise its pixels")
    _, channels, height, width = image.shape
    check_shapes("patch_embed", sizes, weight=(weight, "ECpp", f" for an image of {channels} channels"))
    patch = weight.shape[-1]
    if height % patch or width % patch:
        raise ValueError(
            f"patch_embed: got an image of {height} x {width}, wanted multiples of the patch size {patch}; crop it to "
            f"{height // patch * patch} x {width // patch * patch}"
        )
    check_shapes("patch_embed", sizes, bias=(bias, "E"), prefix=(prefix, "BTE"))
    sizes["N"] = prefix.shape[1] + (height // patch) * (width // patch)
    check_shapes("patch_embed", sizes, position=(position, "1NE", ": one row per prefix token and patch"))


def _bytes(shape: tuple[int, ...], itemsize: int, backward: bool = False) -> int:
    """Forward reads image and parameters and writes the tokens; backward reads the tokens' gradient and the image and
    writes the parameters' gradients. Parameters are float32.
    """
    batch, channels, size, patch, width = shape
    length = 2 + (size // patch) ** 2  # behind the class token and the time token
    values = batch * channels * size**2 + batch * length * width
    return values * itemsize + 4 * width * (channels * patch**2 + length + 1)


SPEC = OpSpec(
    name="patch_embed",
    shapes=((64, 3, 256, 16, 768), (256, 3, 256, 16, 768), (64, 3, 256, 16, 1024), (64, 3, 512, 32, 768)),
    odd_shapes=((3, 3, 8, 4, 40), (1, 1, 6, 3, 17), (2, 3, 32, 16, 24), (1, 3, 28, 14, 40)),
    bytes=_bytes,
    multiply_adds=lambda batch, channels, size, patch, width: batch * channels * size**2 * width,
    backward_products=1.0,  # the weight's gradient
)
