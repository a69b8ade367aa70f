import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from epg_fast.data import (
    DataError,
    ImageFolder,
    ImageTars,
    center_crop,
    open_images,
    prepare_folder,
    prepare_shards,
    shards,
    verify_shards,
)
from epg_fast.data.tar_index import TarIndex

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def snapshot(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_hold_the_centre_crops_in_mixed_order(make_folder, tmp_path, workers):
    folder = ImageFolder(make_folder(50, size=(50, 37), suffix=".JPG"))
    (folder.root / "class9").mkdir()
    out = tmp_path / "out"
    manifest = prepare_shards(folder.root, out, 16, workers=workers, images_per_shard=20, seed=1)
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "index.npz", "manifest.json", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"
    ]  # fmt: skip
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["complete"] and manifest["image_size"] == 16 and manifest["format"] == "png"
    assert manifest["source"] == str(folder.root) and manifest["source_fingerprint"] == folder.fingerprint()
    assert manifest["counts"] == {"class0": 17, "class1": 17, "class2": 16, "class9": 0}
    assert manifest["class_frequencies"] == [0.34, 0.34, 0.32, 0.0] and manifest["bad_files"] == {}
    source, seen = open_images(out), []
    assert source.classes == ["class0", "class1", "class2", "class9"] and source.index.crc32 is not None
    for shard in manifest["shards"]:
        content = (out / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        with tarfile.open(out / shard["name"]) as tar:
            members = tar.getmembers()
            assert all((m.mtime, m.uid, m.gid, m.uname, m.gname) == (0, 0, 0, "", "") for m in members)
            assert [m.name[8:] for m in members] == [".png", ".cls"] * shard["images"]
            for image, label in zip(members[::2], members[1::2], strict=True):
                i, position = int(image.name[:8]), len(seen)
                content = tar.extractfile(image).read()
                np.testing.assert_array_equal(
                    np.asarray(Image.open(io.BytesIO(content))), np.asarray(center_crop(folder.load(i), 16))
                )
                assert int(tar.extractfile(label).read()) == folder.labels[i] == source.labels[position]
                assert source.paths[position] == f"{shard['name']}/{image.name}"
                assert source.read(position) == content and source.index.crc32[position] == zlib.crc32(content)
                seen.append(i)
    assert sorted(seen) == list(range(50)) and [shard["images"] for shard in manifest["shards"]] == [20, 20, 10]
    assert len({folder.labels[i] for i in seen[:20]}) == 3
    other = tmp_path / "other"
    prepare_shards(folder.root, other, 16, workers=0, images_per_shard=20, seed=2)
    assert list(open_images(other).paths) != list(source.paths)


def test_jpeg_keeps_the_chroma_and_quality_matters(make_folder, tmp_path):
    folder = ImageFolder(make_folder(6, size=(32, 32)))
    sizes = []
    for quality in (95, 60):
        out = tmp_path / str(quality)
        prepare_shards(folder.root, out, 32, workers=0, format="jpeg", quality=quality)
        source = open_images(out)
        for i, path in enumerate(source.paths):
            image = Image.open(io.BytesIO(source.read(i)))
            assert image.format == "JPEG" and path.endswith(".jpg")
            assert [component[1:3] for component in image.layer] == [(1, 1)] * 3  # 4:4:4
            wanted = np.asarray(folder.load(int(Path(path).stem))).astype(int)
            assert np.abs(np.asarray(image) - wanted).mean() < (4 if quality == 95 else 40)
        sizes.append(sum(shard["bytes"] for shard in json.loads((out / "manifest.json").read_text())["shards"]))
    assert sizes[1] < sizes[0]


def test_tars_are_a_source_as_well_as_folders(make_folder, tmp_path):
    folder = make_folder(12)
    out, again = tmp_path / "out", tmp_path / "again"
    prepare_shards(folder, out, 16, workers=0, images_per_shard=5)
    prepare_shards(out, again, 8, workers=0, images_per_shard=5)
    first, second = open_images(out), open_images(again)
    assert second.classes == first.classes == ["class0", "class1", "class2"] and len(second) == 12
    for i, path in enumerate(second.paths):
        origin = int(Path(path).stem)
        np.testing.assert_array_equal(np.asarray(second.load(i)), np.asarray(center_crop(first.load(origin), 8)))
        assert second.labels[i] == first.labels[origin]


# interruptions


def edit(out, change):
    """Write a shard again with other members, as if the run had been killed afterwards."""
    with tarfile.open(out / "shard-000001.tar") as tar:
        members = change({member.name: tar.extractfile(member).read() for member in tar})
    with tarfile.open(out / "shard-000001.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (out / "manifest.json").write_text((out / "manifest.json").read_text().replace("true", "false"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_a_killed_run_is_continued_and_gives_the_same_bytes(make_folder, tmp_path, wait_until_gone):
    source = make_folder(240, size=(160, 120))
    (source / "class1" / "100.png").write_bytes(b"bad")
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare_shards(source, whole, 64, workers=0, images_per_shard=20)
    program = (
        "import sys; from epg_fast.data import prepare_shards;"
        "prepare_shards(sys.argv[1], sys.argv[2], 64, workers=2, images_per_shard=20)"
    )
    run = subprocess.Popen([sys.executable, "-c", program, str(source), str(out)], cwd=ROOT)
    while len(list(out.glob("shard-*.tar"))) < 3:
        assert run.poll() is None
        time.sleep(0.002)
    workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert len(workers) == 2 and not wait_until_gone(workers, 20)
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    assert 3 <= len(done) < 12
    with pytest.raises(ValueError, match="prepare-data was interrupted; run it again"):
        open_images(out)
    with pytest.raises(ValueError, match="prepare-data was interrupted"):
        verify_shards(out)
    prepare_shards(source, out, 64, workers=2, images_per_shard=20)
    assert snapshot(out) == snapshot(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    assert json.loads((out / "manifest.json").read_text())["bad_files"].keys() == {"class1/100.png"}


@pytest.mark.parametrize(
    "loss",
    [
        lambda out: (out / "shard-000001.tar").unlink(),
        lambda out: (out / "index.npz").unlink(),
        lambda out: (out / "manifest.json").write_text((out / "manifest.json").read_text().replace("true", "false")),
        lambda out: (out / "shard-000001.tar").write_bytes(b""),
        lambda out: (out / "shard-000001.tar").write_bytes((out / "shard-000001.tar").read_bytes()[:-11000]),
        lambda out: os.replace(out / "shard-000000.tar", out / "shard-000001.tar"),
        lambda out: edit(out, lambda members: members | {next(name for name in members if ".cls" in name): b"7"}),
        lambda out: edit(out, lambda members: members | {"more.png": b""}),
        lambda out: edit(out, lambda members: dict(list(members.items())[2:])),
        lambda out: (out / ".shard-000001.tar.00.tmp").write_bytes(b"half"),
    ],
    ids=["shard", "index", "complete", "emptied", "cut", "swapped", "label", "member", "image", "leftover"],
)
def test_whatever_was_lost_is_made_again(make_folder, tmp_path, loss):
    source, out = make_folder(30), tmp_path / "out"
    prepare_shards(source, out, 16, workers=0, images_per_shard=10)
    before = snapshot(out)
    loss(out)
    assert snapshot(out) != before
    prepare_shards(source, out, 16, workers=0, images_per_shard=10)
    after = snapshot(out)
    after.pop(".shard-000001.tar.00.tmp", None)
    assert after == before


def test_a_finished_output_is_not_read_again(make_folder, tmp_path, monkeypatch):
    source, out = make_folder(30), tmp_path / "out"
    manifest = prepare_shards(source, out, 16, workers=0, images_per_shard=10)
    monkeypatch.setattr(shards, "_make_shard", None)
    assert prepare_shards(source, out, 16, workers=0, images_per_shard=10) == manifest


def test_a_full_disk_leaves_no_half_shard_and_ends_the_workers(make_folder, tmp_path, monkeypatch):
    source, out = make_folder(60), tmp_path / "out"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards._TarWriter, "finish", full)
    with pytest.raises(OSError, match="No space left"):
        prepare_shards(source, out, 16, workers=2, images_per_shard=20)
    assert sorted(path.name for path in out.iterdir()) == [".lock", "manifest.json"]


# bad files


def test_bad_files_are_left_out_and_named_until_they_are_mended(make_folder, tmp_path):
    source, out = make_folder(100), tmp_path / "out"
    good = (source / "class2" / "005.png").read_bytes()
    (source / "class2" / "005.png").write_bytes(b"")
    manifest = prepare_shards(source, out, 16, workers=2, images_per_shard=30)
    reason = "UnidentifiedImageError: not a PNG, JPEG, WEBP, BMP or GIF image"
    assert manifest["bad_files"] == {"class2/005.png": reason} and manifest["counts"]["class2"] == 32
    assert sorted(shard["images"] for shard in manifest["shards"]) in ([10, 29, 30, 30], [9, 30, 30, 30])
    assert len(open_images(out)) == 99 and prepare_shards(source, out, 16, workers=0, images_per_shard=30) == manifest
    (source / "class2" / "005.png").write_bytes(good)
    assert prepare_shards(source, out, 16, workers=0, images_per_shard=30)["bad_files"] == {}
    prepare_shards(source, tmp_path / "fresh", 16, workers=0, images_per_shard=30)
    assert len(open_images(out)) == 100 and snapshot(out) == snapshot(tmp_path / "fresh")


def test_over_one_percent_of_bad_files_is_an_error_after_the_work(make_folder, tmp_path):
    source, out = make_folder(100), tmp_path / "out"
    for name in ("002", "005"):
        (source / "class2" / f"{name}.png").write_text("text")
    with pytest.raises(DataError, match=r"2 of 100 images \(2.00%\).*class2/00[25].png"):
        prepare_shards(source, out, 16, workers=0, images_per_shard=30)
    assert len(json.loads((out / "manifest.json").read_text())["shards"]) == 4
    with pytest.raises(ValueError, match="could not decode 2 images"):
        open_images(out)


# what training and --verify refuse


def test_shards_that_were_lost_or_changed_are_refused(make_folder, tmp_path, caplog):
    source, out = make_folder(30), tmp_path / "out"
    prepare_shards(source, out, 16, workers=0, images_per_shard=10)
    shard, manifest = out / "shard-000001.tar", out / "manifest.json"
    content, text = shard.read_bytes(), manifest.read_text()
    shard.unlink()
    with pytest.raises(ValueError, match="lacks shard-000001.tar"):
        open_images(out)
    shard.write_bytes(content[:-512])
    with pytest.raises(ValueError, match=f"has {len(content) - 512} bytes, wanted {len(content)}"):
        open_images(out)
    shard.write_bytes(content)
    (out / "extra.tar").write_bytes(content)
    with pytest.raises(ValueError, match="has extra.tar, which its manifest.json does not name"):
        open_images(out)
    (out / "extra.tar").unlink()
    changed = json.loads(text)
    changed["counts"] |= {"class0": 11}
    manifest.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="has 10 images of class 'class0', wanted 11"):
        open_images(out)
    manifest.write_text(text)
    assert len(open_images(out)) == 30
    index = (out / "index.npz").read_bytes()
    (out / "index.npz").write_bytes(index[:-9])
    caplog.clear()
    lost = open_images(out)
    assert lost.index.crc32 is None and lost.classes == ["class0", "class1", "class2"] and len(lost) == 30
    assert "images are not checked; run prepare-data again" in caplog.text
    assert (out / "index.npz").read_bytes() == index[:-9]


def test_a_manifest_that_was_cut_edited_or_deleted_is_refused_with_a_remedy(make_folder, tmp_path, caplog):
    source, out = make_folder(9), tmp_path / "out"
    prepare_shards(source, out, 16, workers=0, images_per_shard=5)
    before = snapshot(out)
    text = (out / "manifest.json").read_text()
    good = json.loads(text)

    def refused(content, *texts):
        if content is None:
            (out / "manifest.json").unlink()
        else:
            (out / "manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))
        for use in (open_images, verify_shards):
            with pytest.raises(ValueError) as caught:
                use(out)
            message = str(caught.value)
            # --verify has a shorter word for a manifest that it cannot use, but the same remedy
            assert "\n" not in message and texts[-1] in message, message
            assert use is verify_shards or all(text in message for text in texts), message

    again, restore = "run prepare-data again, it makes only what is missing", "restore it, or prepare the images again"
    names = good["classes"]
    for content, found in (
        (good | {"classes": names[::-1]}, "class 0 is 'class0' by index.npz, but 'class2' by manifest.json"),
        (good | {"classes": [*names, "more"]}, "class 3 is None by index.npz, but 'more' by manifest.json"),
        ({key: value for key, value in good.items() if key != "shards"}, "has no shards, wanted a list with name"),
        (good | {"shards": None}, "has no shards"),
        (good | {"shards": [{"name": "shard-000000.tar"}]}, "has shards [{'name': 'shard-000000.tar'}]"),
        (good | {"counts": good["counts"] | {"class0": 4, "class1": 2}}, "has 3 images of class 'class0', wanted 4"),
        (good | {"complete": False}, "is not complete: prepare-data was interrupted; run it again"),
    ):
        refused(content, found, again if "again" not in found and "images of class" not in found else "again")
        # what the remedy promises
        prepare_shards(source, out, 16, workers=0, images_per_shard=5)
        assert snapshot(out) == before
    refused('{"complete": false, "lay', "manifest.json is damaged: it is no JSON", restore)
    refused(text[:300], "is damaged: it is no JSON", restore)
    refused("", "is damaged: it is no JSON", restore)
    refused(good | {"layout": "shardz"}, "its manifest.json says layout 'shardz', wanted 'shards'", restore)
    refused(good | {"counts": None}, "is damaged: it has counts None, wanted dict", restore)
    refused(good | {"complete": "yes"}, "is damaged: it has complete 'yes', wanted bool", restore)
    refused(good | {"classes": [["class0"]]}, "wanted names as classes", restore)
    refused(good | {"bad_files": None}, "bad_files are not named", restore)
    refused({"shards": []}, "its manifest.json is of another program", restore)
    refused(None, "has shards of prepare-data, but its manifest.json is missing", restore)
    # neither is left to tell: WebDataset shards like any other, unless something that cannot be read is beside them
    (out / "index.npz").unlink()
    assert open_images(out).classes == ["0", "1", "2"] and open_images(out / "shard-000001.tar").index.crc32 is None
    refused(text[:300], "is damaged: it is no JSON", restore)
    for path in out.glob("shard-*.tar"):
        path.rename(out / path.name.replace("shard", "theirs"))
    caplog.clear()
    assert len(open_images(out)) == 9 and "ignored, as the tars are not named as those of prepare-data" in caplog.text


def test_verify_says_in_one_line_what_is_wrong_with_the_index(make_folder, tmp_path):
    source, out = make_folder(9), tmp_path / "out"
    prepare_shards(source, out, 16, workers=0, images_per_shard=5)
    before, index = snapshot(out), out / "index.npz"
    other = TarIndex.load(index)
    other.crc32 = None
    other.save(tmp_path / "other.npz")
    np.save(tmp_path / "theirs.npy", np.arange(3))
    for content, found in (
        (None, "is missing"),
        (b"", "is damaged"),
        (b"rubbish" * 50, "is damaged (not an .npz file)"),
        (before["index.npz"][:-9], "is damaged"),
        ((tmp_path / "theirs.npy").read_bytes(), "is damaged (not an .npz file)"),
        ((tmp_path / "other.npz").read_bytes(), "has no checksums"),
    ):
        index.unlink()
        if content is not None:
            index.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            verify_shards(out)
        message = str(caught.value)
        assert message.startswith(f"{index} {found}") and message.endswith(
            "; run prepare-data again, it makes this file anew"
        )
        assert "\n" not in message and "pickle" not in message
        prepare_shards(source, out, 16, workers=0, images_per_shard=5)
        assert snapshot(out) == before and verify_shards(out) == 2


def test_shards_that_were_copied_keep_their_checksums(make_folder, tmp_path):
    prepare_shards(make_folder(30), tmp_path / "out", 16, workers=0, images_per_shard=10)
    (tmp_path / "out").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        os.utime(path, (5, 5))
    assert ImageTars(tmp_path / "moved").index.crc32 is not None


def test_outdirs_of_other_arguments_are_refused(make_folder, tmp_path):
    source, out = make_folder(12), tmp_path / "out"
    prepare_shards(source, out, 16, workers=0, images_per_shard=5)
    before = snapshot(out)
    for options, message in (
        ({"image_size": 8}, "image_size 16, wanted 8"),
        ({"images_per_shard": 6}, "images_per_shard 5, wanted 6"),
        ({"format": "jpeg"}, "format png, wanted jpeg"),
        ({"seed": 1}, "seed 0, wanted 1"),
        ({"images_per_shard": 0}, "got 0, 0, wanted at least 1"),
        ({"format": "gif"}, "got gif, 95"),
        ({"quality": 101}, "got png, 101"),
        ({"workers": -1}, "got 16, -1"),
    ):
        arguments = {"image_size": 16, "workers": 0, "images_per_shard": 5} | options
        with pytest.raises(ValueError, match=message):
            prepare_shards(source, out, **arguments)
    with pytest.raises(ValueError, match="layout shards, wanted folder"):
        prepare_folder(source, out, 16, workers=0)
    with pytest.raises(ValueError, match="is or lies in the source"):
        prepare_shards(source, source / "new", 16, workers=0)
    (source / "class0" / "000.png").rename(source / "class0" / "renamed.png")
    with pytest.raises(ValueError, match="with other images than"):
        prepare_shards(source, out, 16, workers=0, images_per_shard=5)
    assert snapshot(out) == before
    prepare_folder(source, tmp_path / "folder", 16, workers=0)
    with pytest.raises(ValueError, match="layout folder, wanted shards"):
        prepare_shards(source, tmp_path / "folder", 16, workers=0)
