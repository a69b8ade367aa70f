"""Batches of encoded images with the parameters of their views, as DALI takes them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from epg_fast.data.loader import Batches
from epg_fast.data.source import decode_image, open_image, without_texts
from epg_fast.data.views import AugmentedView, ViewParameters, check_shape, crop_geometry, draw_parameters

# Larger images are refused by Pillow as decompression bombs.
_LONGEST_SHORT_SIDE = 13_377
_ORIENTATION = 0x0112
# Chunks that may hold one, when the other texts are gone.
_PNG_ORIENTATION = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")

# Boxes are (left, top, right, bottom) in pixels, of the crop after its halvings; pairs are (x, y).
_CROP = [
    ("shape", "i8", 2),
    ("halvings", "i8"),
    ("box", "f8", 4),
    ("resized", "i8", 2),
    ("offset", "i8", 2),
    ("flip", "?"),
]
_VIEW = [
    ("box", "f8", 4),
    ("operations", "i1", 4),
    ("values", "f8", 4),
    ("grayscale", "?"),
    ("sigma", "f8"),
    ("solarize", "?"),
    ("flip", "?"),
]
CROP_DTYPE, VIEW_DTYPE = np.dtype(_CROP), np.dtype(_VIEW)
_CODES = {"brightness": 1, "contrast": 2, "saturation": 3, "hue": 4}


def parameters_dtype(views: int) -> np.dtype:
    """Return the record of one image with `views` augmented views."""
    return np.dtype([("crop", CROP_DTYPE), *((f"view{v + 1}", VIEW_DTYPE) for v in range(views))])


class EncodedBatches(Batches):
    """Batches of encoded images: dicts of `content`, `length` int64 [b] and `parameters` uint8 [b, r].

    `content` holds the files one behind the other; the r bytes of an image are a record of `parameters_dtype`.
    What DALI would read differently from Pillow (CMYK, palettes, 16 bits, transparency, EXIF rotation, other formats)
    or what may be damaged is decoded by Pillow here and travels as an uncompressed PPM file, which DALI reads exactly;
    `pillow_only` does so with all.
    """

    def __init__(self, loader, pillow_only: bool = False):
        super().__init__(loader)
        self.pillow_only = pillow_only
        self._dtype = parameters_dtype(0 if loader.augment is None else 2)
        self._max_short_side = loader.image_size << (max_halvings(loader.image_size) + 1)

    def _decode(self, content: bytes) -> tuple[bytes, tuple[int, int]]:
        content = without_texts(content)
        with open_image(content) as image:
            size, plain = image.size, not self.pillow_only and _is_plain(image, content)
        check_shape(*size, self.image_size)
        if min(size) >= self._max_short_side:
            raise ValueError(f"{size[0]} x {size[1]} pixels are too many")
        if plain:
            return content, size
        image = decode_image(content)
        return to_ppm(image), image.size

    def _start(self):
        return [], np.zeros(self.local_size, self._dtype)

    def _add(self, batch, position, image, rng):
        contents, parameters = batch
        content, (width, height) = image
        drawn = draw_parameters(width, height, rng, self.flip_probability, self.augment)
        contents.append(content)
        fill_parameters(parameters[position], width, height, self.image_size, drawn)

    def _finish(self, batch):
        contents, parameters = batch
        lengths = [len(content) for content in contents]
        joined = np.empty(sum(lengths), np.uint8)
        memory, end = memoryview(joined), 0
        for content in contents:
            memory[end : end + len(content)] = content
            end += len(content)
        return {
            "content": torch.from_numpy(joined),
            "length": torch.tensor(lengths),
            "parameters": torch.from_numpy(parameters.view(np.uint8).reshape(len(parameters), -1)),
        }


def max_halvings(size: int) -> int:
    """Return how often the centre crop to `size` pixels halves the largest image there is."""
    return max(int(np.log2(_LONGEST_SHORT_SIDE / size)), 0)


def fill_parameters(record: np.void, width: int, height: int, size: int, drawn: ViewParameters) -> None:
    """Write the views of a `width` x `height` image into `record`."""
    target, crop = record["crop"], crop_geometry(width, height, size)
    target["shape"] = width, height
    target["halvings"] = crop.halvings
    target["box"] = 0, 0, *crop.halved
    target["resized"] = crop.resized
    target["offset"] = crop.left, crop.top
    target["flip"] = drawn.flip
    for which, view in enumerate(drawn.augmented, 1):
        _fill_view(record[f"view{which}"], view)


def to_ppm(image: Image.Image) -> bytes:
    """Return an RGB `image` as a binary PPM file."""
    return b"P6\n%d %d\n255\n" % image.size + image.tobytes()


def _fill_view(target: np.void, view: AugmentedView) -> None:
    target["box"] = view.box
    for slot, (name, value) in enumerate(view.jitter):
        target["operations"][slot], target["values"][slot] = _CODES[name], value
    target["grayscale"], target["solarize"], target["flip"] = view.grayscale, view.solarize, view.flip
    target["sigma"] = view.blur or 0.0


def _is_plain(image: Image.Image, content: bytes) -> bool:
    """Whether DALI decodes `content` exactly as `decode_image` does, and its end says that it is complete."""
    if image.format == "JPEG":
        # of three channels, Adobe's marker may say that they are no YCbCr
        plain = image.mode in ("RGB", "L") and image.info.get("adobe_transform", 1) == 1
        return plain and b"\xff\xd9" in content[-64:] and _is_upright(image)
    if image.format == "PNG":
        plain = [tile[3] for tile in image.tile] in (["RGB"], ["L"]) and "transparency" not in image.info
        # Pillow would decode the whole image to look for its orientation
        return plain and b"IEND" in content[-12:] and not any(name in content for name in _PNG_ORIENTATION)
    return False


def _is_upright(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) == 1
    except Exception:
        # malformed EXIF data: `decode_image` knows what to do
        return False
