"""Centre crop and the two augmented views of pre-training (SPEC 1), on Pillow images."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from epg_fast.config import AugmentConfig

_CROP_TRIES = 10


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the central `size` x `size` pixels of `image` after ADM's resizing.

    The image is halved with a BOX filter while its short side is at least twice `size`, then one BICUBIC resize brings
    the short side to `size` (smaller images are enlarged). An image of `size` x `size` is returned as it is.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    if image.size == (size, size):
        return image
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def augmented_view(
    image: Image.Image, size: int, rng: np.random.Generator, config: AugmentConfig, which: int
) -> Image.Image:
    """Return augmented view `which` (0: the first, 1: the second) of an RGB `image` as a `size` x `size` image.

    Random resized crop, colour jitter, grayscale, Gaussian blur, solarisation and flip, in this order, with all
    randomness from `rng`. The crop's box is not rounded to whole pixels, so that tiny images have many crops too.
    """
    box = _crop_box(image.width, image.height, rng, config)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if rng.random() < config.jitter_probability:
        image = _jitter(image, rng, config)
    if rng.random() < config.grayscale_probability:
        image = image.convert("L").convert("RGB")
    if rng.random() < config.blur_probability[which]:
        image = image.filter(ImageFilter.GaussianBlur(_uniform(rng, *config.blur_sigma)))
    if rng.random() < config.solarize_probability[which]:
        image = ImageOps.solarize(image, threshold=128)
    return _flip(image, rng, config.flip_probability)


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
    views = [_flip(center_crop(image, size), rng, flip_probability)]
    if augment is not None:
        views += [augmented_view(image, size, rng, augment, which) for which in (0, 1)]
    return [np.asarray(view) for view in views]


def check_augment(config: AugmentConfig) -> None:
    """Raise ValueError for ranges and probabilities that have no meaning."""
    ranges = {"crop_area": (0, 1), "crop_ratio": (0, math.inf), "blur_sigma": (0, math.inf)}
    for name, (lowest, highest) in ranges.items():
        low, high = getattr(config, name)
        positive = low > 0 or name == "blur_sigma"
        if not (lowest <= low <= high <= highest and positive):
            raise ValueError(f"augment.{name}: got ({low}, {high}), wanted low <= high within ({lowest}, {highest}]")
    for name in ("jitter", "grayscale", "blur", "solarize", "flip"):
        value = getattr(config, f"{name}_probability")
        if not all(0 <= p <= 1 for p in (value if name in ("blur", "solarize") else (value,))):
            raise ValueError(f"augment.{name}_probability: got {value}, wanted 0 to 1")
    for name, highest in (("brightness", math.inf), ("contrast", math.inf), ("saturation", math.inf), ("hue", 0.5)):
        if not 0 <= getattr(config, name) <= highest:
            raise ValueError(f"augment.{name}: got {getattr(config, name)}, wanted 0 to {highest}")


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    # several times faster than rng.uniform on scalars
    return low + (high - low) * rng.random()


def _flip(image: Image.Image, rng: np.random.Generator, probability: float) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < probability else image


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


def _jitter(image: Image.Image, rng: np.random.Generator, config: AugmentConfig) -> Image.Image:
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    strengths = (config.brightness, config.contrast, config.saturation)
    for operation in rng.permutation(4):
        if operation == 3:
            image = _shift_hue(image, _uniform(rng, -config.hue, config.hue))
        elif strengths[operation]:
            strength = strengths[operation]
            factor = _uniform(rng, max(0.0, 1 - strength), 1 + strength)
            image = enhancers[operation](image).enhance(factor)
    return image


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    shift = int(turns * 255) % 256
    # even a shift by zero would lose precision on the way through HSV
    if shift == 0:
        return image
    hue = Image.new("HSV", image.size, (shift, 0, 0))
    return ImageChops.add_modulo(image.convert("HSV"), hue).convert("RGB")
