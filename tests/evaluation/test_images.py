"""Images of npz files and folders: as streams for a network, and as small grayscale vectors."""

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.data import ImageFolder
from epg_fast.evaluation.images import load_images, open_stream, round_trip
from tests.evaluation.samples import save_npz, save_pngs


def colors(num=7, height=6, width=6):
    return np.random.default_rng(0).integers(0, 256, (num, height, width, 3), dtype=np.uint8)


def everything(path, batch_size=3):
    stream = open_stream(path)
    parts, batches = zip(*stream.batches(batch_size), strict=True)
    assert all(batch.dtype == torch.uint8 and len(batch) <= batch_size for batch in batches)
    images = torch.cat(batches)
    assert stream.num == len(images) and stream.size == images.shape[2:]
    assert np.array_equal(np.concatenate([np.arange(stream.num)[part] for part in parts]), np.arange(stream.num))
    # every third batch, as one of three ranks takes them
    for first in range(3):
        for part, batch in stream.batches(batch_size, first, 3):
            assert part.start // batch_size % 3 == first and torch.equal(batch, images[part])
    return images.permute(0, 2, 3, 1).numpy()


def test_npz_class_folders_and_flat_folder_hold_the_same_images_whatever_lies_in_subfolders(tmp_path):
    images, labels = colors(), np.arange(7) // 3
    save_npz(images, labels, tmp_path / "samples.npz")
    save_pngs(images, labels, tmp_path / "png")
    save_pngs(images, np.zeros(7, int), tmp_path / "flat")
    flat = tmp_path / "flat" / "0000"
    (flat / "logs").mkdir()
    (flat / "logs" / "log.txt").write_text("x")
    save_pngs(images[::-1], np.zeros(7, int), flat / "@eaDir")
    for path in ("samples.npz", "png", "flat/0000"):
        assert np.array_equal(everything(tmp_path / path), images), path
    from_npz, from_folder = load_images(tmp_path / "samples.npz", 3), load_images(tmp_path / "png", 3)
    assert from_npz[0].dtype == np.float64 and from_npz[1].dtype == np.int64
    assert np.array_equal(from_npz[0], from_folder[0]) and np.array_equal(from_npz[1], from_folder[1])
    save_pngs(images[:2], np.zeros(2, int), flat / "grids")
    with pytest.raises(ValueError, match=r"7 images itself and 2 in its folders \(grids, \.\.\.\), wanted one of"):
        open_stream(flat)


def test_oblong_and_gray_images_are_read_as_they_are(tmp_path):
    images = colors(2, height=4, width=6)
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"no image")
    assert np.array_equal(everything(tmp_path), images[..., :1].repeat(3, axis=3))


def test_broken_images_and_those_of_different_sizes_are_refused_by_name(tmp_path, monkeypatch):
    folder = tmp_path / "0"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    Image.new("RGB", (8, 9)).save(folder / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: the image is 8x9, the first one 8x8"):
        everything(folder)
    assert load_images(tmp_path, 8)[0].shape == (2, 64)  # which crops them
    (folder / "b.png").write_bytes(b"\x89PNG half a file")
    for read in (everything, lambda folder: load_images(folder, 8)):
        with pytest.raises(ValueError, match=r"b\.png: cannot be decoded"):
            read(tmp_path)

    def fails(folder, i):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(ImageFolder, "read", fails)  # which is no image's fault
    with pytest.raises(OSError, match=r"cannot read .*a\.png \(Too many open files\): raise the limit"):
        load_images(tmp_path, 8)


MISTAKES = [
    *(
        ({"arr_0": array}, r"arr_0 must be uint8 \[N, H, W, 3\] with N > 0, got")
        for array in (colors() / 255, colors()[..., :1], colors()[0], colors()[:0])
    ),
    ({"images": colors()}, r"expected arr_0, found \['images'\]"),
    ({"arr_0": colors(), "arr_1": np.arange(5)}, "arr_1 must hold 7 integers"),
    ({"arr_0": colors(), "arr_1": np.arange(7) / 2}, "arr_1 must hold 7 integers"),
]


def test_other_arrays_missing_and_empty_sources_and_output_folders_of_sample_are_refused(tmp_path):
    for read in (open_stream, lambda path: load_images(path, 8)):
        with pytest.raises(ValueError, match="nowhere: no such file or folder"):
            read(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="is empty|no images|class folders"):
            read(tmp_path)
    for arrays, message in MISTAKES:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=rf"a\.npz: {message}"):
            open_stream(tmp_path / "a.npz")
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    np.savez(tmp_path / "samples.npz", arr_0=colors())
    with pytest.raises(ValueError, match=r"holds samples\.npz.*pass its samples\.npz"):
        open_stream(tmp_path)
    for size, message in ((8, r"samples\.npz: expected .* arr_1 \(labels\), found no arr_1"), (0, "size must be at")):
        with pytest.raises(ValueError, match=message):
            load_images(tmp_path / "samples.npz", size)


def test_gray_is_luma_and_the_reduction_is_bicubic_of_the_middle(tmp_path):
    images = colors(6, 32, 32)
    save_npz(images, np.arange(6), tmp_path / "samples.npz")
    luma = (images @ [0.299, 0.587, 0.114]).reshape(6, -1)
    assert np.abs(load_images(tmp_path / "samples.npz", 32)[0] * 255 - luma).max() < 0.51
    gray = Image.fromarray(images[4]).convert("L").resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(load_images(tmp_path / "samples.npz", 8)[0][4], np.asarray(gray).ravel() / 255)
    for name, level in (("b", 20), ("a", 10), ("c", 30)):
        (tmp_path / "folder" / name).mkdir(parents=True)
        pixels = np.zeros((8, 24), np.uint8)
        pixels[:, 8:16] = level
        Image.fromarray(pixels).save(tmp_path / "folder" / name / "x.PNG")
    features, labels = load_images(tmp_path / "folder", 8)
    assert labels.tolist() == [0, 1, 2]  # by the names of the folders
    assert np.array_equal(features, np.array([[10], [20], [30]]) / 255 * np.ones(64))  # not touched otherwise


def test_round_trip_is_what_a_perfect_model_of_enlarged_images_would_load_as(tmp_path):
    small = np.random.default_rng(2).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    large = [np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC)) for x in small]
    save_npz(np.stack(large)[..., None].repeat(3, axis=3), np.arange(3), tmp_path / "samples.npz")
    expected, _ = load_images(tmp_path / "samples.npz", 8)
    features = small.reshape(3, 64) / 255
    assert np.array_equal(round_trip(features, 32), expected) and not np.array_equal(features, expected)
