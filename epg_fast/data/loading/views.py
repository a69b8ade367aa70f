"""Centre crop and the two augmented views of pre-training (SPEC 1): their parameters, and how Pillow applies them.

Parameters are drawn apart from their use, so that every decoder makes the same views of the same images.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from epg_fast.config import AugmentConfig

_CROP_TRIES = 10
# Of the long side after the resize: more is no picture, and memory without bound.
_LONGEST_RESIZED = 1 << 16
OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


class CropGeometry(NamedTuple):
    """ADM's centre crop of an image: how often it is halved, its size then, its size after the resize, the corner."""

    halvings: int
    halved: tuple[int, int]
    resized: tuple[int, int]
    left: int
    top: int


class AugmentedView(NamedTuple):
    """Parameters of one augmented view, in the order in which they are applied."""

    box: tuple[float, float, float, float]
    """Left, top, right and bottom of the crop in pixels of the image, not rounded: tiny images have many crops too."""
    jitter: tuple[tuple[str, float], ...]
    """("brightness" | "contrast" | "saturation", factor) and ("hue", turns of the hue circle), in random order."""
    grayscale: bool
    blur: float | None
    """Standard deviation in pixels of the view."""
    solarize: bool
    flip: bool


def crop_geometry(width: int, height: int, size: int) -> CropGeometry:
    """Return how ADM crops the central `size` x `size` pixels of a `width` x `height` image; see `center_crop`.

    Raises ValueError for an image so narrow that it would become a huge one on the way.
    """
    halvings, shape = 0, (width, height)
    while min(width, height) >= 2 * size:
        width, height, halvings = width // 2, height // 2, halvings + 1
    resized = width, height
    if min(resized) != size:
        scale = size / min(resized)
        resized = round(width * scale), round(height * scale)
    if max(resized) > _LONGEST_RESIZED:
        raise ValueError(f"{shape[0]} x {shape[1]} pixels are too narrow: the crop resizes to {max(resized)} pixels")
    return CropGeometry(halvings, (width, height), resized, (resized[0] - size) // 2, (resized[1] - size) // 2)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the central `size` x `size` pixels of `image` after ADM's resizing.

    The image is halved with a BOX filter while its short side is at least twice `size`, then one BICUBIC resize brings
    the short side to `size` (smaller images are enlarged). An image of `size` x `size` is returned as it is.
    """
    crop = crop_geometry(image.width, image.height, size)
    for _ in range(crop.halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if image.size != crop.resized:
        image = image.resize(crop.resized, Image.Resampling.BICUBIC)
    if image.size == (size, size):
        return image
    return image.crop((crop.left, crop.top, crop.left + size, crop.top + size))


def draw_view(width: int, height: int, rng: np.random.Generator, config: AugmentConfig, which: int) -> AugmentedView:
    """Draw the parameters of augmented view `which` (0: the first, 1: the second) of a `width` x `height` image."""
    return AugmentedView(
        box=_crop_box(width, height, rng, config),
        jitter=_draw_jitter(rng, config) if rng.random() < config.jitter_probability else (),
        grayscale=rng.random() < config.grayscale_probability,
        blur=_uniform(rng, *config.blur_sigma) if rng.random() < config.blur_probability[which] else None,
        solarize=rng.random() < config.solarize_probability[which],
        flip=rng.random() < config.flip_probability,
    )


def draw_parameters(
    width: int, height: int, rng: np.random.Generator, flip_probability: float, augment: AugmentConfig | None = None
) -> tuple[bool, list[AugmentedView]]:
    """Draw everything random about one `width` x `height` image: whether its centre crop is flipped, and its views.

    The first draw is the flip, so that it is the same with and without `augment`.
    """
    flip = rng.random() < flip_probability
    return flip, [draw_view(width, height, rng, augment, which) for which in (0, 1)] if augment else []


def apply_view(image: Image.Image, size: int, view: AugmentedView) -> Image.Image:
    """Return the augmented `view` of an RGB `image` as a `size` x `size` image.

    Random resized crop, colour jitter, grayscale, Gaussian blur, solarisation and flip, in this order.
    """
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=view.box)
    for name, value in view.jitter:
        image = _shift_hue(image, value) if name == "hue" else _ENHANCERS[name](image).enhance(value)
    if view.grayscale:
        image = image.convert("L").convert("RGB")
    if view.blur is not None:
        image = image.filter(ImageFilter.GaussianBlur(view.blur))
    if view.solarize:
        image = ImageOps.solarize(image, threshold=128)
    return _flip(image) if view.flip else image


def training_views(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    flip_probability: float,
    augment: AugmentConfig | None = None,
) -> list[np.ndarray]:
    """Return the views of one RGB `image` for a training step, each uint8 [size, size, 3].

    The first is the centre crop, flipped with `flip_probability`; with `augment` the two augmented views of the whole
    image follow. The first view is the same with and without `augment`.
    """
    flip, augmented = draw_parameters(image.width, image.height, rng, flip_probability, augment)
    crop = center_crop(image, size)
    views = [_flip(crop) if flip else crop, *(apply_view(image, size, view) for view in augmented)]
    return [np.asarray(view) for view in views]


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    # several times faster than rng.uniform on scalars
    return low + (high - low) * rng.random()


def _flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _crop_box(
    width: int, height: int, rng: np.random.Generator, config: AugmentConfig
) -> tuple[float, float, float, float]:
    low, high = config.crop_ratio
    for _ in range(_CROP_TRIES):
        area = width * height * _uniform(rng, *config.crop_area)
        ratio = math.exp(_uniform(rng, math.log(low), math.log(high)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.random() * (width - w), rng.random() * (height - h)
            return left, top, min(left + w, width), min(top + h, height)
    # the largest central box of an allowed ratio
    ratio = min(max(width / height, low), high)
    w, h = min(width, height * ratio), min(height, width / ratio)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, min(left + w, width), min(top + h, height)


def _draw_jitter(rng: np.random.Generator, config: AugmentConfig) -> tuple[tuple[str, float], ...]:
    jitter = []
    for operation in rng.permutation(len(OPERATIONS)):
        name = OPERATIONS[operation]
        strength = getattr(config, name)
        if name == "hue":
            jitter.append((name, _uniform(rng, -strength, strength)))
        elif strength:
            jitter.append((name, _uniform(rng, max(0.0, 1 - strength), 1 + strength)))
    return tuple(jitter)


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    shift = int(turns * 255) % 256
    # even a shift by zero would lose precision on the way through HSV
    if shift == 0:
        return image
    hue = Image.new("HSV", image.size, (shift, 0, 0))
    return ImageChops.add_modulo(image.convert("HSV"), hue).convert("RGB")
