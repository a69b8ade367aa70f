"""Which images a folder holds, whatever files they are in."""

import numpy as np
import pytest

from epg_fast.sampling.image_writer import ImageWriter
from epg_fast.sampling.images import Images, runs
from epg_fast.sampling.writers import png_path, save_npz

LABELS = np.arange(10) % 3
PIXELS = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)


def images(folder):
    held = Images(folder, LABELS, 4)
    held.scan()
    return held


def put(held, start, stop, part=True, png=False):
    with ImageWriter(held, part, png) as writer:
        writer.add(np.arange(start, stop), PIXELS[start:stop])
    assert held.take_in(range(start, stop), part, png)


def test_batches_are_the_same_for_any_number_of_ranks_and_whole_ones_come_first(tmp_path):
    held = images(tmp_path)
    assert held.missing(4) == [range(4), range(4, 8), range(8, 10)]
    put(held, 2, 5)
    assert held.missing(4) == [range(5, 8), range(2), range(8, 10)]
    put(held, 9, 10)
    assert images(tmp_path).missing(100) == [range(5, 9), range(2)]
    put(held, 0, 2), put(held, 5, 9)
    assert images(tmp_path).missing(4) == []


def test_class_folders_sort_as_their_numbers_do_however_many_there_are(tmp_path):
    labels = np.array([2, 10_000, 1_001, 9_999])
    held = Images(tmp_path, labels, 4)
    for i in range(4):
        held.save_png(i, PIXELS[i])
    found = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert [int(name) for name in found] == sorted(labels)
    held = Images(tmp_path, labels, 4)
    held.scan()
    assert held.has_png.all()
    names = [png_path("", 0, index, images=1_000_001).name for index in (3, 999_999, 1_000_000)]
    assert names == sorted(names)


def test_parts_of_several_batch_sizes_may_overlap(tmp_path):
    held = images(tmp_path)
    for start, stop in ((0, 4), (2, 6), (3, 5), (6, 7), (0, 10)):
        held.save_part(start, PIXELS[start:stop])
    held = images(tmp_path)
    chunks = list(held.read(np.ones(10, bool)))
    assert np.array_equal(np.concatenate([pixels for _, pixels in chunks]), PIXELS)
    assert [start for start, _ in chunks] == sorted(start for start, _ in chunks)
    some = np.array([1, 0, 0, 1, 1, 0, 0, 0, 0, 1], bool)
    assert np.array_equal(np.concatenate([pixels for _, pixels in held.read(some)]), PIXELS[some])


@pytest.mark.parametrize("damage", ["truncated", "longer", "garbage", "empty", "of another range", "beyond the end"])
def test_a_damaged_part_is_named_and_its_images_are_missing(tmp_path, log, damage):
    held = images(tmp_path)
    put(held, 0, 4), put(held, 4, 8)
    path = tmp_path / "parts" / "00000004_00000008.npy"
    content = path.read_bytes()
    other = {"of another range": "00000004_00000009.npy", "beyond the end": "00000008_00000012.npy"}.get(damage)
    if other:
        path = path.rename(path.with_name(other))
    changed = {"truncated": content[:-1], "longer": content + b"x", "garbage": b"x" * len(content), "empty": b""}
    path.write_bytes(changed.get(damage, content))
    held = images(tmp_path)
    assert f"{path.name} is damaged" in log.messages[0] and not path.exists()
    assert held.missing(4) == [range(4, 8), range(8, 10)]


def test_what_killed_commands_began_is_removed_and_other_files_are_not(tmp_path):
    held = images(tmp_path)
    put(held, 0, 4, png=True)
    left = [tmp_path / ".samples.npz.1.tmp", tmp_path / "parts" / ".x.npy.2.tmp", tmp_path / "png/0001/.1.png.3.tmp"]
    mine = [tmp_path / "notes.tmp", tmp_path / "parts" / "notes.npy"]
    for path in (*left, *mine):
        path.write_bytes(b"x")
    held = images(tmp_path)
    assert not any(path.exists() for path in left) and all(path.exists() for path in mine)
    held.discard_parts()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["notes.npy"]


def test_png_files_hold_images_too(tmp_path):
    held = images(tmp_path)
    put(held, 0, 6, part=False, png=True)
    assert not list((tmp_path / "parts").glob("*.npy"))
    put(held, 5, 10)
    held = images(tmp_path)
    assert held.missing(4) == []
    assert np.array_equal(np.concatenate([pixels for _, pixels in held.read(np.ones(10, bool))]), PIXELS)
    (tmp_path / "png/0000/000000.png").rename(tmp_path / "png/0001/000000.png")  # another class: not this image
    (tmp_path / "png/0001/000001.png").write_bytes(b"")
    assert images(tmp_path).missing(4) == [range(2)]


def test_png_files_of_a_batch_that_was_not_finished_do_not_count(tmp_path):
    held = images(tmp_path)
    put(held, 4, 8, part=False, png=True)
    held.save_png(0, PIXELS[0])
    held = images(tmp_path)
    assert held.missing(4) == [range(4), range(8, 10)] and held.has_png[0]
    put(held, 0, 4, part=False, png=True), put(held, 8, 10, part=False, png=True)
    held.discard_parts()
    assert images(tmp_path).missing(4) == []
    (tmp_path / "grid.png").touch()  # written when all are drawn
    (tmp_path / "png/0001/000001.png").unlink()
    assert images(tmp_path).missing(4) == [range(1, 2)]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    held = images(tmp_path)
    put(held, 0, 6, part=False, png=True)
    (tmp_path / "png/0002/000002.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="000002.png is damaged .*; delete it, and the same command makes it again"):
        list(images(tmp_path).read(np.arange(10) < 6))
    (tmp_path / "samples.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="samples.npz is damaged"):
        list(images(tmp_path).read(np.arange(10) < 6))
    save_npz(PIXELS[:3], LABELS[:3], tmp_path / "samples.npz")
    with pytest.raises(ValueError, match=r"samples.npz is damaged \(got uint8 \[3, 4, 4, 3\]"):
        list(images(tmp_path).read(np.arange(10) < 6))


def test_the_npz_holds_all_images(tmp_path):
    save_npz(PIXELS, LABELS, tmp_path / "samples.npz")
    held = images(tmp_path)
    assert held.missing(4) == []
    some = np.array([0, 1, 1, 0, 0, 0, 0, 1, 0, 1], bool)
    assert np.array_equal(np.concatenate([pixels for _, pixels in held.read(some)]), PIXELS[some])


def test_a_part_is_written_after_its_png_files(tmp_path, monkeypatch):
    held, order = images(tmp_path), []
    save_png, save_part = held.save_png, held.save_part
    monkeypatch.setattr(held, "save_png", lambda i, p: (save_png(i, p), order.append(i)))
    monkeypatch.setattr(held, "save_part", lambda i, p: (save_part(i, p), order.append("part")))
    with ImageWriter(held, part=True, png=True) as writer:
        writer.add(np.array([0, 1, 2, 7, 8]), PIXELS[[0, 1, 2, 7, 8]])
        assert writer.written == [range(3)]  # while the next are drawn
    assert set(order[: order.index("part")]) >= {0, 1, 2} and order[-1] == "part" and len(order) == 7
    assert writer.written == [range(3), range(7, 9)]


def test_what_was_added_is_kept_when_the_drawing_fails(tmp_path):
    held = images(tmp_path)
    with pytest.raises(RuntimeError), ImageWriter(held, part=True, png=True) as writer:
        writer.add(np.arange(4), PIXELS[:4])
        raise RuntimeError("out of memory")
    assert images(tmp_path).missing(4) == [range(4, 8), range(8, 10)] and images(tmp_path).has_png[:4].all()


def test_what_another_rank_says_it_has_written_is_looked_for(tmp_path):
    held = images(tmp_path)
    assert not held.take_in(range(4), part=True, png=False) and not held.take_in(range(4), part=False, png=True)
    held.save_part(0, PIXELS[:4])
    for i in (0, 1, 3):
        held.save_png(i, PIXELS[i])
    assert not held.take_in(range(4), part=True, png=True) and held.missing(4)[0] == range(4)
    assert held.take_in(range(4), part=True, png=False) and held.missing(4)[0] == range(4, 8)


def test_runs_are_ranges_without_gaps():
    assert list(runs(np.array([0, 1, 4, 6, 7]))) == [range(2), range(4, 5), range(6, 8)]
    assert list(runs(np.array([], int))) == []
