import io

import pytest
from PIL import Image

from epg_fast.data import decode_image
from epg_fast.data.names import IMAGES, is_image, is_split, splits
from epg_fast.data.source import _FORMATS
from epg_fast.files import is_junk


def test_every_ending_that_pillow_knows_for_the_decoders_formats_is_one_of_images():
    known = {ending for ending, format in Image.registered_extensions().items() if format in _FORMATS}
    assert known <= set(IMAGES)
    for ending in (*known, ".JPG", ".Jfif"):
        assert is_image(f"x{ending}")
    for name in ("x.tif", "x.jpg.txt", "x.jp2", "jpg", "x.npz", "x.tar"):
        assert not is_image(name)


@pytest.mark.parametrize("format, options", [("MPO", {}), ("GIF", {}), ("PNG", {"save_all": True}), ("WEBP", {})])
def test_of_several_pictures_in_a_file_the_decoder_takes_the_first(format, options):
    first, second = (Image.new("RGB", (16, 8), color) for color in ("red", "blue"))
    file = io.BytesIO()
    first.save(file, format, save_all=True, append_images=[second])
    red, _, blue = decode_image(file.getvalue()).getpixel((4, 4))
    assert red > 200 and blue < 60


def test_hidden_names_and_those_of_systems_are_junk_in_any_case():
    for name in (".DS_Store", "._x.jpg", "@eaDir", "@EADIR", "Thumbs.db", "LOST+FOUND", "desktop.ini", "__MACOSX"):
        assert is_junk(name)
    for name in ("n01440764", "@home", "thumbs", "lost", "eaDir", "_x.jpg", "recycle"):
        assert not is_junk(name)


@pytest.mark.parametrize(
    "names",
    [
        "train test",
        "TRAIN Valid",
        "training_set test_set",
        "imagenet_train imagenet_val",
        "train-00000-of-00002 train-00001-of-00002 validation-00000-of-00001",
        "trainset testset extra",
        "train2014 val2014 annotations images docs notes",
        "val test",
        "train unlabeled",
    ],
)
def test_splits_are_known_by_their_words(names):
    names = names.split()
    assert splits(names) == [name for name in names if is_split(name)]
    assert splits(reversed(names))[0] == names[0]  # the training set, if there is one


@pytest.mark.parametrize(
    "names",
    [
        "train",
        "train bus",
        "train-0 train-1",
        "bullet_train test_tube a b c",
        "valid invalid",
        "trainer tester",
        "latest",
    ],
)
def test_classes_are_no_splits(names):
    assert splits(names.split()) == []
