"""Resized crops of decoded images of different sizes, in the 8-bit arithmetic of Pillow.

    image = halved `halvings` times: each time to (H // 2, W // 2) with a box filter
    out = the window of `size` x `size` pixels at `offsets` of the box of `image`, resampled to `resized` pixels

An output pixel at position i of a line of n is the weighted mean of the input pixels around low + (i + 1/2) s, where
s = (high - low) / n; the weights are filter(distance / max(s, 1)), normalised, in units of 2^-22; first along x, then
along y, each rounded to 8 bits. With `halvings`, "bicubic" and a window in the middle this is ADM's centre crop (SPEC
1), with the box of a random resized crop, "bilinear" and resized = size it is the crop of an augmented view.
Source: the resampling of Pillow's Image.resize. Pillow 13 goes along y before x where H > h and H - h > 2 (W - w), for
an image of W x H resized to w x h, whatever the box: mostly portraits of more than 1 : 2, and views of portraits.

Error: both backends equal Pillow bit for bit where it goes along x first; elsewhere "box" and "bilinear" are within one
level of it, "bicubic" too but where sums before the second pass leave 0..255 and are clipped.
"""

import math
from collections.abc import Sequence

import torch

from epg_fast.ops.backends import check_backend
from epg_fast.ops.extension import extension_takes, require_extension
from epg_fast.ops.spec import OpSpec

FILTERS = ("box", "bilinear", "bicubic")
_SUPPORT = {"box": 0.5, "bilinear": 1.0, "bicubic": 2.0}
_BITS = 22
_LONGEST = 1 << 20
# Beyond, float32 skips pixels.
_LONGEST_INPUT = 1 << 24


def resized_crop_ref(images, halvings, boxes, resized, offsets, size, filter) -> torch.Tensor:
    """The definition in plain PyTorch: matrix products, exact in float64."""
    out = [
        _crop(image, *parameters, size, filter)
        for image, *parameters in zip(
            images, halvings.tolist(), boxes.float().tolist(), resized.tolist(), offsets.tolist(), strict=True
        )
    ]
    return torch.stack(out) if out else torch.empty(0, size, size, 3, dtype=torch.uint8)


def _crop(image, halvings, box, resized, offset, size, filter):
    for _ in range(halvings):
        height, width = image.shape[0] // 2, image.shape[1] // 2
        whole = (0.0, 0.0, image.shape[1], image.shape[0])
        image = _resample(image, whole, (width, height), (0, 0), (width, height), "box")
    return _resample(image, box, resized, offset, (size, size), filter)


def _resample(image, box, resized, offset, window, filter):
    height, width, _ = image.shape
    along_x = _weights(width, box[0], box[2], resized[0], offset[0], window[0], filter).to(image.device)
    along_y = _weights(height, box[1], box[3], resized[1], offset[1], window[1], filter).to(image.device)
    image = _round(torch.einsum("xi,hic->hxc", along_x, image.double()))
    return _round(torch.einsum("yi,ixc->yxc", along_y, image)).to(torch.uint8)


def _round(sums: torch.Tensor) -> torch.Tensor:
    return torch.floor(sums / 2**_BITS + 0.5).clamp(0, 255)


def _weights(length, low, high, resized, offset, window, filter) -> torch.Tensor:
    """[window, length] in units of 2^-22."""
    # the length of the box is a float32
    scale = torch.tensor(high).sub(torch.tensor(low)).item() / resized
    stretch = max(scale, 1.0)
    support = _SUPPORT[filter] * stretch
    matrix = torch.zeros(window, length, dtype=torch.float64)
    for i in range(window):
        center = low + (i + offset + 0.5) * scale
        begin, end = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), length)
        line = [_FUNCTIONS[filter]((k - center + 0.5) / stretch) for k in range(begin, end)]
        total = sum(line) or 1.0
        scaled = [weight / total * 2**_BITS for weight in line]
        matrix[i, begin:end] = torch.tensor([int(weight + math.copysign(0.5, weight)) for weight in scaled]).double()
    return matrix


def _box(x: float) -> float:
    return float(-0.5 < x <= 0.5)


def _bilinear(x: float) -> float:
    return max(1.0 - abs(x), 0.0)


def _bicubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * a if x < 2.0 else 0.0


_FUNCTIONS = {"box": _box, "bilinear": _bilinear, "bicubic": _bicubic}


def resized_crop(
    images: Sequence[torch.Tensor],
    halvings: torch.Tensor,
    boxes: torch.Tensor,
    resized: torch.Tensor,
    offsets: torch.Tensor,
    size: int,
    filter: str = "bicubic",
    backend: str = "auto",
) -> torch.Tensor:
    """Crop, resize and crop again: uint8 [B, size, size, 3] from B images uint8 [H_i, W_i, 3] of any sizes.

    halvings: int64 [B]. boxes: float64 [B, 4], left, top, right, bottom in pixels of the halved image, rounded to
    float32. resized: int64 [B, 2], width and height that the box is resampled to. offsets: int64 [B, 2], left and top
    of the window in that. filter: "box", "bilinear" or "bicubic". All parameters are on the CPU.
    backend: "plain" (plain PyTorch), "extension" (C++, images on the CPU and contiguous) or "auto": the extension
    where it can, as it is faster.
    Raises ValueError for shapes, dtypes, boxes and windows that do not fit, and for a backend that cannot run here.
    """
    check_backend("resized_crop", backend, ("auto", "extension", "plain"))
    parameters = {"halvings": halvings, "boxes": boxes, "resized": resized, "offsets": offsets}
    _check(images, size, filter, **parameters)
    if backend == "auto":
        backend = "extension" if extension_takes(images) else "plain"
    if backend == "plain":
        return resized_crop_ref(images, halvings, boxes, resized, offsets, size, filter)
    for i, image in enumerate(images):
        if image.device.type != "cpu" or not image.is_contiguous():
            raise ValueError(
                f"resized_crop: got images[{i}] on {image.device} with strides {image.stride()}, wanted it contiguous "
                "on the CPU for backend='extension'; call .cpu().contiguous() or use backend='plain'"
            )
    require_extension("resized_crop", halvings)
    out = torch.empty(len(images), size, size, 3, dtype=torch.uint8)
    contiguous = [tensor.contiguous() for tensor in parameters.values()]
    torch.ops.epg_fast.resized_crop_out(out, list(images), *contiguous, FILTERS.index(filter))
    return out


def _check(images, size, filter, **parameters) -> None:
    if filter not in FILTERS:
        raise ValueError(f"resized_crop: got filter={filter!r}, wanted one of {', '.join(FILTERS)}")
    if size < 1:
        raise ValueError(f"resized_crop: got size={size}, wanted at least 1")
    batch = len(images)
    wanted = {
        "halvings": (torch.int64, (batch,)),
        "boxes": (torch.float64, (batch, 4)),
        "resized": (torch.int64, (batch, 2)),
        "offsets": (torch.int64, (batch, 2)),
    }
    for name, (dtype, shape) in wanted.items():
        tensor = parameters[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device.type != "cpu":
            raise ValueError(
                f"resized_crop: got {name} {tensor.dtype} {list(tensor.shape)} on {tensor.device}, wanted {dtype} "
                f"{list(shape)} on the CPU, for {batch} images"
            )
    rounded = parameters | {"boxes": parameters["boxes"].float()}
    rows = zip(images, *(tensor.tolist() for tensor in rounded.values()), strict=True)
    for i, (image, halvings, box, resized, offset) in enumerate(rows):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"resized_crop: got images[{i}] {image.dtype} {list(image.shape)}, wanted torch.uint8 [H, W, 3]"
            )
        _check_one(i, image, halvings, box, resized, offset, size)


def _check_one(i, image, halvings, box, resized, offset, size) -> None:
    if max(image.shape[:2]) > _LONGEST_INPUT:
        raise ValueError(
            f"resized_crop: got images[{i}] of {image.shape[1]} x {image.shape[0]} pixels, wanted at most "
            f"{_LONGEST_INPUT} a side"
        )
    if not 0 <= halvings < 32 or min(image.shape[:2]) >> halvings < 1:
        raise ValueError(
            f"resized_crop: got halvings[{i}]={halvings} for {image.shape[1]} x {image.shape[0]} pixels, wanted at "
            "least 0 and a pixel left"
        )
    width, height = image.shape[1] >> halvings, image.shape[0] >> halvings
    if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        raise ValueError(
            f"resized_crop: got boxes[{i}]={box} in float32, wanted left < right and top < bottom within "
            f"{width} x {height} pixels"
        )
    if not all(0 <= o <= r - size and r <= _LONGEST for o, r in zip(offset, resized, strict=True)):
        raise ValueError(
            f"resized_crop: got a window of {size} pixels at offsets[{i}]={offset}, wanted it within "
            f"resized[{i}]={resized} (at most {_LONGEST})"
        )


def _bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Read the image and write the crop: shape is (batch, height, width, size)."""
    batch, height, width, size = shape
    return batch * itemsize * 3 * (height * width + size * size)


SPEC = OpSpec(
    name="resized_crop",
    shapes=((64, 375, 500, 256), (64, 512, 512, 256)),
    odd_shapes=((3, 33, 17, 16), (1, 1, 1, 1), (2, 5, 9, 4), (1, 64, 64, 64)),
    bytes=_bytes,
)
