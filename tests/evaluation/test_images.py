import numpy as np
import pytest
from PIL import Image

from epg_fast.data import ImageFolder
from epg_fast.evaluation.images import load_images, round_trip, stored_size
from tests.evaluation.samples import save_npz, save_pngs


def colors(num=6, size=32):
    return np.random.default_rng(0).integers(0, 256, (num, size, size, 3), dtype=np.uint8)


def test_npz_and_folder_of_the_same_samples_load_alike(tmp_path):
    images, labels = colors(), np.array([0, 0, 1, 1, 2, 2])
    save_npz(images, labels, tmp_path / "samples.npz")
    save_pngs(images, labels, tmp_path / "png")
    from_npz, from_folder = load_images(tmp_path / "samples.npz", 8), load_images(tmp_path / "png", 8)
    assert from_npz[0].dtype == np.float64 and from_npz[1].dtype == np.int64
    assert np.array_equal(from_npz[0], from_folder[0]) and np.array_equal(from_npz[1], from_folder[1])
    assert stored_size(tmp_path / "samples.npz") == stored_size(tmp_path / "png") == 32


def test_gray_is_luma_and_the_reduction_is_bicubic(tmp_path):
    images = colors()
    save_npz(images, np.arange(6), tmp_path / "samples.npz")
    features, _ = load_images(tmp_path / "samples.npz", 32)
    luma = (images @ [0.299, 0.587, 0.114]).reshape(6, -1)
    assert np.abs(features * 255 - luma).max() < 0.51
    features, _ = load_images(tmp_path / "samples.npz", 8)
    gray = Image.fromarray(images[4]).convert("L").resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(features[4], np.asarray(gray).ravel() / 255)


def test_folders_are_numbered_by_their_names_and_images_cropped_to_their_middle(tmp_path):
    for name, level in (("b", 20), ("a", 10), ("c", 30)):
        (tmp_path / name).mkdir()
        pixels = np.zeros((8, 24), np.uint8)
        pixels[:, 8:16] = level
        Image.fromarray(pixels).save(tmp_path / name / "x.PNG")
    features, labels = load_images(tmp_path, 8)
    assert labels.tolist() == [0, 1, 2]
    assert np.array_equal(features, np.array([[10], [20], [30]]) / 255 * np.ones(64))  # not touched otherwise


def test_round_trip_is_what_a_perfect_model_of_enlarged_images_would_load_as(tmp_path):
    small = np.random.default_rng(2).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    large = [np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC)) for x in small]
    save_npz(np.stack(large)[..., None].repeat(3, axis=3), np.arange(3), tmp_path / "samples.npz")
    expected, _ = load_images(tmp_path / "samples.npz", 8)
    features = small.reshape(3, 64) / 255
    assert np.array_equal(round_trip(features, 32), expected) and not np.array_equal(features, expected)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": colors()}, r"expected arr_0 \(images\) and arr_1 \(labels\), found \['arr_0'\]"),
        ({"images": colors(), "labels": np.arange(6)}, r"found \['images', 'labels'\]"),
        ({"arr_0": colors()[:0], "arr_1": np.arange(0)}, "N > 0"),
        ({"arr_0": colors() / 255, "arr_1": np.arange(6)}, "must be uint8"),
        ({"arr_0": colors(), "arr_1": np.arange(5)}, "must hold 6 integers"),
        ({"arr_0": colors(), "arr_1": np.arange(6) / 2}, "must hold 6 integers"),
    ],
)
def test_other_npz_files_are_refused_with_what_was_found(tmp_path, arrays, message):
    np.savez(tmp_path / "samples.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "samples.npz", 8)


def test_an_error_of_the_machine_is_not_blamed_on_an_image(tmp_path, monkeypatch):
    (tmp_path / "0").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "0" / "a.png")

    def read(folder, i):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(ImageFolder, "read", read)
    with pytest.raises(OSError, match=r"cannot read .*a\.png \(Too many open files\): raise the limit"):
        load_images(tmp_path, 8)


def test_missing_empty_unlabelled_and_broken_sources_are_refused(tmp_path):
    for name in ("empty", "loose", "broken/0"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "text.npz").write_text("no zip")
    Image.new("L", (8, 8)).save(tmp_path / "loose" / "a.png")
    (tmp_path / "broken" / "0" / "a.png").write_bytes(b"\x89PNG half a file")
    for name, size, message in (
        ("nowhere", 8, "nowhere: no such file or folder"),
        ("empty", 8, str(tmp_path)),
        ("text.npz", 8, "expected a complete npz file"),
        ("loose", 8, "class folders"),
        ("loose", 0, "size must be at least 1"),
        ("broken", 8, r"a\.png: cannot be decoded"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(tmp_path / name, size)
