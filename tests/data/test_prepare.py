"""prepare-data: centre crops as a folder or as shards, what happens when it is interrupted, what is refused."""

import hashlib
import io
import json
import multiprocessing
import os
import re
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from epg_fast.__main__ import main
from epg_fast.data import (
    DataError,
    ImageFolder,
    ImageTars,
    center_crop,
    open_images,
    prepare_folder,
    prepare_shards,
    verify_shards,
)
from epg_fast.data.prepare import crops
from tests.commands import held_by_another_process, snapshot
from tests.data.conftest import left_of, linux
from tests.data.images import encode, noise, open_loader, pack, png, refused, touch

LAYOUTS = {"folder": prepare_folder, "shards": prepare_shards}


@pytest.fixture(params=LAYOUTS)
def prepare(request):
    """prepare_folder or prepare_shards, with images of 16 x 16 from this process."""

    def run(source, outdir, image_size=16, workers=0, **options):
        if request.param == "shards":
            options = {"images_per_shard": 10, **options}
        return LAYOUTS[request.param](source, outdir, image_size, workers=workers, **options)

    run.layout = request.param
    return run


def times(root, pattern="*"):
    return {path: path.stat().st_mtime_ns for path in root.rglob(pattern) if path.is_file()}


def uncomplete(out):
    (out / "manifest.json").write_text((out / "manifest.json").read_text().replace("true", "false"))


# what is written


def crop(images, i):
    return np.asarray(center_crop(images.load(i), 16))


@pytest.fixture
def source(make_folder):
    """50 images in three classes, one of them deeper and with dots in its name, and a class without any."""
    root = make_folder(50, size=(50, 37), suffix=".JPG")
    (root / "class9").mkdir()
    (root / "class0" / "deep").mkdir()
    (root / "class0" / "000.JPG").rename(root / "class0" / "deep" / "first.one.jpeg")
    return ImageFolder(root)


def test_every_image_becomes_its_centre_crop(source, tmp_path, prepare):
    out = tmp_path / "out"
    manifest = prepare(source.root, out, workers=2)
    assert manifest == json.loads((out / "manifest.json").read_text())
    wanted = {"complete": True, "image_size": 16, "source": str(source.root), "bad_files": {}}
    wanted |= {"source_fingerprint": source.fingerprint(), "class_frequencies": [0.34, 0.34, 0.32, 0.0]}
    wanted |= {"counts": {"class0": 17, "class1": 17, "class2": 16, "class9": 0}}
    assert manifest.items() >= wanted.items()
    images = open_images(out)
    assert images.classes == source.classes and len(images) == 50
    if prepare.layout == "folder":
        assert images.paths == [os.path.splitext(path)[0] + ".png" for path in source.paths]
        places = range(50)
    else:
        places = [int(Path(path).stem) for path in images.paths]
    for i, place in enumerate(places):
        np.testing.assert_array_equal(np.asarray(images.load(i)), crop(source, place))
        assert images.labels[i] == source.labels[place]


def test_shards_are_mixed_tars_of_images_and_labels_with_checksums(source, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    options = {"workers": 0, "images_per_shard": 20}
    manifest = prepare_shards(source.root, out, 16, seed=1, **options)
    names = [f"shard-00000{i}.tar" for i in range(3)]
    assert sorted(path.name for path in out.iterdir()) == [".lock", "index.npz", "manifest.json", *names]
    images, seen = open_images(out), []
    for shard in manifest["shards"]:
        content = (out / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        with tarfile.open(out / shard["name"]) as tar:
            members = tar.getmembers()
            assert all((m.mtime, m.uid, m.gid, m.uname, m.gname) == (0, 0, 0, "", "") for m in members)
            assert [m.name[8:] for m in members] == [".png", ".cls"] * shard["images"]
            for image, label in zip(members[::2], members[1::2], strict=True):
                position, content = len(seen), tar.extractfile(image).read()
                assert int(tar.extractfile(label).read()) == images.labels[position]
                assert images.paths[position] == f"{shard['name']}/{image.name}"
                assert images.read(position) == content and images.index.crc32[position] == zlib.crc32(content)
                seen.append(int(image.name[:8]))
    assert sorted(seen) == list(range(50)) and [shard["images"] for shard in manifest["shards"]] == [20, 20, 10]
    assert len({source.labels[i] for i in seen[:20]}) == 3
    # another seed mixes them otherwise; JPEG keeps the chroma, 4:4:4
    prepare_shards(source.root, other, 16, seed=2, format="jpeg", quality=60, **options)
    images = open_images(other)
    again = [int(Path(path).stem) for path in images.paths]
    assert again != seen and sorted(again) == sorted(seen)
    image = Image.open(io.BytesIO(images.read(0)))
    assert image.format == "JPEG" and [component[1:3] for component in image.layer] == [(1, 1)] * 3
    assert image.quantization == Image.open(io.BytesIO(encode(noise(16, 16), "JPEG", quality=60))).quantization
    assert np.abs(np.asarray(image).astype(int) - crop(source, again[0])).mean() < 30


LABELS = [10, 2, 0, 2]
NAMES = ["tench, Tinca tinca", "goldfish", "a/b"]  # not sorted, and one is no name of a folder


def write_edm(root, images):
    names = [f"00000/img{i:08d}.png" for i in range(4)]
    for name, content in zip(names, images, strict=True):
        touch(root, name, content=content)
    labels = {"labels": list(zip(names, LABELS, strict=True))}
    touch(root, "dataset.json", content=json.dumps(labels).encode())
    return [f"{i:02d}" for i in range(11)], LABELS


def write_class_tars(root, images):
    for label, name in enumerate("ab"):
        pack(root / f"{name}.tar", {f"{name}_{i}.png": images[2 * label + i] for i in range(2)})
    return ["a", "b"], [0, 0, 1, 1]


def write_shards(root, images):
    for i, (content, label) in enumerate(zip(images, LABELS, strict=True)):
        pack(root / f"x-{i}.tar", {f"{i}.png": content, f"{i}.cls": b"%d" % label})
    return [str(i) for i in range(11)], LABELS


def write_parquet(root, images):
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import table, write

    write(root / "x.parquet", table(images, [2, 1, 0, 1], names=NAMES), row_group_size=2)
    return NAMES, [2, 1, 0, 1]


@pytest.mark.parametrize("write", [write_edm, write_class_tars, write_shards, write_parquet])
def test_any_dataset_can_be_prepared_and_keeps_its_labels_and_names(tmp_path, prepare, write):
    colours = [(20 * i, i, 7) for i in range(4)]
    classes, labels = write(tmp_path / "in", [encode(Image.new("RGB", (8, 8), colour)) for colour in colours])
    for _ in range(2):
        manifest = prepare(tmp_path / "in", tmp_path / "out", 8)
    prepare(tmp_path / "out", tmp_path / "again", 8)
    for path in ("in", "out", "again"):
        images = open_images(tmp_path / path)
        found = {images.load(i).getpixel((0, 0)): int(images.labels[i]) for i in range(len(images))}
        assert found == dict(zip(colours, labels, strict=True)) and images.classes == classes
    assert list(manifest["counts"].values()) == [labels.count(i) for i in range(len(classes))]


# interruptions


@linux
def test_a_killed_run_leaves_whole_files_only_and_no_processes_and_is_continued(
    make_folder, tmp_path, prepare, monkeypatch
):
    source, out = make_folder(100), tmp_path / "out"
    (source / "class1" / "040.png").write_bytes(b"bad")
    pattern, whole = {"folder": ("*.png", 99), "shards": ("*.tar", 10)}[prepare.layout]
    with monkeypatch.context() as slowly:
        read = ImageFolder.read
        slowly.setattr(ImageFolder, "read", lambda folder, i: time.sleep(0.01) or read(folder, i))
        run = multiprocessing.get_context("fork").Process(target=prepare, args=(source, out, 16, 2))
        run.start()
    while len(list(out.rglob(pattern))) < 3:
        assert run.is_alive()
        time.sleep(0.002)
    workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    run.kill()
    run.join()
    assert len(workers) == 2 and not left_of(workers)
    done = times(out, pattern)
    assert 3 <= len(done) < whole
    touch(next(iter(done)).parent, f".{next(iter(done)).name}.99.tmp", content=b"half a file")
    for use in (open_images, verify_shards)[: 1 + (prepare.layout == "shards")]:
        refused(out, "prepare-data was interrupted; run it again", use=use)
    assert prepare(source, out, workers=2)["bad_files"].keys() == {"class1/040.png"}
    prepare(source, tmp_path / "whole")
    assert snapshot(out) == snapshot(tmp_path / "whole")  # bit for bit, and nothing else
    kept = sum(times(out, pattern)[path] == time for path, time in done.items())
    assert kept >= len(done) - 1  # a shard with a bad file is made again


def edit(out, change):
    """Write a shard again with other members, as if the run had been killed afterwards."""
    with tarfile.open(out / "shard-000001.tar") as tar:
        members = change({member.name: tar.extractfile(member).read() for member in tar})
    pack(out / "shard-000001.tar", members, tarfile.USTAR_FORMAT)
    uncomplete(out)


LOSSES = {
    "shard": lambda out: (out / "shard-000001.tar").unlink(),
    "index": lambda out: (out / "index.npz").unlink(),
    "damaged index": lambda out: (out / "index.npz").write_bytes(b"PK"),
    "complete": uncomplete,
    "emptied": lambda out: (out / "shard-000001.tar").write_bytes(b""),
    "cut": lambda out: (out / "shard-000001.tar").write_bytes((out / "shard-000001.tar").read_bytes()[:-11000]),
    "swapped": lambda out: os.replace(out / "shard-000000.tar", out / "shard-000001.tar"),
    "label": lambda out: edit(out, lambda m: m | {next(name for name in m if ".cls" in name): b"7"}),
    "member": lambda out: edit(out, lambda m: m | {"more.png": b""}),
    "image": lambda out: edit(out, lambda m: dict(list(m.items())[2:])),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_whatever_shards_have_lost_is_refused_and_made_again(make_folder, tmp_path, loss):
    source, out = make_folder(30), tmp_path / "out"
    prepare_shards(source, out, 16, workers=0, images_per_shard=10)
    before = snapshot(out)
    LOSSES[loss](out)
    for use in (open_images, verify_shards):
        refused(out, "run (it|prepare-data) again", use=use)
    prepare_shards(source, out, 16, workers=0, images_per_shard=10)
    assert snapshot(out) == before and verify_shards(out) == 3


def test_a_second_run_in_one_outdir_is_refused_and_leaves_the_first_alone(make_folder, tmp_path, prepare):
    source, out = make_folder(6), tmp_path / "out"
    prepare(source, out)
    uncomplete(out)
    before = snapshot(out)
    with held_by_another_process(out):
        with pytest.raises(ValueError, match=f"another prepare-data is at work in {out}; wait for it"):
            prepare(source, out)
        assert snapshot(out) == before
    assert prepare(source, out)["complete"]


# bad files and errors of the machine


def test_an_error_of_the_machine_ends_the_work_and_leaves_no_image_out_and_no_half_file(
    make_folder, tmp_path, monkeypatch, prepare
):
    source, out = make_folder(20), tmp_path / "out"

    def read(folder, i, real=ImageFolder.read):
        if i == 7:
            raise OSError(23, os.strerror(23))
        return real(folder, i)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
        patch.setattr(os, "fsync", full)
        patch.setattr(crops, "write_atomically", full)
        prepare(source, out, workers=1)
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [".lock", "manifest.json"]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot read .*open files in system.*again"):
        patch.setattr(ImageFolder, "read", read)
        prepare(source, out, workers=1)
    assert not json.loads((out / "manifest.json").read_text())["bad_files"] and not list(out.rglob(".*.tmp"))
    assert prepare(source, out)["complete"] and len(open_images(out)) == 20


def test_bad_files_are_left_out_and_named_until_they_are_mended(make_folder, tmp_path, prepare):
    source, out = make_folder(100), tmp_path / "out"
    good = (source / "class2" / "005.png").read_bytes()
    (source / "class2" / "005.png").write_bytes(b"")
    manifest = prepare(source, out, workers=2)
    reason = "UnidentifiedImageError: not a PNG, JPEG, WEBP, BMP or GIF image"
    assert manifest["bad_files"] == {"class2/005.png": reason} and manifest["counts"]["class2"] == 32
    assert len(open_images(out)) == 99 and prepare(source, out) == manifest
    (source / "class2" / "005.png").write_bytes(good)
    assert prepare(source, out)["bad_files"] == {}
    prepare(source, tmp_path / "fresh")
    assert len(open_images(out)) == 100 and snapshot(out) == snapshot(tmp_path / "fresh")


def test_too_many_bad_files_are_an_error_after_the_work_whose_flag_makes_it_complete(
    make_folder, tmp_path, capsys, prepare
):
    source, out = make_folder(60), tmp_path / "out"
    for path in sorted(source.glob("class1/*")):
        path.write_text("text")
    command = ["prepare-data", "--source", source, "--outdir", out, "--layout", prepare.layout]
    command += ["--image_size", "16", "--workers", "0"]
    assert main([str(word) for word in command]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "20 of 60 images (33.33%)" in message and "class1/" in message
    assert "data." not in message and "elete" not in message
    flag = re.search(r"--max_bad_fraction \S+(?=;)", message)[0].split()
    refused(out, "could not decode 20 images.*--max_bad_fraction")
    assert main([str(word) for word in [*command, *flag]]) == 0
    assert len(open_images(out)) == 40 and len(json.loads((out / "manifest.json").read_text())["bad_files"]) == 20
    for path in source.glob("*/*"):
        path.write_text("text")
    with pytest.raises(DataError, match="60 of 60 images.*Restore these files; then"):
        prepare(source, tmp_path / "none", max_bad_fraction=1.0)


def test_a_wrong_checksum_is_a_bad_file_for_the_loader(make_folder, tmp_path):
    out = tmp_path / "out"
    prepare_shards(make_folder(40), out, 16, workers=0, images_per_shard=25)
    shard, index = out / "shard-000001.tar", open_images(out).index
    content = bytearray(shard.read_bytes())
    content[int(index.offset[30]) + 40] ^= 1
    shard.write_bytes(content)
    refused(out, "shard-000001.tar is damaged: its SHA-256", use=verify_shards)
    source = open_images(out.rename(tmp_path / "moved"))
    with pytest.raises(OSError, match="checksum of shard-000001.tar/.*png .* differs"):
        source.read(30)
    with open_loader(source, max_bad_fraction=0.1) as loader:
        assert not any(30 in next(loader)["index"] for _ in range(5))
        assert (
            list(loader.bad_files) == [source.paths[30]] and "OSError: checksum" in loader.bad_files[source.paths[30]]
        )


# what training refuses


def test_training_on_a_folder_that_lost_or_gained_files_is_refused(make_folder, tmp_path):
    source, out = make_folder(9), tmp_path / "out"
    prepare_folder(source, out, 16, workers=0)
    content = (out / "class1" / "001.png").read_bytes()
    (out / "class1" / "001.png").unlink()
    refused(out, "has 2 images of class 'class1', wanted 3 by manifest.json", use=ImageFolder)
    prepare_folder(source, out, 16, workers=0)
    assert len(ImageFolder(out)) == 9
    touch(out, "class9/x.png", content=content)
    refused(out, "has 1 images of class 'class9', wanted none", use=ImageFolder)


def test_somebody_elses_manifest_is_warned_about_and_ignored(make_folder, tmp_path, caplog):
    source = make_folder(9)
    pack(tmp_path / "tars" / "a.tar", {"0.png": png(0), "0.cls": b"0"})
    for content in ('{"complete": false}', "[1]"):
        for path, count in ((source, 9), (tmp_path / "tars", 1)):
            caplog.clear()
            (path / "manifest.json").write_text(content)
            assert len(open_images(path)) == count and "was not written by prepare-data" in caplog.text


def test_a_manifest_that_was_cut_edited_or_deleted_is_refused_with_a_remedy(make_folder, tmp_path, prepare):
    source, out = make_folder(9), tmp_path / "out"
    manifest = prepare(source, out)
    text, file = (out / "manifest.json").read_text(), out / "manifest.json"
    restore, again = "restore it, or prepare the images again", "run prepare-data again"
    cases = [(text[:n], "is damaged: it is no JSON", "move it away if it is of") for n in (0, 20, len(text) - 3)]
    cases += [
        (manifest | {key: value}, f"is damaged: {key} is {value!r}, wanted", restore)
        for key, value in (("counts", None), ("complete", "yes"), ("classes", 3), ("bad_files", None))
    ]
    if prepare.layout == "shards":
        cases += [
            (manifest | {"shards": None}, "is damaged: shards is None, wanted list", restore),
            (manifest | {"shards": []}, "shard-000000.tar has .* bytes, wanted no", again),
            (manifest | {"layout": "folder"}, "has tars, but its manifest.json says layout 'folder'", ""),
            (manifest | {"index_sha256": "0"}, "index.npz is missing or not the one", again),
            ({"shards": []}, "index.npz of prepare-data but not its manifest.json", "restore it, prepare the images"),
            (None, "index.npz of prepare-data but not its manifest.json; restore it", "delete index.npz to read"),
        ]
    for content, found, remedy in cases:
        file.unlink()
        if content is not None:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        refused(out, found, remedy)
        file.write_text(text)
    if prepare.layout == "shards":
        for path in out.iterdir():  # as a copy
            os.utime(path, (5, 5))
        assert ImageTars(out).index.crc32 is not None
        # nothing is left to tell: WebDataset shards like any other
        for name in ("index.npz", "manifest.json"):
            (out / name).unlink()
        assert open_images(out).classes == ["0", "1", "2"]


# what prepare-data refuses


def test_outdirs_that_could_do_harm_are_refused_untouched(make_folder, tmp_path, prepare):
    source, mine, new = make_folder(6), tmp_path / "mine", tmp_path / "new"
    (tmp_path / "link").symlink_to(source)
    touch(mine, "thesis.tex", content=b"work of years")
    touch(tmp_path, "other/manifest.json", content=b'{"image_size": 16}')
    before = snapshot(tmp_path)
    for images, outdir, size, message in (
        (source, source, 16, "is or lies in the source"),
        (source, source / "class0", 16, "is or lies in the source"),
        (source, tmp_path / "link" / "new", 16, "is or lies in the source"),
        (source, mine, 16, "is not empty and not a folder of prepare-data"),
        (source, tmp_path / "other", 16, "it was not written by prepare-data"),
        (source, mine / "thesis.tex", 16, "is a file"),
        (source, new, 0, "wanted at least 1"),
        (tmp_path / "missing", new, 16, "missing does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(images, outdir, size)
    if prepare.layout == "folder":
        noise(20, 20).save(source / "class0" / "000.jpg")
        with pytest.raises(ValueError, match="class0/000.jpg and class0/000.png would both become class0/000.png"):
            prepare(source, new)
        (source / "class0" / "000.jpg").unlink()
    assert snapshot(tmp_path) == before and not new.exists()


def test_outputs_of_other_images_or_arguments_are_refused(make_folder, tmp_path, prepare):
    source, out = make_folder(12), tmp_path / "out"
    prepare(source, out)
    before = snapshot(out)
    cases = [({"image_size": 8}, "image_size was 16, now 8"), ({"workers": -1}, "got 16, -1")]
    if prepare.layout == "shards":
        cases += [
            ({"images_per_shard": 6}, "images_per_shard was 10, now 6"),
            ({"format": "jpeg"}, "format was 'png', now 'jpeg'"),
            ({"seed": 1}, "seed was 0, now 1"),
            ({"images_per_shard": 0}, "got 0, 0, wanted at least 1"),
            ({"format": "gif"}, "got gif, 95"),
            ({"quality": 101}, "got png, 101"),
        ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            prepare(source, out, **options)
    with pytest.raises(ValueError, match="source was '.*images', now '.*others'; source_fingerprint was"):
        prepare(make_folder(9, name="others"), out)
    other = LAYOUTS["folder" if prepare.layout == "shards" else "shards"]
    with pytest.raises(ValueError, match=f"layout was '{prepare.layout}', now"):
        other(source, out, 16, workers=0)
    assert snapshot(out) == before
    # a source that moved is the same
    moved = source.rename(tmp_path / "moved")
    assert prepare(moved, out)["complete"]
    # one that grew gives a folder the crops that it lacks, but shards are mixed anew
    noise(20, 20).save(moved / "class0" / "new.png")
    if prepare.layout == "shards":
        with pytest.raises(ValueError, match="source_fingerprint was"):
            prepare(moved, out)
    else:
        assert prepare(moved, out)["counts"]["class0"] == 5
