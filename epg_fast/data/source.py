"""Where encoded images come from: the interface of every source, and how one image is decoded with Pillow."""

from __future__ import annotations

import abc
import hashlib
import io
import logging
import os
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from epg_fast.data.faults import ReadError, is_away, is_of_the_image, read_error
from epg_fast.data.pool import check_stopped

if int(PIL.__version__.split(".")[0]) < 10:
    # it does not turn images in place, so that rotated ones would stay as they are
    raise ImportError(f"Pillow is {PIL.__version__}, wanted 10 or newer; pip install --upgrade pillow")

# A file may carry the wrong extension, but nothing else is tried: Pillow would start Ghostscript for an EPS.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")

NO_LABELS = ["all"]
"""`classes` of images of which no class is known."""
LABEL_KEYS = ("label", "cls", "class", "class_id", "class_index", "target")
"""Of a .json beside an image in a tar: where its class index is looked for."""
LABELS_WANTED = (
    f"wanted class folders, a dataset.json with labels, key.cls or key.json ({'/'.join(LABEL_KEYS)}) beside key.jpg in "
    "tars, or tars of classes (cat.tar with cat_1.jpg; names that differ in digits alone are shards)"
)
MOST_CLASSES = 1_000_000
# Seconds to wait for a disk that is away, and after how many to say so.
_PATIENCE, _SILENCE = 600.0, 2.0
_PNG = b"\x89PNG\r\n\x1a\n"
# Texts and colour profiles do not matter for the pixels, but Pillow refuses files in which they are large.
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# Where programs write the orientation that other formats have in their EXIF data.
_PNG_ORIENTATION = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")

logger = logging.getLogger("epg_fast")


class DataError(ValueError):
    """Too many images of a dataset cannot be decoded."""


def too_many_bad_files(
    bad_files: dict[str, str],
    total: int,
    max_bad_fraction: float,
    remedy: str = "Restore or delete these files (or permit this user to read them), or let training allow more of "
    "them with --data.max_bad_fraction.",
) -> DataError:
    """Return the error that names the first few of `bad_files` (relative path -> reason) and the `remedy`."""
    first = "; ".join(f"{printable(path)} ({reason})" for path, reason in list(bad_files.items())[:3])
    more = "; ..." if len(bad_files) > 3 else ""
    return DataError(
        f"{len(bad_files)} of {total} images ({len(bad_files) / total:.2%}) cannot be decoded, wanted at most "
        f"{max_bad_fraction:.2%}: {first}{more}. {remedy}"
    )


def printable(path: str) -> str:
    """Return `path` on one line: names of files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in path)


class ImageSource(abc.ABC):
    """A fixed list of labelled, encoded images with access to any of them.

    Attributes:
        root: the folder or file that was opened.
        paths: names of the images, relative to `root`, with `/`.
        labels: class index of each image.
        classes: names of all classes; the class index is the position in this list.
    """

    root: Path
    paths: Sequence[str]
    labels: Sequence[int]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    @abc.abstractmethod
    def read(self, i: int) -> bytes:
        """Return the encoded image `i`. Raises OSError if it cannot be read."""

    def load(self, i: int) -> Image.Image:
        """Return image `i`, decoded: see `decode_image`."""
        return decode_image(self.read(i))

    def examine(self, i: int, make: Callable[[bytes], Any] | None = None) -> tuple[Any, str | None]:
        """Return what `make`, or else `decode_image`, makes of image `i`; or None and why the image is bad.

        A disk that is away is waited for. What is not the image's fault raises `ReadError`.
        """
        started, pause, told = time.monotonic(), 0.1, False
        while True:
            try:
                return (make or decode_image)(self.read(i)), None
            except Exception as error:
                away = is_away(error, self.root)
                if not away and is_of_the_image(error):
                    return None, f"{type(error).__name__}: {error}"
                waited, name = time.monotonic() - started, printable(str(self.root / self.paths[i]))
                if not away:
                    raise read_error(error, f"read {name}") from error
                if waited > _PATIENCE:
                    raise ReadError(
                        f"{name} could not be read for {waited:.0f} s ({error.strerror}); is the disk there? "
                        "Then give the same command again"
                    ) from error
                if waited > _SILENCE and not told:
                    told = True
                    logger.warning("waiting for the disk: %s cannot be read (%s)", name, error.strerror)
            check_stopped()
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hexadecimal) of the relative paths and their labels; the contents are not read."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            digest.update(os.fsencode(path) + b"\0" + str(int(label)).encode() + b"\n")
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.root)!r}: {len(self)} images, {len(self.classes)} classes)"


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
        return Image.open(io.BytesIO(without_texts(content)), formats=_FORMATS)
    except UnidentifiedImageError:
        # Pillow's text has an address in memory, another one in every run
        raise UnidentifiedImageError(f"not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} image") from None


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
