"""What an output folder holds, what it lacks, and how its files look."""

import json
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.npz import write_npz
from epg_fast.sampling import outputs
from epg_fast.sampling.outputs import Outputs, captions, quantize, runs, save_grid

LABELS = np.arange(10) % 3
PIXELS = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)


def outputs_of(folder, npz=True, png=False):
    held = Outputs(folder, LABELS, 4, npz, png)
    held.scan()
    return held


def put(held, *ranges):
    for start, stop in ranges:
        assert held.parts.add(held.save_part(start, PIXELS[start:stop]))


def png(folder, i):
    return folder / "png" / f"{LABELS[i]:04d}" / f"{i:06d}.png"


def pixels_of(path):
    with Image.open(path) as file:
        return np.asarray(file)


def npz_of(path):
    with np.load(path, allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"], json.loads(file["metadata"].item())


def test_batches_are_the_same_for_any_number_of_ranks_and_whole_ones_come_first(tmp_path):
    assert list(runs(np.array([0, 1, 4, 6, 7]))) == [range(2), range(4, 5), range(6, 8)]
    assert list(runs(np.array([], int))) == []
    held = outputs_of(tmp_path)
    assert not held.parts.add(range(4))  # that another rank says it has written, and that is not there
    assert held.missing(4) == [range(4), range(4, 8), range(8, 10)] and not held.finished
    put(held, (2, 5))
    assert held.missing(4) == [range(5, 8), range(2), range(8, 10)]
    put(held, (9, 10))
    assert outputs_of(tmp_path).missing(100) == [range(5, 9), range(2)]
    put(held, (0, 2), (5, 9))
    assert outputs_of(tmp_path).missing(4) == [] and not held.finished


def test_parts_of_several_batch_sizes_may_overlap(tmp_path):
    put(outputs_of(tmp_path), (0, 4), (2, 6), (3, 5), (6, 7), (0, 10), (9, 10))
    for wants_png in (False, True):
        held = outputs_of(tmp_path, not wants_png, wants_png)
        if wants_png:
            held.npz.unlink()
            put(held, (0, 4), (2, 6), (6, 10))
        held.finish({})
    assert all(np.array_equal(pixels_of(png(tmp_path, i)), PIXELS[i]) for i in range(10))
    assert not held.parts.folder.exists()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "of another range", "beyond the end"])
def test_a_damaged_part_is_named_and_its_images_are_missing(tmp_path, log, damage):
    put(outputs_of(tmp_path), (0, 4), (4, 8))
    path = tmp_path / "parts" / "00000004_00000008.npy"
    content = path.read_bytes()
    other = {"of another range": "00000004_00000009.npy", "beyond the end": "00000008_00000012.npy"}.get(damage)
    path = path.rename(path.with_name(other)) if other else path
    path.write_bytes({"truncated": content[:-1], "garbage": b"x" * len(content), "empty": b""}.get(damage, content))
    held = outputs_of(tmp_path)
    assert f"{path.name} is damaged" in log.messages[0] and not path.exists()
    assert held.missing(4) == [range(4, 8), range(8, 10)]


def test_what_killed_commands_began_is_removed_and_other_files_are_not(tmp_path):
    put(outputs_of(tmp_path), (0, 10))
    left = [tmp_path / ".samples.npz.1.tmp", tmp_path / "parts" / ".x.npy.2.tmp", tmp_path / "png/0001/.1.png.3.tmp"]
    mine = [tmp_path / "notes.tmp", tmp_path / "parts" / "notes.npy", tmp_path / "png" / "notes.txt"]
    for path in (*left, *mine):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    held = outputs_of(tmp_path)
    assert not any(path.exists() for path in left)
    held.finish({})
    assert all(path.exists() for path in mine) and [path.name for path in held.parts.folder.iterdir()] == ["notes.npy"]


def test_png_files_can_be_made_of_the_npz_without_drawing(tmp_path, log):
    put(outputs_of(tmp_path), (0, 10))
    outputs_of(tmp_path).finish({})
    png(tmp_path, 4).parent.mkdir(parents=True)
    png(tmp_path, 4).touch()  # what a power failure can leave
    png(tmp_path, 5).parent.mkdir()
    png(tmp_path, 5).write_bytes(b"a file that is there stays")
    held = outputs_of(tmp_path, png=True)
    assert held.missing(4) == [] and not held.finished
    held.finish({})
    assert png(tmp_path, 5).read_bytes() == b"a file that is there stays"
    assert all(np.array_equal(pixels_of(png(tmp_path, i)), PIXELS[i]) for i in range(10) if i != 5)
    assert outputs_of(tmp_path, png=True).finished and not any("again" in line for line in log.messages)


@pytest.mark.parametrize(("wants_npz", "kept"), [(True, 3), (False, 1)])
def test_broken_off_while_png_files_are_made_no_image_is_lost(tmp_path, monkeypatch, wants_npz, kept):
    """Parts that no npz needs go one by one, so that the disk holds few images twice."""
    put(outputs_of(tmp_path), (0, 4), (4, 8), (8, 10))
    save = outputs.save_png
    monkeypatch.setattr(outputs, "save_png", lambda image, path: 1 / 0 if "000009" in path.name else save(image, path))
    with pytest.raises(ZeroDivisionError):
        outputs_of(tmp_path, wants_npz, True).finish({})
    monkeypatch.undo()
    held = outputs_of(tmp_path, wants_npz, True)
    assert len(list(held.parts.folder.iterdir())) == kept and held.missing(4) == []
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "png").rglob("*.png")}
    held.finish({})
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert all(np.array_equal(pixels_of(png(tmp_path, i)), PIXELS[i]) for i in range(10))
    assert not held.parts.folder.exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    held = outputs_of(tmp_path)
    held.npz.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="samples.npz is damaged; delete it, and the same command makes it again"):
        held.scan()
    write_npz(held.npz, [PIXELS[:3]], LABELS[:3], (4, 4, 3), {})
    with pytest.raises(ValueError, match=r"samples.npz is damaged \(got uint8 \[3, 4, 4, 3\]"):
        outputs_of(tmp_path).finish({})
    held.npz.unlink()
    put(held, (0, 10))
    held.parts.path(range(10)).write_bytes(b"x")  # since the scan
    with pytest.raises(ValueError, match=r"00000000_00000010.npy is damaged"):
        held.finish({})


def test_class_folders_sort_as_their_numbers_do_however_many_there_are(tmp_path):
    labels = np.array([2, 10_000, 1_001, 9_999])
    held = Outputs(tmp_path, labels, 4, False, True)
    names = [held.png_path(i).parent.name for i in range(4)]
    assert [int(name) for name in sorted(names)] == sorted(labels)
    many = Outputs(tmp_path, np.zeros(1_000_001, int), 4, False, True)
    names = [many.png_path(i).name for i in (3, 999_999, 1_000_000)]
    assert names == sorted(names) and held.png_path(3) == tmp_path / "png" / "09999" / "000003.png"


def test_rounding_is_nearest_with_ties_up_values_outside_are_clamped_and_channels_come_last():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(quantize(levels.to(dtype) / 255), levels.permute(0, 2, 3, 1))
    values = [-3.0, -0.001, 0.49 / 255, 0.51 / 255, 1.5 / 255, 254.4 / 255, 254.6 / 255, 1.2, float("inf")]
    images = torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    assert quantize(images)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 2, 254, 255, 255, 255]


def test_a_grid_places_each_pixel_where_a_hand_count_puts_it(tmp_path):
    """Two columns of tiles of 48 x 48, each pixel four times as long and two pixels of white between."""
    images = np.zeros((3, 24, 24, 3), np.uint8)
    images[0, 0, 1], images[1, 23, 0], images[2, 5, 5] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    save_grid(images, tmp_path / "grid.png")
    grid = pixels_of(tmp_path / "grid.png")
    want = np.full((2 + 2 * 98, 2 + 2 * 98, 3), 255)
    want[2:98, 2:98] = want[2:98, 100:196] = want[100:196, 2:98] = 0
    want[2:6, 6:10], want[94:98, 100:104], want[120:124, 22:26] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    assert np.array_equal(grid, want)


def test_names_of_classes_stand_below_the_tiles_whose_pixels_stay(tmp_path):
    """Of a synonym set the first; accents go, and what the font has no letters for is a number."""
    names = ["tench, Tinca tinca", "fünf", "七", "a name \n that is far too long for 96 pixels"]
    assert (below := captions(np.array([3, 1, 2, 0, 9]), names)) == [
        "a name that is far too long for 96 pixels",
        *("funf", "2", "tench", "9"),
    ]
    assert captions([0, 1], []) == []
    images = np.full((5, 32, 32, 3), 128, np.uint8)
    save_grid(images, tmp_path / "bare.png")
    save_grid(images, tmp_path / "named.png", below)
    bare, named = pixels_of(tmp_path / "bare.png"), pixels_of(tmp_path / "named.png")
    rows, columns = 2, 3
    room, odd = divmod(named.shape[0] - bare.shape[0], rows)
    assert named.shape[1] == bare.shape[1] and room > 10 and not odd
    for row in range(rows):
        top = 2 + row * (98 + room)
        assert np.array_equal(named[top : top + 96], bare[2 + row * 98 : 98 + row * 98])
        texts = named[top + 96 : top + 96 + room, 2:].reshape(room, columns, 98, 3)
        for column in range(columns):
            inked = (texts[:, column].min(axis=(0, 2)) < 128).nonzero()[0]
            assert len(inked) if row * columns + column < 5 else not len(inked)
            assert not len(inked) or inked.max() < 96  # the long one does not reach into the next tile


@pytest.mark.parametrize(("size", "tile"), [(28, 84), (64, 64), (128, 128)])
def test_small_images_are_enlarged_and_large_ones_are_not(tmp_path, size, tile):
    save_grid(np.zeros((1, size, size, 3), np.uint8), tmp_path / "grid.png")
    assert pixels_of(tmp_path / "grid.png").shape == (tile + 4, tile + 4, 3)


def test_npz_is_written_from_chunks_in_the_memory_of_one(tmp_path):
    labels = np.arange(512)
    write_npz(tmp_path / "warm.npz", [PIXELS], LABELS, (4, 4, 3), {})
    tracemalloc.start()
    chunks = (np.full((8, 128, 128, 3), i, np.uint8) for i in range(64))  # 393 kB each, 25 MB in all
    write_npz(tmp_path / "samples.npz", chunks, labels, (128, 128, 3), {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    images, got, _ = npz_of(tmp_path / "samples.npz")
    assert images.shape == (512, 128, 128, 3) and np.array_equal(got, labels)
    assert np.array_equal(images[:, 0, 0, 0], labels // 8) and np.array_equal(images[:, -1, -1, 2], labels // 8)


def test_npz_members_are_those_that_adm_reads_and_hold_no_time(tmp_path, monkeypatch):
    write_npz(tmp_path / "a.npz", [PIXELS], LABELS, (4, 4, 3), {"sampler": "heun"})
    monkeypatch.setattr(time, "localtime", lambda *_: time.struct_time((2001, 1, 1, 0, 0, 0, 0, 1, 0)))
    monkeypatch.setattr(time, "time", lambda: 978307200.0)
    write_npz(tmp_path / "b.npz", [PIXELS[:1], PIXELS[1:]], LABELS, (4, 4, 3), {"sampler": "heun"})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    # ZIP64 from the first byte, for more than 4 GB: the local header has the extra field of long sizes.
    assert struct.unpack_from("<HH", (tmp_path / "a.npz").read_bytes(), 26) == (len("arr_0.npy"), 20)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert [entry.filename for entry in archive.infolist()] == ["arr_0.npy", "arr_1.npy", "metadata.npy"]
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        with archive.open("arr_0.npy") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            assert np.lib.format.read_array_header_1_0(member) == ((10, 4, 4, 3), False, np.uint8)
            assert member.read() == PIXELS.tobytes()
