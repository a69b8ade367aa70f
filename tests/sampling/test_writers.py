import json
import math
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.sampling.writers import save_grid, save_npz, save_pngs, to_uint8, write_npz


def uint8_images(num=3, size=4):
    return np.random.default_rng(0).integers(0, 256, (num, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_survives_the_trip_through_floats(dtype):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert np.array_equal(to_uint8(levels.to(dtype) / 255), levels.permute(0, 2, 3, 1).numpy())


def test_rounding_is_nearest_with_ties_up_and_values_outside_are_clamped():
    values = [-3.0, -0.001, 0.49 / 255, 0.51 / 255, 1.5 / 255, 254.4 / 255, 254.6 / 255, 1.2, float("inf")]
    images = torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    assert to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 2, 254, 255, 255, 255]


def test_conversion_agrees_with_torchvision_and_leaves_its_input_alone(tmp_path):
    utils = pytest.importorskip("torchvision.utils")
    images = torch.rand(1, 3, 9, 7) * 1.4 - 0.2
    before = images.clone()
    utils.save_image(images, tmp_path / "image.png", padding=0)
    assert np.array_equal(to_uint8(images)[0], np.asarray(Image.open(tmp_path / "image.png")))
    assert torch.equal(images, before)


def test_channels_end_up_last():
    image = torch.zeros(1, 3, 2, 5)
    image[0, 2, 1, 3] = 1
    converted = to_uint8(image)
    assert converted.shape == (1, 2, 5, 3)
    assert converted[0, 1, 3].tolist() == [0, 0, 255] and converted.sum() == 255


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.int64)]
)
def test_wrong_inputs_are_named(images):
    with pytest.raises(ValueError, match=r"float images \[N, 3, H, W\]"):
        to_uint8(images)


def test_nan_is_refused_instead_of_painted():
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))


def test_grid_places_each_pixel_where_a_hand_count_puts_it(tmp_path):
    red, green, blue = np.eye(3, dtype=np.uint8) * 200
    images = np.zeros((3, 1, 2, 3), np.uint8)
    images[0, 0] = red, green
    images[1, 0] = blue, blue
    images[2, 0] = green, red
    save_grid(images, tmp_path / "grid.png", columns=2, padding=1, scale=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    w, r, g, b = [255] * 3, red.tolist(), green.tolist(), blue.tolist()
    first = [w, r, r, g, g, w, b, b, b, b, w]
    second = [w, g, g, r, r, w, w, w, w, w, w]
    assert grid.tolist() == [[w] * 11, first, first, [w] * 11, second, second, [w] * 11]


@pytest.mark.parametrize(("size", "tile"), [(8, 96), (28, 84), (32, 96), (40, 80), (64, 64), (96, 96), (128, 128)])
def test_small_images_are_enlarged_and_large_ones_are_not(tmp_path, size, tile):
    save_grid(torch.rand(1, 3, size, size), tmp_path / "grid.png", padding=0)
    assert Image.open(tmp_path / "grid.png").size == (tile, tile)


def test_grid_of_ten_is_four_wide_and_float_equals_uint8_in_both_layouts(tmp_path):
    images = torch.rand(10, 3, 4, 4)
    pixels = to_uint8(images)
    save_grid(images, tmp_path / "a.png", scale=1)
    save_grid(pixels, tmp_path / "b.png", scale=1)
    save_grid(torch.from_numpy(pixels).permute(0, 3, 1, 2), tmp_path / "c.png", scale=1)
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc"]
    assert pictures[0].shape == (3 * 6 + 2, 4 * 6 + 2, 3)
    assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[2])


def test_grid_refuses_no_images_and_odd_shapes(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        save_grid(torch.zeros(0, 3, 4, 4), tmp_path / "grid.png")
    with pytest.raises(ValueError, match="expected float"):
        save_grid(np.zeros((1, 4, 4, 1), np.uint8), tmp_path / "grid.png")
    assert list(tmp_path.iterdir()) == []


def test_npz_round_trip_without_pickle(tmp_path):
    images, labels = uint8_images(), np.array([2, 0, 1])
    path = tmp_path / "new" / "samples.npz"
    save_npz(images, labels, path, labels="balanced", s_max=math.inf, interval=(0.19, 1.61), images=3, path="x")
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "arr_1", "metadata"]
        assert file["arr_0"].dtype == np.uint8 and np.array_equal(file["arr_0"], images)
        assert file["arr_1"].dtype == np.int64 and np.array_equal(file["arr_1"], labels)
        metadata = json.loads(file["metadata"].item())
    assert metadata == {"labels": "balanced", "s_max": "inf", "interval": [0.19, 1.61], "images": 3, "path": "x"}


def test_npz_keeps_the_name_it_was_given(tmp_path):
    save_npz(uint8_images(), np.arange(3), tmp_path / "samples.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["samples.bin"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "samples.npz"
    save_npz(uint8_images(), np.arange(3), path)
    before = path.read_bytes()

    def chunks():
        yield uint8_images()
        raise OSError(28, "disk full")

    with pytest.raises(OSError, match="cannot write .*samples.npz: disk full"):
        write_npz(path, chunks(), np.arange(6), (4, 4, 3), {})
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"]


def test_npz_is_written_from_chunks_in_the_memory_of_one(tmp_path):
    path = tmp_path / "samples.npz"
    labels = np.arange(512)
    save_npz(np.zeros((2, 128, 128, 3), np.uint8), labels[:2], tmp_path / "warm.npz")
    tracemalloc.start()
    chunks = (np.full((8, 128, 128, 3), i, np.uint8) for i in range(64))  # 393 kB each, 25 MB in all
    write_npz(path, chunks, labels, (128, 128, 3), {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    with np.load(path, allow_pickle=False) as file:
        images = file["arr_0"]
        assert images.shape == (512, 128, 128, 3) and np.array_equal(file["arr_1"], labels)
        assert np.array_equal(images[:, 0, 0, 0], labels // 8) and np.array_equal(images[:, -1, -1, 2], labels // 8)


def test_npz_members_are_those_that_adm_reads_and_hold_no_time(tmp_path, monkeypatch):
    save_npz(uint8_images(), np.arange(3), tmp_path / "a.npz", sampler="heun")
    monkeypatch.setattr(time, "localtime", lambda *_: time.struct_time((2001, 1, 1, 0, 0, 0, 0, 1, 0)))
    monkeypatch.setattr(time, "time", lambda: 978307200.0)
    write_npz(
        tmp_path / "b.npz", [uint8_images()[:1], uint8_images()[1:]], np.arange(3), (4, 4, 3), {"sampler": "heun"}
    )
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    # ZIP64 from the first byte, for more than 4 GB: the local header has the extra field of long sizes.
    assert struct.unpack_from("<HH", (tmp_path / "a.npz").read_bytes(), 26) == (len("arr_0.npy"), 20)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert [entry.filename for entry in archive.infolist()] == ["arr_0.npy", "arr_1.npy", "metadata.npy"]
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        with archive.open("arr_0.npy") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            assert np.lib.format.read_array_header_1_0(member) == ((3, 4, 4, 3), False, np.uint8)
            assert member.read() == uint8_images().tobytes()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), np.arange(2), "uint8 images"),
        (np.zeros((2, 3, 4, 4), np.uint8), np.arange(2), "uint8 images"),
        (uint8_images(2), np.arange(3), "2 integer labels"),
        (uint8_images(2), np.array([0.0, 1.0]), "2 integer labels"),
    ],
)
def test_wrong_layouts_are_refused(tmp_path, images, labels, message):
    with pytest.raises(ValueError, match=message):
        save_npz(images, labels, tmp_path / "samples.npz")
    with pytest.raises(ValueError, match=message):
        save_pngs(images, labels, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_png_files_carry_class_and_index_and_exact_pixels(tmp_path):
    images = uint8_images()
    save_pngs(images, np.array([7, 0, 7]), tmp_path, start=10)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert files == ["0000/000011.png", "0007/000010.png", "0007/000012.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "0007" / "000012.png")), images[2])
