"""One encoded image to RGB, whatever its format and whatever else is in its file."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from epg_fast.data import decode_image
from tests.data.images import encode, noise

GRADIENT = np.dstack([np.tile(np.arange(0, 240, 15, dtype=np.uint8), (12, 1)) + i for i in (0, 5, 9)])
PALETTE = Image.fromarray(GRADIENT).quantize(16)
BITS = GRADIENT[..., 0] > 100
DEEP = np.linspace(0, 65535, 16 * 12).astype(np.uint16).reshape(12, 16)

MODES = {
    "RGB": (Image.fromarray(GRADIENT), GRADIENT),
    "grayscale": (Image.fromarray(GRADIENT[..., 0]), np.dstack([GRADIENT[..., 0]] * 3)),
    "palette": (PALETTE, np.asarray(PALETTE.convert("RGB"))),
    "alpha": (Image.fromarray(np.dstack([GRADIENT, np.full((12, 16), 7, np.uint8)])), GRADIENT),
    "bits": (Image.fromarray(BITS), np.dstack([BITS * 255] * 3)),
    "16 bits keep the high byte": (Image.fromarray(DEEP), np.dstack([DEEP // 256] * 3)),
}


def decode(content):
    image = decode_image(content)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_the_right_colours(mode):
    image, expected = MODES[mode]
    np.testing.assert_array_equal(decode(encode(image)), expected)
    if mode == "palette":  # its transparency is dropped
        np.testing.assert_array_equal(decode(encode(image, transparency=bytes(range(16)))), expected)
    if mode == "RGB":
        red = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
        assert np.abs(decode(red).astype(int) - [255, 0, 0]).max() < 12


@pytest.mark.parametrize("format, options", [("MPO", {}), ("GIF", {}), ("PNG", {"save_all": True}), ("WEBP", {})])
def test_of_several_pictures_in_a_file_the_decoder_takes_the_first(format, options):
    first, second = (Image.new("RGB", (16, 8), color) for color in ("red", "blue"))
    red, _, blue = decode(encode(first, format, save_all=True, append_images=[second]))[4, 4]
    assert red > 200 and blue < 60


def test_exif_orientation_is_applied():
    turns = {1: lambda a: a, 3: lambda a: a[::-1, ::-1], 6: lambda a: np.rot90(a, -1), 8: lambda a: np.rot90(a)}
    for orientation, upright in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        np.testing.assert_array_equal(decode(encode(Image.fromarray(GRADIENT), exif=exif)), upright(GRADIENT))


def test_malformed_exif_does_not_spoil_intact_pixels():
    content = encode(Image.fromarray(GRADIENT), exif=b"Exif\0\0no TIFF header at all")
    with pytest.raises(SyntaxError):  # the precondition: Pillow itself cannot read this block
        Image.open(io.BytesIO(content)).getexif()
    np.testing.assert_array_equal(decode(content), GRADIENT)


def png_with(chunks):
    """A PNG with `chunks` (kind, content) behind its header."""
    content = encode(Image.fromarray(GRADIENT))
    parts = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    return content[:33] + b"".join(parts) + content[33:]


LARGE = b'{"workflow": "' + b"node " * 300_000 + b'"}'
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
TEXTS = {
    "tEXt": [(b"tEXt", b"prompt\0" + LARGE)],
    "zTXt": [(b"zTXt", b"workflow\0\0" + zlib.compress(LARGE))],
    "iTXt": [(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LARGE))],
    "iCCP": [(b"iCCP", b"profile\0\0" + zlib.compress(LARGE))],
    "many": [(b"zTXt", b"workflow\0\0" + zlib.compress(LARGE)), (b"gAMA", b"\0\0\xb1\x8f"), (b"tEXt", b"a\0b")] * 2,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_large_texts_and_profiles_do_not_spoil_the_pixels_of_a_png(kind, monkeypatch):
    """As programs that generate images write their workflows."""
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", len(LARGE) // 2)  # of texts that are not compressed
    content = png_with(TEXTS[kind])
    with pytest.raises(ValueError, match="(?i)too large|too much memory"):  # the precondition: Pillow refuses this file
        Image.open(io.BytesIO(content)).load()
    np.testing.assert_array_equal(decode(content), GRADIENT)


@pytest.mark.parametrize("behind_the_pixels", [False, True])
def test_an_orientation_among_the_texts_of_a_png_is_applied(behind_the_pixels):
    content = png_with([*TEXTS["zTXt"], (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)])
    if behind_the_pixels:
        bare = png_with([])
        content = bare[:-12] + content[33 : 33 + len(content) - len(bare)] + bare[-12:]
    np.testing.assert_array_equal(decode(content), np.rot90(GRADIENT, -1))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_damaged_files_raise_instead_of_returning_half_an_image(format):
    content = encode(noise(64, 64), format)
    for damaged in (content[: len(content) // 2], content[:40], b"", b"not an image"):
        with pytest.raises((OSError, SyntaxError, ValueError)):
            decode_image(damaged)
    with pytest.raises(UnidentifiedImageError):  # never handed to an interpreter
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
