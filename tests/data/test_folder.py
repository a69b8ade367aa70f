"""Folders of class folders and of EDM: which files are images of which class, and what is refused."""

import json
import os

import pytest
from PIL import Image

from epg_fast.data import ImageFolder
from epg_fast.data.sources.decoding import FORMATS
from epg_fast.data.sources.names import IMAGES, is_image, split_of, splits
from epg_fast.files import is_junk
from tests.data.images import labels, refused, touch

# names


def test_names_of_images_and_of_junk_in_any_case():
    known = {ending for ending, format in Image.registered_extensions().items() if format in FORMATS}
    assert known <= set(IMAGES)  # every ending that Pillow knows for the decoder's formats
    assert all(is_image(f"x{ending}") for ending in (*known, ".JPG", ".Jfif"))
    assert not any(map(is_image, ("x.tif", "x.jpg.txt", "x.jp2", "jpg", "x.npz", "x.tar")))
    junk = (".DS_Store", "._x.jpg", "@eaDir", "@EADIR", "Thumbs.db", "LOST+FOUND", "desktop.ini", "__MACOSX")
    assert all(map(is_junk, junk))
    assert not any(map(is_junk, ("n01440764", "@home", "thumbs", "lost", "eaDir", "_x.jpg", "recycle")))


SPLITS = """
    train test
    TRAIN Valid
    training_set test_set
    imagenet_train imagenet_val
    train-00000-of-00002 train-00001-of-00002 validation-00000-of-00001
    trainset testset extra
    train2014 val2014 annotations images docs notes
    val test
    train unlabeled
"""
CLASSES = """
    train
    train bus
    train-0 train-1
    bullet_train test_tube a b c
    valid invalid
    trainer tester
"""


def test_splits_are_known_by_their_words_and_classes_are_none(tmp_path):
    for names in map(str.split, SPLITS.strip().splitlines()):
        assert splits(names) == [name for name in names if split_of(name)]
        assert splits(reversed(names))[0] == names[0]  # the training set, if there is one
    for i, names in enumerate(map(str.split, CLASSES.strip().splitlines())):
        assert splits(names) == []
        root = touch(tmp_path / str(i), *(f"{name}/0.jpg" for name in names))
        assert ImageFolder(root).classes == sorted(names)


# class folders


def test_classes_paths_and_labels_are_sorted_and_recursive_and_other_files_counted(tmp_path, log):
    images = ("b/1.PNG", "a/z.JPG", "a/deep/er/0.jpeg", "b/0.bmp", "d/x.webp", "d/x.JFIF")
    touch(tmp_path, *images, "a/notes.txt", "b/.hidden.png", ".git/1.png", "b/.cache/2.png", "c/3.tif", "README")
    folder = ImageFolder(tmp_path)
    assert folder.classes == ["a", "b", "c", "d"]  # one without images keeps its index
    assert folder.paths == ["a/deep/er/0.jpeg", "a/z.JPG", "b/0.bmp", "b/1.PNG", "d/x.JFIF", "d/x.webp"]
    assert folder.labels == [0, 0, 1, 1, 3, 3] and len(folder) == 6 and folder.root == tmp_path
    said = "\n".join(log.messages)
    assert "1 class folders have no images (c); they keep their class index" in said
    assert said.count("ignored 3 files that are no images: 1 '") == 1


def test_links_are_followed_but_those_back_to_a_folder_above(tmp_path, log):
    root = touch(tmp_path / "root", "class0/0.png", "class1/1.png", "class2/2.png")
    links = {"class0/loop": ".", "class0/again": ".", "class1/root": "../..", "class1/up": ".."}
    for link, target in (links | {"class2/over": "../class0", "everything": "."}).items():
        (root / link).symlink_to(target)
    folder = ImageFolder(root)
    assert folder.classes == ["class0", "class1", "class2"]
    assert folder.paths == ["class0/0.png", "class1/1.png", "class2/2.png", "class2/over/0.png"]
    (message,) = log.messages
    assert "7 links lead back to a folder above them and are not followed (everything)" in message
    # through links alone: the class is found again as the real subfolder of its parent
    touch(tmp_path / "far", "class/x.png")
    (tmp_path / "far" / "class" / "up").symlink_to("..")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "a").symlink_to(tmp_path / "far" / "class")
    assert ImageFolder(tmp_path / "near").paths == ["a/x.png"]


def test_what_systems_and_storage_boxes_leave_is_neither_class_nor_image_and_not_opened(tmp_path, log, monkeypatch):
    wanted = [f"n{i}/{i}.jpg" for i in range(3)]
    clean = ImageFolder(touch(tmp_path / "clean", *wanted))
    junk = ("__MACOSX/n0/._0.jpg", "@eaDir/0.jpg", "lost+found/x.jpg", "$RECYCLE.BIN/x.jpg", "#recycle/n1/1.jpg")
    junk += ("System Volume Information/x.jpg", "n0/@eaDir/0.jpg/SYNOPHOTO_THUMB_XL.jpg", "n1/.ipynb_checkpoints/1.jpg")
    touch(tmp_path / "m", *wanted, *junk, "n0/Thumbs.db", "n1/thumbs.db", ".DS_Store", "n2/._2.jpg")
    opened, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(os.path.basename(path)) or scandir(path))
    folder = ImageFolder(tmp_path / "m")
    assert folder.classes == ["n0", "n1", "n2"] and folder.paths == wanted
    assert folder.fingerprint() == clean.fingerprint()
    (message,) = log.messages
    assert "2 '@eaDir'" in message and "hidden, or of an operating system" in message
    assert "n0" in opened and "lost+found" not in opened  # only root may read it


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
        ("a/train/0.jpg a/test/0.jpg b/train/0.jpg", "a/train"),
    ],
)
def test_splits_are_refused_with_the_folder_to_pass(tmp_path, names, passes):
    touch(tmp_path, *(name.replace("~", " ") for name in names.split()))
    expected = f"holds the split.*wanted a folder of class folders with images; pass {tmp_path}/{passes}$"
    refused(tmp_path, expected, use=ImageFolder)


def test_layouts_that_may_be_meant_otherwise_are_pointed_out(tmp_path, log):
    root = touch(tmp_path / "loose", "thumbnails/0.jpg", "0.jpg")
    assert ImageFolder(root).paths == ["thumbnails/0.jpg"] and "ignored 1 images" in log.messages[-1]
    root = touch(tmp_path / "deeper", "imagenette/n01/0.jpg", "imagenette/n02/0.jpg")
    assert ImageFolder(root).classes == ["imagenette"]
    assert f"pass {root / 'imagenette'} if these are the classes" in log.messages[-1]
    folder = ImageFolder(touch(tmp_path / "samples", "1.png", "0.png"), flat=True)
    assert folder.paths == ["0.png", "1.png"] and folder.classes == ["samples"] and folder.labels == [0, 0]


@pytest.mark.parametrize(
    "files, path, message",
    [
        ("", "", "empty path"),
        ("", "missing", "missing does not exist.*check the spelling"),
        ("file", "file", "is a file.*pass the folder"),
        (".hidden", ".", "is empty.*prepare"),
        ("x.txt", ".", "has neither class folders nor images"),
        ("0.png", ".", "1 images but no class folders.*move them"),
        ("a/x.txt", ".", "none of the 1 class folders in .* has an image"),
        ("a/0.jpg 0.jpg 1.jpg", ".", r"2 images itself and 1 in its folders \(a\), wanted one of these"),
    ],
)
def test_mistaken_paths_are_named_with_a_remedy(tmp_path, files, path, message):
    touch(tmp_path, *files.split())
    refused(path and tmp_path / path, message, use=ImageFolder)


def test_fingerprint_changes_with_names_and_labels_only(tmp_path):
    root = touch(tmp_path, "b/0.png", "c/1.png")
    before = ImageFolder(root).fingerprint()
    (root / "b" / "0.png").write_bytes(b"other content")
    assert ImageFolder(root).fingerprint() == before and len(before) == 64
    (root / "b" / "0.png").rename(root / "b" / "renamed.png")
    renamed = ImageFolder(root).fingerprint()
    (root / "a_new_class").mkdir()
    assert len({before, renamed, ImageFolder(root).fingerprint()}) == 3


# EDM's dataset.json


def edm(root, content):
    touch(root, "00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png")
    (root / "dataset.json").write_text(content if isinstance(content, str) else json.dumps({"labels": content}))
    return root


def test_a_folder_of_edm_has_the_labels_of_its_dataset_json(tmp_path, log):
    wanted = {"00001/img00001000.png": 2, "00000/img00000000.png": 10, "00000/img00000001.png": 2}
    folder = ImageFolder(edm(tmp_path / "edm", list(wanted.items())))
    assert labels(folder) == wanted
    assert folder.classes == [f"{label:02d}" for label in range(11)]  # which sort as the numbers do
    assert not log.messages
    # StyleGAN's tool may write no labels, nor folders
    touch(tmp_path / "flat", "img00000000.png", "img00000001.png")
    touch(tmp_path / "flat", "dataset.json", content=b'{"labels": null}')
    assert ImageFolder(tmp_path / "flat").classes == ["all"]
    assert "dataset.json: no image has a label: one class, 'all'" in log.messages[-1]
    # another program's
    assert ImageFolder(edm(tmp_path / "other", '{"name": "x"}')).classes == ["00000", "00001"]


ONE = ["00000/img00000000.png", 1]


@pytest.mark.parametrize(
    "content, message",
    [
        ([ONE], "has no label of 00000/img00000001.png; add it"),
        ([["00000/img00000000.png", [0.0, 1.0]]], "has other labels, wanted a list of .file, class index."),
        ([["00000/img00000000.png", -1]], "has other labels"),
        ({"00000/img00000000.png": 1}, "has other labels"),
        ([ONE, ["00000\\img00000000.png", 2]], "names 00000/img00000000.png with the labels 1 and 2; delete one"),
        ("[" * 100_000, r"cannot read .*dataset.json \(no JSON: .*\); mend it, or move it away"),
    ],
)
def test_a_dataset_json_of_other_labels_is_refused(tmp_path, content, message):
    refused(edm(tmp_path, content), message, use=ImageFolder)


def test_splits_of_a_dataset_json_are_refused_with_the_folder_to_pass(tmp_path):
    names = ["train/00000/0.png", "train/1.png", "val/2.png", "test/3.png"]
    touch(tmp_path, *names)
    for content in ([[name, 0] for name in names], [[name, 0] for name in names[:2]], None):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": content}))
        refused(tmp_path, "splits train, val, test, wanted .*; pass .*/train", use=ImageFolder)
    # one kind may be anything
    touch(tmp_path / "other", "train/0.png", "extra/0.png")
    (tmp_path / "other" / "dataset.json").write_text('{"labels": [["train/0.png", 1], ["extra/0.png", 0]]}')
    assert ImageFolder(tmp_path / "other").labels == [0, 1]
