"""The pixel part of an augmented view: all that follows the random resized crop, on images of 8 bits per channel.

In this order, each stage rounding to 8 bits, each image with its own parameters:

    up to four of      v' = clip(d + factor * (v - d)), cut to an integer, with d = 0 for brightness,
                       d = mean(L), rounded, for contrast, and d = L of the pixel for saturation;
                       or H' = (H + int(255 turns)) mod 256 in HSV of 8 bits per channel for hue
    grayscale          L = 0.299 R + 0.587 G + 0.114 B, in 16-bit fixed point
    Gaussian blur      weights exp(-k^2 / (2 sigma^2)), normalised over |k| <= ceil(4 sigma), edge pixels repeated
    solarisation       v' = 255 - v for v >= 128
    horizontal flip

Source: BYOL's augmentations, Grill et al., "Bootstrap your own latent" (2020), appendix B; the colours are Pillow's
(`ImageEnhance`, `Image.convert`, `ImageOps.solarize`).

Dtypes: uint8; parameters int8, float64 and bool, on the CPU.
Error: both backends equal Pillow bit for bit, but for the blur, which Pillow approximates by three box filters: here it
is within 0.5 + 1e-3 of the Gaussian in float64. The extension equals the reference bit for bit, the blur included.
"""

import math
from collections.abc import Callable
from enum import IntEnum

import torch
import torch.nn.functional as F

from epg_fast.ops.backends import check_backend
from epg_fast.ops.checks import check_dtype
from epg_fast.ops.extension import extension_takes, require_extension
from epg_fast.ops.spec import OpSpec

_OP = "augment_view"
_FLOAT32_MAX = torch.finfo(torch.float32).max
_MAX_SIGMA = 1024.0


class JitterOperation(IntEnum):
    """Codes of the operations of colour jitter."""

    NONE = 0
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    HUE = 4


def augment_view_ref(x, operations, values, grayscale, sigma, solarize, flip) -> torch.Tensor:
    """The stages in plain PyTorch, each for all images that take it; nothing is read back from x's device."""
    out = x.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
    for operation, value in zip(operations.unbind(1), values.unbind(1), strict=True):
        for code, function in _JITTER.items():
            _change(out, operation == code, function, value.float())
        hue = operation == JitterOperation.HUE
        shift = torch.where(hue, value * 255, 0.0).trunc().remainder(256).int()
        # even a shift by zero would lose precision on the way through HSV
        _change(out, hue & (shift != 0), _shift_hue, shift)
    _change(out, grayscale, lambda images: _luma(images).to(torch.uint8).expand_as(images))
    _change(out, sigma > 0, _blur, _gaussian_weights(sigma.tolist()))
    _change(out, solarize, lambda images: torch.where(images >= 128, 255 - images, images))
    _change(out, flip, lambda images: images.flip(-1))
    return out


def augment_view(
    x: torch.Tensor,
    operations: torch.Tensor,
    values: torch.Tensor,
    grayscale: torch.Tensor,
    sigma: torch.Tensor,
    solarize: torch.Tensor,
    flip: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """The views of B images, uint8 [B, 3, H, W] on x's device; x is left as it is.

    x: uint8 [B, H, W, 3], contiguous, H, W >= 1. The parameters are on the CPU: operations: int8 [B, 4], codes of
    `JitterOperation` in the order in which they are applied; values: float64 [B, 4], their factors (0 or more), for the
    hue turns of the circle; grayscale, solarize, flip: bool [B]; sigma: float64 [B], standard deviation of the blur in
    pixels, 0 for none, at most 1024. backend: "plain" (plain PyTorch), "extension" (C++ on the CPU, images split
    over PyTorch's threads) or "auto": the extension where x is on the CPU and it is built, else the reference.
    Raises ValueError for other shapes, dtypes and devices, for codes, factors and sigmas that have no meaning and for a
    backend that cannot run here.
    """
    check_backend(_OP, backend, ("auto", "extension", "plain"))
    parameters = (operations, values, grayscale, sigma, solarize, flip)
    _check_images(x)
    _check_parameters(x, *parameters)
    if backend == "auto":
        # what torch.compile traces it fuses itself
        takes = not torch.compiler.is_compiling() and extension_takes([x])
        backend = "extension" if takes else "plain"
    if backend == "plain":
        return augment_view_ref(x, *parameters)
    if x.device.type != "cpu":
        raise ValueError(
            f"{_OP}: got x on {x.device}, wanted it on the CPU for backend='extension'; move it there or use "
            "backend='plain'"
        )
    require_extension(_OP, x)
    batch, height, width, _ = x.shape
    out = torch.empty(batch, 3, height, width, dtype=torch.uint8)
    torch.ops.epg_fast.augment_view_out(out, x, *(parameter.contiguous() for parameter in parameters))
    return out


def _check_images(x: torch.Tensor) -> None:
    check_dtype(_OP, torch.uint8, "pass the pixels as they were decoded", x=x)
    if x.dim() != 4 or x.shape[3] != 3 or 0 in x.shape[1:]:
        raise ValueError(
            f"{_OP}: got x of shape {tuple(x.shape)}, wanted [B, H, W, 3] with H, W >= 1; put the channels last"
        )
    if not x.is_contiguous():
        raise ValueError(f"{_OP}: got x with strides {x.stride()}, wanted it contiguous; call .contiguous()")


def _check_parameters(x, operations, values, grayscale, sigma, solarize, flip) -> None:
    wanted = {
        "operations": (operations, torch.int8, (len(x), 4)),
        "values": (values, torch.float64, (len(x), 4)),
        "grayscale": (grayscale, torch.bool, (len(x),)),
        "sigma": (sigma, torch.float64, (len(x),)),
        "solarize": (solarize, torch.bool, (len(x),)),
        "flip": (flip, torch.bool, (len(x),)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        check_dtype(_OP, dtype, "convert it", **{name: tensor})
        if tensor.shape != shape:
            raise ValueError(
                f"{_OP}: got {name} of shape {tuple(tensor.shape)}, wanted {shape} for the {len(x)} images of x; give "
                "each image its own"
            )
        if tensor.device.type != "cpu":
            raise ValueError(f"{_OP}: got {name} on {tensor.device}, wanted it on the CPU; leave it where it was drawn")
    hue, factor = operations == JitterOperation.HUE, (operations > 0) & (operations < JitterOperation.HUE)
    _refuse("operations", operations, (operations < 0) | (operations > 4), "codes 0 to 4; see JitterOperation")
    _refuse("values", values, factor & ~((values >= 0) & (values <= _FLOAT32_MAX)), "a factor; clamp it to 0 or more")
    turns = "finite turns of the hue circle; bring them to -0.5 to 0.5"
    _refuse("values", values, hue & ~(values.abs() <= _FLOAT32_MAX), turns)
    _refuse("sigma", sigma, ~((sigma >= 0) & (sigma <= _MAX_SIGMA)), f"0 to {_MAX_SIGMA:g} pixels; 0 is no blur")


def _refuse(name: str, tensor: torch.Tensor, wrong: torch.Tensor, wanted: str) -> None:
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise ValueError(f"{_OP}: got {name}{place} = {tensor[tuple(place)].item()}, wanted {wanted}")


def _change(out: torch.Tensor, chosen: torch.Tensor, function: Callable, *parameters: torch.Tensor) -> None:
    """Replace the chosen images by function(images, parameters of these images)."""
    index = chosen.nonzero()[:, 0]
    if len(index):
        # not blocking: a copy that is waited for would synchronise
        on_device = index.to(out.device, non_blocking=True)
        own = (parameter[index].to(out.device, non_blocking=True) for parameter in parameters)
        out.index_copy_(0, on_device, function(out.index_select(0, on_device), *own))


def _luma(images: torch.Tensor) -> torch.Tensor:
    r, g, b = images.int().split(1, dim=1)
    return (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16


def _blend(degenerate: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    mixed = degenerate + factor.view(-1, 1, 1, 1) * (images.float() - degenerate)
    return mixed.clamp(0, 255).to(torch.uint8)


def _brightness(images, factor):
    return _blend(torch.zeros((), device=images.device), images, factor)


def _contrast(images, factor):
    luma = _luma(images)
    pixels = luma[0].numel()
    mean = (2 * luma.sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)
    return _blend(mean.float(), images, factor)


def _saturation(images, factor):
    return _blend(_luma(images).float(), images, factor)


_JITTER = {
    JitterOperation.BRIGHTNESS: _brightness,
    JitterOperation.CONTRAST: _contrast,
    JitterOperation.SATURATION: _saturation,
}


def _shift_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    hue, saturation, value = _to_hsv(images)
    return _to_rgb((hue + shift.view(-1, 1, 1)) & 255, saturation, value)


def _to_hsv(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """int32 [n, H, W] each, 0 to 255: of the hue circle's six sixths the primary colours begin the even ones."""
    r, g, b = images.int().unbind(1)
    highest, lowest = images.amax(1).int(), images.amin(1).int()
    chroma, middle = highest - lowest, r + g + b - highest - lowest
    red, green = r == highest, g == highest
    behind = torch.where(red, g < b, torch.where(green, b < r, r < g))
    primary = torch.where(red, 0.0, torch.where(green, 2.0, 4.0))
    away = (highest - middle).float() / chroma.clamp(min=1).float()
    # Divisors are tensors: PyTorch multiplies by the inverse of a number on CUDA, which rounds differently.
    turns = torch.where(behind, (primary - 1) + away, (primary + 1) - away) / away.new_full((), 6.0)
    turns = torch.where(turns < 0, turns + 1, turns)
    hue = torch.where(chroma > 0, (turns * 255).int(), 0)
    return hue, (chroma * 255.0 / highest.clamp(min=1).float()).int(), highest


def _to_rgb(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    full = torch.full((), 255.0, device=hue.device)
    position = hue * 6.0 / full
    sector = position.int()
    fraction = position - sector
    span = value * (saturation / full)
    low = (value - span + 0.5).int()
    between = (value - span * torch.where(sector % 2 == 1, fraction, 1 - fraction) + 0.5).int()

    def pick(is_high, is_between):
        return torch.where(is_high, value, torch.where(is_between, between, low))

    red = pick((sector == 0) | (sector >= 5), (sector == 1) | (sector == 4))
    green = pick((sector == 1) | (sector == 2), (sector == 0) | (sector == 3))
    blue = pick((sector == 3) | (sector == 4), (sector == 2) | (sector == 5))
    return torch.stack([red, green, blue], 1).to(torch.uint8)


def _gaussian_weights(sigmas: list[float]) -> torch.Tensor:
    """float32 [B, R + 1]: weights at the distances 0 to R, the largest radius; 0 beyond an image's own."""
    rows = []
    for sigma in sigmas:
        distances = [k / sigma for k in range(math.ceil(4 * sigma) + 1)] if sigma else [0.0]
        row = [math.exp(-0.5 * (distance * distance)) for distance in distances]
        total = sum([row[0], *(2 * weight for weight in row[1:])])
        rows.append([weight / total for weight in row])
    longest = max(map(len, rows), default=1)
    return torch.tensor([row + [0.0] * (longest - len(row)) for row in rows]).view(len(rows), longest)


def _blur(images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    radius, weights = weights.shape[1] - 1, weights.t()[..., None, None, None]
    rows = _weighted_sum(F.pad(images.float(), (radius, radius, 0, 0), mode="replicate"), weights, 3)
    return (_weighted_sum(F.pad(rows, (0, 0, radius, radius), mode="replicate"), weights, 2) + 0.5).to(torch.uint8)


def _weighted_sum(padded: torch.Tensor, weights: torch.Tensor, dim: int) -> torch.Tensor:
    """Pairs at the same distance are added up from the centre outwards, as the extension does."""
    radius = len(weights) - 1
    length = padded.shape[dim] - 2 * radius
    total = weights[0] * padded.narrow(dim, radius, length)
    for k in range(1, radius + 1):
        total += weights[k] * (padded.narrow(dim, radius - k, length) + padded.narrow(dim, radius + k, length))
    return total


SPEC = OpSpec(
    name=_OP,
    shapes=((64, 256, 256, 3), (64, 512, 512, 3), (256, 64, 64, 3)),
    odd_shapes=((5, 17, 33, 3), (1, 1, 1, 3), (3, 1, 7, 3), (2, 3, 2, 3), (2, 64, 64, 3), (1, 5, 130, 3)),
    bytes=lambda shape, itemsize: 2 * itemsize * math.prod(shape),  # the pixels are read, the view is written
)
