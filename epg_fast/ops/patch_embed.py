"""Image to token sequence: normalisation, noise, input scaling, patch embedding, prefix tokens and position embedding.

    v = (image * unit - mean) / std                unit = 1/255 for uint8 images, else 1; mean and std only if given
    v = c_in * (v + sigma * noise)                 each term and factor only if given
    tokens[:, T + n] = W . patch_n(v) + bias + position[T + n]          N = (H/p) (W/p) patches in row-major order
    tokens[:, :T] = prefix + position[:T]

Source: SPEC 2 and 3; Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), for the embedding, Conv2d with stride
p; Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), for c_in.

Shapes: image: [B, C, H, W]; weight: [E, C, p, p]; bias: [E]; position: [T+N, E] or [1, T+N, E]; prefix: [B, T, E];
noise: [B, C, H, W]; sigma, c_in: [B]. Returns [B, T+N, E].
Dtypes: image uint8 or floating, the rest floating, mixed freely. Pixels are prepared in float32 and rounded to the
product's dtype: autocast's, else what image and weight promote to. Sums are float32 (float64 for float64 weights).
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients.

Drawn noise is a contract: the same on every device, with either backend (to float32 rounding), for any split of a
batch over ranks. Image b has sample number s = first_sample + b mod noise_batch. Its element e, in the order (channel,
row, column), is number e mod 4 of four normals from Philox4x32-10 with the 64-bit key `seed` and the counter words
(e div 4, s mod 2^32, s div 2^32, 0): words w0, w1 give r cos a, r sin a with r = sqrt(-2 ln((w0 + 1/2) / 2^32)) and
a = 2 pi w1 / 2^32, words w2, w3 the other two; w + 1/2 and w are rounded to float32. Source: Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3" (2011); Box & Muller (1958).
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
    require_grid,
    require_triton,
)
from epg_fast.ops.spec import OpSpec

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_WORD = 0xFFFFFFFF


def philox_normal(
    seed: int | torch.Tensor,
    first_sample: int | torch.Tensor,
    batch: int,
    shape: Sequence[int],
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Standard normals of samples first_sample ... first_sample + batch - 1, as the module's docstring defines them.

    seed, first_sample: integers, or int64 tensors of one element. Returns [batch, *shape], float32.
    """
    samples = first_sample + torch.arange(batch, device=device)
    return philox_normal_of(samples, seed, shape)


def philox_normal_of(
    samples: torch.Tensor, seed: int | torch.Tensor, shape: Sequence[int], draw: int | torch.Tensor = 0
) -> torch.Tensor:
    """Standard normals of the given samples, as the module's docstring defines them: [B, *shape], float32.

    samples: [B] int64, any numbers from 0. seed, draw: integers, or int64 tensors of one element. draw: the last
    counter word, 0 in `patch_embed`; others give further, independent normals of the same samples.
    """
    size = math.prod(shape)
    sample = samples[:, None]
    block = torch.arange((size + 3) // 4, device=samples.device)[None]
    words = _philox4x32((block, sample & _WORD, (sample >> 32) & _WORD, draw), (seed & _WORD, (seed >> 32) & _WORD))
    normals = [normal for pair in (words[:2], words[2:]) for normal in _box_muller(*pair)]
    return torch.stack(normals, dim=-1).flatten(1)[:, :size].reshape(-1, *shape)


def _philox4x32(counter, key):
    """Ten rounds; words are int64 in 0 ... 2^32 - 1, whose products wrap and are masked."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (high >> 32 & _WORD) ^ c1 ^ k0, high & _WORD, (low >> 32 & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _box_muller(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluated in float64, so that devices differ in the last bit at most rarely."""
    radius = (-2 * ((first.float() + 0.5) * 2.0**-32).double().log()).sqrt()
    angle = 2 * math.pi * (second.float() * 2.0**-32).double()
    return (radius * angle.cos()).float(), (radius * angle.sin()).float()


def patch_embed_ref(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    sigma: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    first_sample: int | torch.Tensor = 0,
    noise_batch: int | None = None,
    c_in: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The formula in plain PyTorch; shapes and dtypes as in the module's docstring."""
    product = _product_dtype(image, weight)
    if seed is not None:
        noise = _drawn_noise(image, seed, first_sample, noise_batch or image.shape[0])
    acc_dtype = torch.promote_types(product, torch.float32)
    pixels = _network_input(image, mean, std, sigma, noise, c_in, acc_dtype)
    patches = F.conv2d(pixels.to(product), weight.to(product), bias.to(product), stride=weight.shape[-1])
    tokens = patches.flatten(2).transpose(1, 2)
    if prefix is not None:
        tokens = torch.cat([prefix, tokens], dim=1)
    if position is not None:
        tokens = tokens + position
    return tokens.to(dtype or tokens.dtype)


def _product_dtype(image: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    dtype = torch.promote_types(image.dtype, weight.dtype)
    return dtype if dtype == torch.float64 else autocast_dtype(image) or dtype


def _accumulation_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _drawn_noise(image, seed, first_sample, noise_batch: int) -> torch.Tensor:
    noise = philox_normal(seed, first_sample, noise_batch, image.shape[1:], image.device)
    views = -(-image.shape[0] // noise_batch)
    return noise.repeat(views, 1, 1, 1)[: image.shape[0]]


def _network_input(image, mean, std, sigma, noise, c_in, acc_dtype: torch.dtype) -> torch.Tensor:
    pixels = image.to(acc_dtype) / 255 if image.dtype == torch.uint8 else image
    if mean is not None:
        pixels = pixels.to(acc_dtype)
        pixels = (pixels - _channels(mean, pixels)) / _channels(std, pixels)
    if noise is not None:
        pixels = pixels + _per_image(sigma, acc_dtype) * noise
    return pixels if c_in is None else _per_image(c_in, acc_dtype) * pixels


def _channels(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """[C, 1, 1], filled in on the device: a copy to it could not be captured in a CUDA graph."""
    return torch.stack([like.new_full((), value) for value in values]).view(-1, 1, 1)


def _per_image(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype).view(-1, 1, 1, 1)


@torch.library.custom_op("epg_fast::patch_embed", mutates_args=(), device_types="cpu")
def _forward_op(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position: torch.Tensor | None,
    prefix: torch.Tensor | None,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    first_sample: torch.Tensor | None,
    noise_batch: int,
    sigma: torch.Tensor | None,
    c_in: torch.Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and, for the backward pass, the network's input in weight's dtype: empty where that is the image itself.

    weight has the dtype of the product, position the shape [T+N, E]; seed and first_sample hold one int64 each.
    """
    arguments = (image, weight, bias, position, prefix, noise, seed, first_sample, noise_batch, sigma, c_in, mean, std)
    if interpreting():
        return _forward_triton(*arguments, dtype)
    if seed is not None:
        noise = _drawn_noise(image, seed, first_sample, noise_batch)
    pixels = _network_input(image, mean, std, sigma, noise, c_in, _accumulation_dtype(weight)).to(weight.dtype)
    tokens = patch_embed_ref(pixels, weight, bias, position, prefix, dtype=dtype)
    as_is = _is_network_input(image, weight, mean, sigma, c_in)
    return tokens.contiguous(), weight.new_empty(0) if as_is else pixels.contiguous()


def _is_network_input(image, weight, mean, sigma, c_in) -> bool:
    return image.dtype == weight.dtype and mean is None and sigma is None and c_in is None


@_forward_op.register_kernel("cuda")
def _forward_triton(
    image, weight, bias, position, prefix, noise, seed, first_sample, noise_batch, sigma, c_in, mean, std, dtype
):
    from epg_kernels.patch_embed import patch_embed_fwd

    factor, shift = _affine(image, mean, std)
    tokens, pixels = patch_embed_fwd(
        *(image, weight, bias, position, prefix, noise, seed, first_sample, noise_batch, sigma, c_in),
        *(factor, shift, dtype),
    )
    return tokens, weight.new_empty(0) if _is_network_input(image, weight, mean, sigma, c_in) else pixels


def _affine(image, mean, std) -> tuple[list[float] | None, list[float] | None]:
    """(image * unit - mean) / std as image * factor + shift, one of each per channel."""
    if mean is None and image.dtype != torch.uint8:
        return None, None
    unit, channels = 1 / 255 if image.dtype == torch.uint8 else 1.0, image.shape[1]
    mean, std = ([0.0] * channels, [1.0] * channels) if mean is None else (mean, std)
    return [unit / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


@_forward_op.register_fake
def _(image, weight, bias, position, prefix, noise, seed, first_sample, noise_batch, sigma, c_in, mean, std, dtype):
    width, _, _, patch = weight.shape
    length = (0 if prefix is None else prefix.shape[1]) + (image.shape[2] // patch) * (image.shape[3] // patch)
    pixels = 0 if _is_network_input(image, weight, mean, sigma, c_in) else image.shape
    return image.new_empty((image.shape[0], length, width), dtype=dtype), weight.new_empty(pixels)


# An operator cannot return None, so gradients that are not needed are empty tensors. dbias and dposition are float32.
@torch.library.custom_op("epg_fast::patch_embed_bwd", mutates_args=(), device_types="cpu")
def _backward_op(
    dtokens: torch.Tensor,
    pixels: torch.Tensor,
    weight: torch.Tensor,
    c_in: torch.Tensor | None,
    std: Sequence[float] | None,
    image_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of image, weight, bias and position where `needs` says so, in this order."""
    if interpreting():
        return _backward_triton(dtokens, pixels, weight, c_in, std, image_dtype, needs)
    dimage, dweight, dbias, dposition = _empty_gradients(dtokens, pixels, weight, image_dtype, needs)
    acc_dtype, patch = _accumulation_dtype(weight), weight.shape[-1]
    patches = (pixels.shape[2] // patch) * (pixels.shape[3] // patch)
    dpatches = dtokens[:, dtokens.shape[1] - patches :].to(weight.dtype)
    if needs[0]:
        columns = (dpatches @ weight.flatten(1)).to(acc_dtype).transpose(1, 2)
        grad = F.fold(columns, pixels.shape[2:], kernel_size=patch, stride=patch)
        grad = grad if std is None else grad / _channels(std, grad)
        dimage = (grad if c_in is None else _per_image(c_in, acc_dtype) * grad).to(image_dtype).contiguous()
    if needs[1]:
        columns = F.unfold(pixels, kernel_size=patch, stride=patch)
        dweight = torch.einsum("bne,bkn->ek", dpatches, columns).reshape(weight.shape).contiguous()
    if needs[2] or needs[3]:
        dposition = dtokens.sum(0, dtype=acc_dtype)
    if needs[2]:
        dbias = dposition[dtokens.shape[1] - patches :].sum(0)
    return dimage, dweight, dbias, dposition


def _empty_gradients(dtokens, pixels, weight, image_dtype, needs):
    _, length, width = dtokens.shape
    acc_dtype = _accumulation_dtype(weight)
    return (
        weight.new_empty(pixels.shape if needs[0] else 0, dtype=image_dtype),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(width if needs[2] else 0, dtype=acc_dtype),
        weight.new_empty((length, width) if needs[2] or needs[3] else 0, dtype=acc_dtype),
    )


@_backward_op.register_kernel("cuda")
def _backward_triton(dtokens, pixels, weight, c_in, std, image_dtype, needs):
    from epg_kernels.patch_embed import patch_embed_bwd

    factor = None if std is None else [1 / s for s in std]
    gradients = patch_embed_bwd(dtokens, pixels, weight, c_in, factor, image_dtype, needs)
    empty = _empty_gradients(dtokens, pixels, weight, image_dtype, (False,) * 4)
    return tuple(e if gradient is None else gradient for e, gradient in zip(empty, gradients, strict=True))


@_backward_op.register_fake
def _(dtokens, pixels, weight, c_in, std, image_dtype, needs):
    return _empty_gradients(dtokens, pixels, weight, image_dtype, needs)


def _setup_context(ctx, inputs, output):
    image, weight, bias, position, prefix, _, _, _, _, sigma, c_in, mean, std, _ = inputs
    as_is = _is_network_input(image, weight, mean, sigma, c_in)
    ctx.save_for_backward(image if as_is else output[1], weight, c_in)
    ctx.std, ctx.image_dtype, ctx.extras = std, image.dtype, 0 if prefix is None else prefix.shape[1]
    ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (bias, position, prefix))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dtokens, _dpixels):
    bias_dtype, position_dtype, prefix_dtype = ctx.dtypes
    needs = list(ctx.needs_input_grad[:4])
    dimage = dweight = dbias = dposition = None
    if any(needs):
        pixels, weight, c_in = ctx.saved_tensors
        dimage, dweight, dbias, dposition = _backward_op(dtokens, pixels, weight, c_in, ctx.std, ctx.image_dtype, needs)
    return (
        dimage if needs[0] else None,
        dweight if needs[1] else None,
        dbias.to(bias_dtype) if needs[2] else None,
        dposition.to(position_dtype) if needs[3] else None,
        dtokens[:, : ctx.extras].to(prefix_dtype) if ctx.needs_input_grad[4] else None,
        *[None] * 9,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.epg_fast.patch_embed)
def _forward_product_flops(image_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    batch, _, height, width = image_shape
    return 2 * batch * (height // weight_shape[-1]) * (width // weight_shape[-1]) * math.prod(weight_shape)


@register_flop_formula(torch.ops.epg_fast.patch_embed_bwd)
def _backward_product_flops(dtokens_shape, pixels_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    products = sum(args[-1][:2])  # of the image's gradient and of the weight's
    return products * _forward_product_flops(pixels_shape, weight_shape)


def patch_embed(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    sigma: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    first_sample: int | torch.Tensor = 0,
    noise_batch: int | None = None,
    c_in: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "plain",
) -> torch.Tensor:
    """Tokens [B, T+N, E]: prefix tokens, then the patches of the normalised, noised and scaled image, plus position.

    image: [B, C, H, W], uint8 or floating, with H and W multiples of p; weight: [E, C, p, p]; bias: [E]; position:
    [T+N, E] or [1, T+N, E]; prefix: [B, T, E]; mean, std: one number per channel; sigma, c_in: [B].
    noise: [B, C, H, W], or drawn from `seed` and `first_sample` as the module's docstring defines: image b gets that of
    sample first_sample + b mod noise_batch (default B), so that stacked views of a step can share theirs. Both may be
    int64 tensors of one element, which a captured CUDA graph reads at each replay.
    dtype: of the tokens; by default what torch.cat and the sum with position promote to.
    backend: "plain" (plain PyTorch), "triton" (the hand-written kernels).
    Gradients reach weight, bias, position, prefix and a floating image. Raises ValueError for shapes that do not fit,
    for sigma, noise or c_in that requires a gradient, and for a backend that cannot run here.
    """
    check_backend("patch_embed", backend, ("plain", "triton"))
    mean, std = (value.tolist() if isinstance(value, torch.Tensor) else value for value in (mean, std))
    _check_shapes(image, weight, bias, position, prefix)
    _check_prologue(image, mean, std, sigma, noise, seed, first_sample, noise_batch, c_in)
    options = {"mean": mean, "std": std, "sigma": sigma, "noise": noise, "c_in": c_in}
    if backend != "triton":
        drawn = {"seed": seed, "first_sample": first_sample, "noise_batch": noise_batch}
        return patch_embed_ref(image, weight, bias, position, prefix, **options, **drawn, dtype=dtype)
    require_triton("patch_embed", image, weight, bias, position, noise, sigma, c_in)
    require_grid("patch_embed", image.shape[0])
    require_dtypes("patch_embed", (torch.uint8, *_FLOATS), image=image)
    floats = {"weight": weight, "bias": bias, "position": position, "prefix": prefix}
    require_dtypes("patch_embed", _FLOATS, **floats, sigma=sigma, noise=noise, c_in=c_in)
    weight = weight.to(_product_dtype(image, weight))
    position = position.squeeze(0) if position is not None and position.dim() == 3 else position
    if seed is not None:
        seed, first_sample = (_on_device(value, image) for value in (seed, first_sample))
    return _forward_op(
        image,
        weight,
        bias,
        position,
        prefix,
        noise,
        seed,
        None if seed is None else first_sample,
        noise_batch or image.shape[0],
        sigma,
        c_in,
        mean,
        std,
        dtype or _token_dtype(weight, position, prefix),
    )[0]


def _on_device(value: int | torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """A number is filled in on the device, without a copy to it."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((), value, dtype=torch.int64, device=image.device)


def _token_dtype(weight, position, prefix) -> torch.dtype:
    dtype = weight.dtype
    for tensor in (prefix, position):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check_shapes(image, weight, bias, position, prefix) -> None:
    if image.dim() != 4:
        raise ValueError(f"patch_embed: got image of shape {tuple(image.shape)}, wanted [B, C, H, W]")
    if not (image.is_floating_point() or image.dtype == torch.uint8):
        raise ValueError(f"patch_embed: got image in {image.dtype}, wanted torch.uint8 or a floating dtype; convert it")
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
    if prefix is not None and (prefix.dim() != 3 or prefix.shape[0] != batch or prefix.shape[2] != embed):
        raise ValueError(f"patch_embed: got prefix of shape {tuple(prefix.shape)}, wanted [{batch}, T, {embed}]")
    length = (0 if prefix is None else prefix.shape[1]) + (height // patch) * (width // patch)
    fits = position is None or (
        position.dim() in (2, 3) and position.shape[-2] == length and position.shape[-1] == embed
    )
    if not fits or (position is not None and position.dim() == 3 and position.shape[0] != 1):
        raise ValueError(
            f"patch_embed: got position of shape {tuple(position.shape)}, wanted [{length}, {embed}] or "
            f"[1, {length}, {embed}]: one row per prefix token and patch"
        )


def _check_prologue(image, mean, std, sigma, noise, seed, first_sample, noise_batch, c_in) -> None:
    batch, channels = image.shape[:2]
    if (mean is None) != (std is None):
        raise ValueError(
            f"patch_embed: got no {'mean' if mean is None else 'std'}, wanted both mean and std, or neither"
        )
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise ValueError(f"patch_embed: got {len(values)} values of {name}, wanted one per channel: {channels}")
    if std is not None and not all(s > 0 for s in std):
        raise ValueError(f"patch_embed: got std={list(std)}, wanted positive numbers")
    if noise is not None and seed is not None:
        raise ValueError("patch_embed: got noise and seed, wanted one of them: noise is either given or drawn")
    noised = noise is not None or seed is not None
    if noised != (sigma is not None):
        missing = "noise or seed" if sigma is not None else "sigma"
        raise ValueError(f"patch_embed: got no {missing}, wanted sigma together with noise or seed")
    for name, tensor, shape in (("sigma", sigma, (batch,)), ("c_in", c_in, (batch,)), ("noise", noise, image.shape)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"patch_embed: got {name} of shape {tuple(tensor.shape)}, wanted {list(shape)}")
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"patch_embed: got {name} that requires a gradient, which it cannot have; detach() it")
    if noise_batch is not None and (seed is None or noise_batch < 1):
        raise ValueError(f"patch_embed: got noise_batch={noise_batch}, wanted at least 1 together with seed, or None")
    for name, value in (("seed", seed), ("first_sample", first_sample)):
        if isinstance(value, torch.Tensor):
            if value.dtype != torch.int64 or value.numel() != 1 or value.device != image.device:
                raise ValueError(
                    f"patch_embed: got {name} of shape {tuple(value.shape)} in {value.dtype} on {value.device}, wanted "
                    f"one torch.int64 on {image.device}"
                )
        elif isinstance(value, float) or (value is not None and not 0 <= value < 2**63):
            raise ValueError(f"patch_embed: got {name}={value}, wanted an integer from 0 to 2^63 - 1")


_EXTRAS = 2  # prefix tokens that the presets have: a class token and the time token


def _sizes(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Pixels, tokens, weights and rows of the position embedding."""
    batch, channels, size, patch, width = shape
    length = _EXTRAS + (size // patch) ** 2
    return batch * channels * size**2, batch * length * width, channels * patch**2 * width, length * width


def _bytes(shape: tuple[int, ...], itemsize: int, backward: bool = False) -> int:
    """Forward reads image, given noise and parameters and writes the tokens; backward reads the tokens' gradient, the
    network's input and writes the parameters' gradients. Parameters are float32.
    """
    pixels, tokens, weights, positions = _sizes(shape)
    parameters = 4 * (weights + positions + shape[-1])
    return ((pixels if backward else 2 * pixels) + tokens) * itemsize + parameters


def _flops(shape: tuple[int, ...], backward: bool = False) -> int:
    """The product, and 3 per pixel for noise and scaling; backward: the weight's gradient, and sums over the batch."""
    pixels, tokens, _, _ = _sizes(shape)
    product = 2 * pixels * shape[-1]
    return product + (2 * tokens if backward else 3 * pixels + 2 * tokens)


SPEC = OpSpec(
    name="patch_embed",
    shapes=((64, 3, 256, 16, 768), (256, 3, 256, 16, 768), (64, 3, 256, 16, 1024), (64, 3, 512, 32, 768)),
    odd_shapes=((3, 3, 8, 4, 40), (1, 1, 6, 3, 17), (2, 3, 32, 16, 24), (1, 3, 28, 14, 40)),
    bytes=_bytes,
    flops=_flops,
)
