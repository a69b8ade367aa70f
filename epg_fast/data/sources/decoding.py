"""How one encoded image is decoded with Pillow."""

from __future__ import annotations

import io
import logging
import struct

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""A file may carry the wrong extension, but nothing else is tried: Pillow would start Ghostscript for an EPS."""
_PNG = b"\x89PNG\r\n\x1a\n"
# Texts and colour profiles do not matter for the pixels, but Pillow refuses files in which they are large.
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# Where programs write the orientation that other formats have in their EXIF data.
_PNG_ORIENTATION = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")

logger = logging.getLogger("epg_fast")


def without_texts(content: bytes) -> bytes:
    """Return an encoded image without the texts and the colour profile of a PNG, but for those with an orientation."""
    if not content.startswith(_PNG):
        return content
    kept, whole, position = [], 0, len(_PNG)
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if kind in _PNG_TEXTS and not content.startswith(_PNG_ORIENTATION, position + 8):
            kept.append(content[whole:position])
            whole = end
        position = end
    return b"".join([*kept, content[whole:]]) if kept else content


def open_image(content: bytes) -> Image.Image:
    """Return the Pillow image of `content` with its header read and its pixels not. Raises whatever Pillow raises."""
    try:
        return Image.open(io.BytesIO(without_texts(content)), formats=FORMATS)
    except UnidentifiedImageError:
        # Pillow's text has an address in memory, another one in every run
        raise UnidentifiedImageError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None


def decode_image(content: bytes) -> Image.Image:
    """Return `content` as a fully decoded RGB image of its own size, turned upright by its EXIF orientation.

    Transparency is dropped, 16-bit values keep their high byte. What is no complete image raises whatever Pillow
    raises for it: mostly OSError, but SyntaxError, ValueError and others occur.
    """
    with open_image(content) as image:
        image.load()
        _turn_upright(image)
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # Pillow's conversion saturates 16-bit values at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # the same colours as the direct conversion, which warns about the lost transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


def _turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:
        # cameras and editors write malformed EXIF blocks around intact pixels
        logger.debug("ignored malformed EXIF data", exc_info=True)
