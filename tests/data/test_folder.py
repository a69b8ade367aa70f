import io
import json
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


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_what_systems_and_storage_boxes_leave_is_neither_class_nor_image_and_said(tmp_path, caplog):
    wanted = [f"n{i}/{i}.jpg" for i in range(3)]
    clean = ImageFolder(touch(tmp_path / "clean", *wanted))
    caplog.set_level(logging.INFO, "epg_fast")
    junk = ("__MACOSX/n0/._0.jpg", "@eaDir/0.jpg", "lost+found/x.jpg", "$RECYCLE.BIN/x.jpg", "#recycle/n1/1.jpg")
    junk += ("System Volume Information/x.jpg", "n0/@eaDir/0.jpg/SYNOPHOTO_THUMB_XL.jpg", "n1/.ipynb_checkpoints/1.jpg")
    folder = ImageFolder(
        touch(tmp_path / "m", *wanted, *junk, "n0/Thumbs.db", "n1/thumbs.db", ".DS_Store", "n2/._2.jpg")
    )
    assert folder.classes == ["n0", "n1", "n2"] and folder.paths == wanted
    assert folder.fingerprint() == clean.fingerprint()
    (line,) = (record.getMessage() for record in caplog.records)
    assert "2 '@eaDir'" in line and "hidden, or of an operating system" in line


def test_a_folder_of_the_file_system_is_not_even_opened(tmp_path, monkeypatch):
    """Only root may read lost+found."""
    opened, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(os.path.basename(path)) or scandir(path))
    ImageFolder(touch(tmp_path, "a/0.png", "lost+found/x.png"))
    assert "a" in opened and "lost+found" not in opened


def test_other_files_are_counted_in_one_line(tmp_path, caplog):
    caplog.set_level(logging.INFO, "epg_fast")
    touch(tmp_path, "a/0.JFIF", "a/1.jpe", "a/2.Gif", "a/3.tif", "b/0.PNG", "b/1.TIF", "b/2.txt", "README")
    assert len(ImageFolder(tmp_path)) == 4
    (line,) = (record.getMessage() for record in caplog.records)
    assert "ignored 4 files that are no images: 2 '.tif', 1 '" in line


@pytest.mark.parametrize(
    "names, passes",
    [
        ("train/n01/0.JPEG train/n02/0.JPEG val/0.JPEG test/0.JPEG", "train"),
        ("v/train/a/0.jpg v/valid/a/0.jpg", "v/train"),
        ("Train/a/0.jpg Test/a/0.jpg __MACOSX/a/0.jpg", "Train"),
        ("Training~Set/a/0.jpg Validation_Set/a/0.jpg Annotations/a.xml", "Training Set"),
        ("train2017/a/0.jpg val2017/a/0.jpg a/0.jpg b/0.jpg c/0.jpg", "train2017"),
        ("train/n01.tar val/0.jpg", "train"),
        ("training/a/0.jpg training/b/0.jpg", "training"),
        ("eval/a/0.jpg", "eval"),
        ("train/a/0.jpg train/b/0.jpg Annotations/a.xml", "train"),
        ("a/train/0.jpg a/test/0.jpg b/train/0.jpg", "as train/a"),
    ],
)
def test_splits_are_refused_with_the_folder_to_pass(tmp_path, names, passes):
    touch(tmp_path, *(name.replace("~", " ") for name in names.split()))
    with pytest.raises(ValueError, match=r"holds the split.*wanted a folder of class folders with images; ") as caught:
        ImageFolder(tmp_path)
    assert str(caught.value).endswith(passes)


@pytest.mark.parametrize(
    "names",
    ["train/0.jpg bus/0.jpg plane/0.jpg", "train/0.jpg", "bullet_train/0.jpg test_tube/0.jpg a/0.jpg b/0.jpg c/0.jpg"],
)
def test_classes_may_have_names_of_splits(tmp_path, names):
    assert len(ImageFolder(touch(tmp_path, *names.split())).classes) == len(names.split())


def test_more_images_beside_the_class_folders_than_in_them_are_refused(tmp_path, caplog):
    touch(tmp_path, "thumbnails/0.jpg", "0.jpg")
    assert ImageFolder(tmp_path).paths == ["thumbnails/0.jpg"] and "ignored 1 images" in caplog.text
    with pytest.raises(ValueError, match=r"2 images itself and 1 in its folders \(thumbnails\), wanted one of these"):
        ImageFolder(touch(tmp_path, "1.jpg"))


def test_class_folders_one_folder_deeper_are_pointed_out(tmp_path, caplog):
    folder = ImageFolder(touch(tmp_path, "imagenette/n01/0.jpg", "imagenette/n02/0.jpg"))
    assert folder.classes == ["imagenette"]
    assert f"pass {tmp_path / 'imagenette'} if these are the classes" in caplog.text


def edm(root, labels):
    touch(root, "00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png")
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


def test_a_folder_of_edm_has_the_labels_of_its_dataset_json(tmp_path, caplog):
    labels = {"00001/img00001000.png": 2, "00000/img00000000.png": 10, "00000/img00000001.png": 2}
    folder = ImageFolder(edm(tmp_path / "edm", list(labels.items())))
    assert dict(zip(folder.paths, folder.labels, strict=True)) == labels
    assert folder.classes == [f"{label:02d}" for label in range(11)]  # which sort as the numbers do
    assert not caplog.records
    # StyleGAN's tool may write no labels, nor folders
    (tmp_path / "flat").mkdir()
    for name in ("img00000000.png", "img00000001.png"):
        touch(tmp_path / "flat", name)
    (tmp_path / "flat" / "dataset.json").write_text('{"labels": null}')
    assert ImageFolder(tmp_path / "flat").classes == ["all"] and "no labels in dataset.json" in caplog.text


@pytest.mark.parametrize(
    "labels, message",
    [
        ([["00000/img00000000.png", 1]], "has no label of 00000/img00000001.png; add it"),
        ([["00000/img00000000.png", [0.0, 1.0]]], "has other labels, wanted a list of .file, class index."),
        ([["00000/img00000000.png", -1]], "has other labels"),
        ({"00000/img00000000.png": 1}, "has other labels"),
        (
            [["00000/img00000000.png", 1], ["00000\\img00000000.png", 2]],
            "names 00000/img00000000.png with the labels 1 and 2; delete one of them",
        ),
    ],
)
def test_a_dataset_json_of_other_labels_is_refused(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder(edm(tmp_path, labels))


def test_splits_of_a_dataset_json_are_refused_with_the_folder_to_pass(tmp_path):
    names = ["train/00000/0.png", "train/1.png", "val/2.png", "test/3.png"]
    touch(tmp_path, *names)
    for labels in ([[name, 0] for name in names], [[name, 0] for name in names[:2]], None):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        with pytest.raises(
            ValueError, match=r"holds the splits train, val, test, wanted .*; write .*/train/dataset.json"
        ):
            ImageFolder(tmp_path)
    (tmp_path / "train" / "dataset.json").write_text('{"labels": [["00000/0.png", 1], ["1.png", 0]]}')
    with pytest.raises(ValueError, match=f"; pass {tmp_path / 'train'}$"):
        ImageFolder(tmp_path)
    assert ImageFolder(tmp_path / "train").labels == [1, 0]
    # one kind may be anything
    touch(tmp_path / "other", "train/0.png", "extra/0.png")
    (tmp_path / "other" / "dataset.json").write_text('{"labels": [["train/0.png", 1], ["extra/0.png", 0]]}')
    assert ImageFolder(tmp_path / "other").labels == [0, 1]


def test_a_dataset_json_that_cannot_be_read_is_named(tmp_path):
    path = edm(tmp_path, []) / "dataset.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"dataset.json is no JSON \(.*\); get it again, or move it away"):
        ImageFolder(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"cannot read .*dataset.json \(Is a directory\).*; mend it, or move it away"):
        ImageFolder(tmp_path)


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
        (tmp_path / "data", "splits train, test.*pass .*data/train$"),
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
