"""Batches of encoded images with the parameters of their views, as DALI takes them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from epg_fast.data.loading.loader import Batches
from epg_fast.data.loading.views import crop_geometry, draw_parameters
from epg_fast.data.sources.decoding import decode_image, open_image, without_texts

# Larger images are refused by Pillow as decompression bombs.
_LONGEST_SHORT_SIDE = 13_377
_ORIENTATION = 0x0112
# Chunks that may hold one, when the other texts are gone.
_PNG_ORIENTATION = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")

RECORD = np.dtype(
    [
        ("shape", "i8", 2),
        ("halvings", "i8"),
        ("box", "f8", 4),
        ("resized", "i8", 2),
        ("offset", "i8", 2),
        ("operations", "i1", 4),
        ("values", "f8", 4),
        ("grayscale", "?"),
        ("sigma", "f8"),
        ("solarize", "?"),
        ("flip", "?"),
    ]
)
"""One view: the box (left, top, right, bottom) in pixels of the image after its halvings becomes `resized`, of which
`offset` is the corner; then what `augment_view` takes. Pairs are (x, y)."""
_CODES = {"brightness": 1, "contrast": 2, "saturation": 3, "hue": 4}


class EncodedBatches(Batches):
    """Batches of encoded images: dicts of `content` (the files one behind the other), `length` int64 [b] and `records`.

    `records` has one `RECORD` for each of the `views` of each image, [b, views].
    What DALI would read differently from Pillow (CMYK, palettes, 16 bits, transparency, EXIF rotation, other formats)
    or what may be damaged is decoded by Pillow here and travels as an uncompressed PPM file, which DALI reads exactly;
    with `pillow_only` all images do so.
    """

    def __init__(self, source, **options):
        super().__init__(source, **options)
        self.pillow_only = False
        # of the largest image there is
        self.max_halvings = max(int(np.log2(_LONGEST_SHORT_SIDE / self.image_size)), 0)

    def make(self, content: bytes, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
        content = without_texts(content)
        with open_image(content) as image:
            size, plain = image.size, not self.pillow_only and _is_plain(image, content)
        if min(size) >= self.image_size << (self.max_halvings + 1):
            raise ValueError(f"{size[0]} x {size[1]} pixels are too many")
        if not plain:
            image = decode_image(content)
            size, content = image.size, b"P6\n%d %d\n255\n" % image.size + image.tobytes()
        return content, self._records(*size, rng)

    def collate(self, samples: list[tuple[bytes, np.ndarray]]) -> dict[str, np.ndarray]:
        contents, records = zip(*samples, strict=True)
        lengths = np.array([len(content) for content in contents])
        return {"content": np.frombuffer(b"".join(contents), np.uint8), "length": lengths, "records": np.stack(records)}

    def _records(self, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
        """The records of a `width` x `height` image, [views]."""
        drawn = draw_parameters(width, height, rng, self.flip_probability, self.augment)
        crop, records = crop_geometry(width, height, self.image_size), np.zeros(len(self.views), RECORD)
        records["shape"], records["resized"] = (width, height), self.image_size
        first = records[0]
        first["halvings"], first["box"], first["resized"] = crop.halvings, (0, 0, *crop.halved), crop.resized
        first["offset"], first["flip"] = (crop.left, crop.top), drawn.flip
        for record, view in zip(records[1:], drawn.augmented, strict=True):
            for slot, (name, value) in enumerate(view.jitter):
                record["operations"][slot], record["values"][slot] = _CODES[name], value
            record["box"], record["grayscale"], record["sigma"] = view.box, view.grayscale, view.blur or 0.0
            record["solarize"], record["flip"] = view.solarize, view.flip
        return records


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
