import io
import logging
import os
import shutil
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from epg_fast.data import ImageFolder

GRADIENT = np.dstack([np.tile(np.arange(0, 240, 15, dtype=np.uint8), (12, 1)) + i for i in (0, 5, 9)])


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def load_only(root):
    folder = ImageFolder(root)
    assert len(folder) == 1
    image = folder.load(0)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_classes_paths_and_labels_are_sorted_and_recursive(tmp_path):
    names = (
        "b/1.png",
        "a/z.JPG",
        "a/deep/er/0.jpeg",
        "b/0.bmp",
        "c/x.webp",
        "a/notes.txt",
        "b/.hidden.png",
        ".git/1.png",
    )
    for name in names + ("b/.cache/2.png",):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    folder = ImageFolder(tmp_path)
    assert folder.classes == ["a", "b", "c"]
    assert folder.paths == ["a/deep/er/0.jpeg", "a/z.JPG", "b/0.bmp", "b/1.png", "c/x.webp"]
    assert folder.labels == [0, 0, 1, 1, 2]
    assert len(folder) == 5 and folder.root == tmp_path


def test_a_class_without_images_keeps_its_index_and_is_warned_about(make_folder, caplog):
    root = make_folder(6)
    shutil.rmtree(root / "class1")
    (root / "class1").mkdir()
    with caplog.at_level(logging.WARNING, "epg_fast"):
        folder = ImageFolder(root)
    assert folder.classes == ["class0", "class1", "class2"] and set(folder.labels) == {0, 2}
    assert "class1" in caplog.text


def test_symbolic_links_are_followed(make_folder, tmp_path):
    root = make_folder(6)
    (tmp_path / "linked").mkdir()
    os.symlink(root / "class0", tmp_path / "linked" / "a")
    (tmp_path / "linked" / "b").mkdir()
    os.symlink(root / "class1", tmp_path / "linked" / "b" / "deeper")
    assert ImageFolder(tmp_path / "linked").paths == ["a/000.png", "a/003.png", "b/deeper/001.png", "b/deeper/004.png"]


def test_links_back_to_a_folder_above_are_not_followed(make_folder, tmp_path, caplog):
    root = make_folder(3)
    for link, target in (
        ("class0/loop", "."),
        ("class0/again", "."),
        ("class1/root", "../.."),
        ("class1/up", ".."),
        ("class2/over", "../class0"),
        ("everything", "."),
    ):
        (root / link).symlink_to(target)
    caplog.clear()
    folder = ImageFolder(root)
    assert folder.classes == ["class0", "class1", "class2"]
    assert folder.paths == ["class0/000.png", "class1/001.png", "class2/002.png", "class2/over/000.png"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "7 links lead back to a folder above them and are not followed (everything)" in caplog.text
    # through links alone: the class is found again as the real subfolder of its parent
    (tmp_path / "far" / "class").mkdir(parents=True)
    (root / "class0" / "000.png").rename(tmp_path / "far" / "class" / "x.png")
    (tmp_path / "far" / "class" / "up").symlink_to("..")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "a").symlink_to(tmp_path / "far" / "class")
    assert ImageFolder(tmp_path / "near").paths == ["a/x.png"]


def test_mistaken_paths_are_named_with_a_remedy(tmp_path, make_folder):
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "a").mkdir(parents=True)
    write(tmp_path / "flat" / "0.png", Image.new("RGB", (4, 4)))
    make_folder(3, name="data/train")
    make_folder(3, name="data/test")
    for path, message in (
        ("", "empty path"),
        (tmp_path / "missing", "missing does not exist.*check the spelling"),
        (file, "is a file.*pass the folder"),
        (tmp_path / "empty", "is empty.*prepare"),
        (tmp_path / "flat", "1 images but no class folders.*move them"),
        (tmp_path / "bare", "none of the 1 class folders"),
        (tmp_path / "data", "splits test, train.*pass .*data/train"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            ImageFolder(path)
        assert "\n" not in str(caught.value)


def test_fingerprint_changes_with_names_and_labels_only(make_folder):
    root = make_folder(9)
    before = ImageFolder(root).fingerprint()
    assert before == ImageFolder(root).fingerprint() and len(before) == 64
    (root / "class0" / "000.png").write_bytes(b"other content")
    assert ImageFolder(root).fingerprint() == before
    (root / "class0" / "000.png").rename(root / "class0" / "renamed.png")
    renamed = ImageFolder(root).fingerprint()
    (root / "a_new_class").mkdir()
    assert len({before, renamed, ImageFolder(root).fingerprint()}) == 3


def test_rgb_is_exact_whatever_the_extension_says(tmp_path):
    Image.fromarray(GRADIENT).save(tmp_path / "x.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "x.png").rename(tmp_path / "a" / "x.JPEG")
    np.testing.assert_array_equal(load_only(tmp_path), GRADIENT)


def test_grayscale_palette_alpha_and_1_bit(tmp_path):
    gray = Image.fromarray(GRADIENT[..., 0])
    write(tmp_path / "gray" / "c" / "x.png", gray)
    np.testing.assert_array_equal(load_only(tmp_path / "gray"), np.dstack([GRADIENT[..., 0]] * 3))

    palette = Image.fromarray(GRADIENT).quantize(16)
    write(tmp_path / "palette" / "c" / "x.png", palette)
    np.testing.assert_array_equal(load_only(tmp_path / "palette"), np.asarray(palette.convert("RGB")))

    write(tmp_path / "transparent" / "c" / "x.png", palette, transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(load_only(tmp_path / "transparent"), np.asarray(palette.convert("RGB")))

    rgba = np.dstack([GRADIENT, np.full(GRADIENT.shape[:2], 7, np.uint8)])
    write(tmp_path / "rgba" / "c" / "x.png", Image.fromarray(rgba))
    np.testing.assert_array_equal(load_only(tmp_path / "rgba"), GRADIENT)

    bits = GRADIENT[..., 0] > 100
    write(tmp_path / "bits" / "c" / "x.png", Image.fromarray(bits))
    np.testing.assert_array_equal(load_only(tmp_path / "bits"), np.dstack([bits * 255] * 3))


def test_16_bit_png_keeps_the_high_byte_instead_of_saturating(tmp_path):
    values = np.linspace(0, 65535, 16 * 12).astype(np.uint16).reshape(12, 16)
    write(tmp_path / "c" / "x.png", Image.fromarray(values))
    np.testing.assert_array_equal(load_only(tmp_path)[..., 1], values // 256)


def test_cmyk_jpeg_has_the_right_colours(tmp_path):
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    write(tmp_path / "c" / "x.jpg", red, quality=95)
    assert np.abs(load_only(tmp_path) - [255, 0, 0]).max() < 12


@pytest.mark.parametrize(
    "orientation, upright",
    [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, lambda a: np.rot90(a))],
)
def test_exif_orientation_is_applied(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "c" / "x.png", Image.fromarray(GRADIENT), exif=exif)
    np.testing.assert_array_equal(load_only(tmp_path), upright(GRADIENT))


def test_malformed_exif_does_not_spoil_intact_pixels(tmp_path):
    write(tmp_path / "c" / "x.png", Image.fromarray(GRADIENT), exif=b"Exif\0\0no TIFF header at all")
    with pytest.raises(SyntaxError):  # the precondition: Pillow itself cannot read this block
        Image.open(tmp_path / "c" / "x.png").getexif()
    np.testing.assert_array_equal(load_only(tmp_path), GRADIENT)


def png_with(chunks, pixels=GRADIENT):
    """A PNG with `chunks` (kind, content) behind its header."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    parts = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    return buffer.getvalue()[:33] + b"".join(parts) + buffer.getvalue()[33:]


LARGE = b'{"workflow": "' + b"node " * 300_000 + b'"}'
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
TEXTS = {
    "tEXt": [(b"tEXt", b"prompt\0" + LARGE * 50)],
    "zTXt": [(b"zTXt", b"workflow\0\0" + zlib.compress(LARGE))],
    "iTXt": [(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LARGE))],
    "iCCP": [(b"iCCP", b"profile\0\0" + zlib.compress(LARGE))],
    "many": [(b"zTXt", b"workflow\0\0" + zlib.compress(LARGE)), (b"gAMA", b"\0\0\xb1\x8f"), (b"tEXt", b"a\0b")] * 2,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_large_texts_and_profiles_do_not_spoil_the_pixels_of_a_png(tmp_path, kind):
    """As programs that generate images write their workflows."""
    (tmp_path / "c").mkdir()
    content = png_with(TEXTS[kind])
    (tmp_path / "c" / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match="(?i)too large|too much memory"):  # the precondition: Pillow refuses this file
        Image.open(io.BytesIO(content)).load()
    np.testing.assert_array_equal(load_only(tmp_path), GRADIENT)


@pytest.mark.parametrize("behind_the_pixels", [False, True])
def test_an_orientation_among_the_texts_of_a_png_is_applied(tmp_path, behind_the_pixels):
    chunks = [*TEXTS["zTXt"], (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)]
    content = png_with(chunks)
    if behind_the_pixels:
        bare = png_with([])
        content = bare[:-12] + content[33 : 33 + len(content) - len(bare)] + bare[-12:]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_bytes(content)
    np.testing.assert_array_equal(load_only(tmp_path), np.rot90(GRADIENT, -1))


def test_damaged_files_raise_instead_of_returning_half_an_image(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for suffix in (".png", ".jpg", ".webp", ".bmp"):
        path = tmp_path / "c" / f"x{suffix}"
        write(path, noise)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "c" / "zero.png").write_bytes(b"")
    (tmp_path / "c" / "text.png").write_text("not an image")
    folder = ImageFolder(tmp_path)
    assert len(folder) == 6
    for i in range(len(folder)):
        with pytest.raises((OSError, SyntaxError, ValueError)):
            folder.load(i)


def test_postscript_is_never_handed_to_an_interpreter(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(UnidentifiedImageError):
        ImageFolder(tmp_path).load(0)
