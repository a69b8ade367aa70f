import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from epg_fast.__main__ import main
from epg_fast.data import (
    DataError,
    ImageFolder,
    center_crop,
    open_images,
    prepare,
    prepare_folder,
    prepare_shards,
    shards,
)


def snapshot(root):
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("prepare_images", [prepare_folder, prepare_shards])
def test_labels_of_a_dataset_json_survive(tmp_path, prepare_images):
    wanted, root = {}, tmp_path / "edm"
    (root / "00000").mkdir(parents=True)
    for i, label in enumerate((10, 2, 0, 2)):
        Image.new("RGB", (8, 8), (20 * i, label, 7)).save(root / "00000" / f"img{i:08d}.png")
        wanted[20 * i, label, 7] = label
    names = [f"00000/img{i:08d}.png" for i in range(4)]
    (root / "dataset.json").write_text(json.dumps({"labels": list(zip(names, wanted.values(), strict=True))}))
    prepare_images(root, tmp_path / "out", 8, workers=0)
    images = open_images(tmp_path / "out")
    found = {images.load(i).getpixel((0, 0)): int(images.labels[i]) for i in range(len(images))}
    assert found == wanted and len(images.classes) == 11


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_becomes_its_centre_crop(make_folder, tmp_path, workers):
    source = make_folder(20, size=(50, 37), suffix=".JPG")
    (source / "class0" / "deep").mkdir()
    (source / "class0" / "000.JPG").rename(source / "class0" / "deep" / "first.one.jpeg")
    (source / "an_empty_class").mkdir()
    out = tmp_path / "out"
    manifest = prepare_folder(source, out, 16, workers=workers)
    before, after = ImageFolder(source), ImageFolder(out)
    assert after.paths == [os.path.splitext(path)[0] + ".png" for path in before.paths]
    assert after.classes == before.classes and after.labels == before.labels
    for i in range(len(before)):
        np.testing.assert_array_equal(np.asarray(after.load(i)), np.asarray(center_crop(before.load(i), 16)))
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["counts"] == {"an_empty_class": 0, "class0": 7, "class1": 7, "class2": 6}
    assert manifest["complete"] and manifest["image_size"] == 16 and manifest["source"] == str(source)
    assert manifest["bad_files"] == {} and manifest["class_frequencies"] == [0, 0.35, 0.35, 0.3]


def test_a_second_run_makes_only_what_is_missing(make_folder, tmp_path):
    source, out = make_folder(20), tmp_path / "out"
    prepare_folder(source, out, 16, workers=0)
    complete = snapshot(out)
    (out / "class1" / "001.png").unlink()
    (out / "class1" / ".001.png.99.tmp").write_bytes(b"half a file")
    prepare_folder(source, out, 16, workers=0)
    again = snapshot(out)
    assert again.keys() == complete.keys()
    changed = {path for path in again if again[path] != complete[path]}
    assert changed == {"class1/001.png", "manifest.json"}
    assert again["class1/001.png"][0] == complete["class1/001.png"][0]


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_a_killed_run_leaves_whole_files_only_and_no_processes_and_is_continued(make_folder, tmp_path, wait_until_gone):
    source, out = make_folder(300, size=(160, 120)), tmp_path / "out"
    program = "import sys; from epg_fast.data import prepare_folder; prepare_folder(sys.argv[1], sys.argv[2], 64, 2)"
    run = subprocess.Popen([sys.executable, "-c", program, str(source), str(out)], cwd=Path(__file__).parents[2])
    while len(list(out.rglob("*.png"))) < 20:
        assert run.poll() is None
        time.sleep(0.005)
    workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    run.kill()
    run.wait()
    assert len(workers) == 2 and not wait_until_gone(workers, 20)
    done = list(out.rglob("*.png"))
    assert len(done) < 300 and all(Image.open(path).convert("RGB").size == (64, 64) for path in done)
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    with pytest.raises(ValueError, match="prepare-data was interrupted; run it again"):
        ImageFolder(out)
    with pytest.raises(ValueError, match="images of image_size 64, wanted 32"):
        prepare_folder(source, out, 32, workers=0)
    assert prepare_folder(source, out, 64, workers=0)["complete"]
    assert len(ImageFolder(out)) == 300


def prepare_slowly(prepare_images, source, out, started, go):
    def wait(image, image_size, **options):
        started.set()
        assert go.wait(60)
        return encode(image, image_size, **options)

    encode, prepare.encode_crop, shards.encode_crop = prepare.encode_crop, wait, wait
    prepare_images(source, out, 16, workers=0)


@pytest.mark.skipif(sys.platform != "linux", reason="starts a process by fork")
@pytest.mark.parametrize("prepare_images", [prepare_folder, prepare_shards])
def test_a_second_run_in_one_outdir_is_refused_and_leaves_the_first_alone(make_folder, tmp_path, prepare_images):
    source, out = make_folder(6), tmp_path / "out"
    context = multiprocessing.get_context("fork")
    started, go = context.Event(), context.Event()
    first = context.Process(target=prepare_slowly, args=(prepare_images, source, out, started, go))
    first.start()
    try:
        assert started.wait(60)
        before = snapshot(out)
        with pytest.raises(ValueError, match=f"another prepare-data is writing to {out}; wait for it"):
            prepare_images(source, out, 16, workers=0)
        assert snapshot(out) == before
    finally:
        go.set()
        first.join()
    assert first.exitcode == 0 and len(open_images(out)) == 6
    (out / "manifest.json").write_text((out / "manifest.json").read_text().replace("true", "false"))
    assert prepare_images(source, out, 16, workers=0)["complete"]


def test_a_write_that_fails_leaves_the_old_file_and_no_crumbs(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(prepare.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare.write_atomically(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"old")]


def test_bad_files_are_left_out_and_named(make_folder, tmp_path):
    source, out = make_folder(100), tmp_path / "out"
    (source / "class2" / "005.png").write_bytes(b"")
    manifest = prepare_folder(source, out, 16, workers=2)
    assert list(manifest["bad_files"]) == ["class2/005.png"] and manifest["counts"]["class2"] == 32
    assert len(ImageFolder(out)) == 99 and not (out / "class2" / "005.png").exists()


def test_over_one_percent_of_bad_files_is_an_error_after_the_work(make_folder, tmp_path):
    source, out = make_folder(100), tmp_path / "out"
    for name in ("002", "005"):
        (source / "class2" / f"{name}.png").write_text("text")
    with pytest.raises(DataError, match=r"2 of 100 images \(2.00%\).*class2/002.png.*class2/005.png"):
        prepare_folder(source, out, 16, workers=0)
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["bad_files"]) == 2 and not manifest["complete"] and len(list(out.rglob("*.png"))) == 98
    with pytest.raises(ValueError, match="could not decode 2 images"):
        ImageFolder(out)
    Image.new("RGB", (20, 20)).save(source / "class2" / "002.png")
    Image.new("RGB", (20, 20)).save(source / "class2" / "005.png")
    assert prepare_folder(source, out, 16, workers=0)["complete"]


@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_the_flag_that_too_many_bad_files_name_makes_the_output_complete(make_folder, tmp_path, capsys, layout):
    source, out = make_folder(60), tmp_path / "out"
    for path in sorted(source.glob("class1/*")):
        path.write_text("text")
    command = ["prepare-data", "--source", str(source), "--outdir", str(out), "--layout", layout]
    command += ["--image_size", "16", "--workers", "0"]
    assert main(command) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "20 of 60 images (33.33%)" in message and "data." not in message and "elete" not in message
    flag = re.search(r"--max_bad_fraction \S+(?=;)", message)[0].split()
    with pytest.raises(ValueError, match="could not decode 20 images.*--max_bad_fraction"):
        open_images(out)
    assert main(command + flag) == 0
    assert len(open_images(out)) == 40 and len(json.loads((out / "manifest.json").read_text())["bad_files"]) == 20


def test_no_share_of_bad_files_makes_an_output_without_images(make_folder, tmp_path):
    source = make_folder(3)
    for path in source.glob("*/*"):
        path.write_text("text")
    with pytest.raises(DataError, match="3 of 3 images.*Restore these files; then"):
        prepare_folder(source, tmp_path / "out", 16, workers=0, max_bad_fraction=1.0)


@pytest.mark.parametrize("prepare_images", [prepare_folder, prepare_shards])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_machine_ends_the_work_and_leaves_no_image_out(
    make_folder, tmp_path, monkeypatch, prepare_images, workers
):
    source, out = make_folder(20), tmp_path / "out"

    def read(folder, i, real=ImageFolder.read):
        if i == 7:
            raise OSError(23, os.strerror(23))
        return real(folder, i)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot read .*open files in system.*again"):
        patch.setattr(ImageFolder, "read", read)
        prepare_images(source, out, 16, workers=workers)
    assert not json.loads((out / "manifest.json").read_text())["bad_files"]
    assert prepare_images(source, out, 16, workers=0)["complete"] and len(open_images(out)) == 20


def test_training_on_an_output_that_lost_or_gained_files_is_refused(make_folder, tmp_path):
    source, out = make_folder(9), tmp_path / "out"
    prepare_folder(source, out, 16, workers=0)
    content = (out / "class1" / "001.png").read_bytes()
    (out / "class1" / "001.png").unlink()
    with pytest.raises(ValueError, match="has 2 images of class 'class1', wanted 3 by manifest.json"):
        ImageFolder(out)
    prepare_folder(source, out, 16, workers=0)
    assert len(ImageFolder(out)) == 9
    (out / "class9").mkdir()
    (out / "class9" / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match="has 1 images of class 'class9', wanted none"):
        ImageFolder(out)


def test_somebody_elses_manifest_is_warned_about_and_ignored(make_folder, caplog):
    source = make_folder(9)
    for content in ('{"complete": false}', '{"one": 1}\n{"two": 2}\n', "[1]"):
        (source / "manifest.json").write_text(content)
        caplog.clear()
        assert len(ImageFolder(source)) == 9 and "was not written by prepare-data" in caplog.text


def test_a_manifest_that_was_cut_off_is_refused_with_a_remedy(make_folder, tmp_path):
    source, out = make_folder(9), tmp_path / "out"
    prepare_folder(source, out, 16, workers=0)
    text = (out / "manifest.json").read_text()
    for size in (0, 1, 20, 300, len(text) - 3):
        (out / "manifest.json").write_text(text[:size])
        for use in (ImageFolder, lambda out: prepare_folder(source, out, 16, workers=0)):
            with pytest.raises(
                ValueError, match="manifest.json is damaged: it is no JSON.*; restore it, or prepare the"
            ):
                use(out)
    (out / "manifest.json").write_text(text.replace("true", "1"))
    with pytest.raises(ValueError, match="is damaged: it has complete 1, wanted bool; restore it"):
        ImageFolder(out)
    (out / "manifest.json").write_text(text)
    assert len(ImageFolder(out)) == 9


def test_two_files_that_would_share_a_name_are_an_error_before_any_work(make_folder, tmp_path):
    source, out = make_folder(6), tmp_path / "out"
    Image.new("RGB", (20, 20)).save(source / "class0" / "000.jpg")
    with pytest.raises(ValueError, match="class0/000.jpg and class0/000.png would both become class0/000.png"):
        prepare_folder(source, out, 16, workers=0)
    assert not out.exists()


def test_tars_as_the_source_of_a_folder_point_to_shards(make_folder, tmp_path):
    source, tars = make_folder(6), tmp_path / "tars"
    prepare_shards(source, tars, 16, workers=0)
    for path, kind in ((tars, "is a folder of tars"), (tars / "shard-000000.tar", "is a file")):
        with pytest.raises(ValueError, match=f"source: {path} {kind}, wanted .*; unpack it, or use --layout shards"):
            prepare_folder(path, tmp_path / "out", 16, workers=0)
    with pytest.raises(ValueError, match="missing does not exist"):
        prepare_folder(tmp_path / "missing", tmp_path / "out", 16, workers=0)
    assert not (tmp_path / "out").exists()
    # a tar beside class folders is left out, as ever
    (source / "more.tar").write_bytes(b"")
    assert prepare_folder(source, tmp_path / "out", 16, workers=0)["complete"]


def test_outdirs_that_could_do_harm_are_refused(make_folder, tmp_path):
    source = make_folder(6)
    before = snapshot(source)
    link = tmp_path / "link"
    link.symlink_to(source)
    for outdir in (source, source / "class0", link / "new"):
        with pytest.raises(ValueError, match="is or lies in the source"):
            prepare_folder(source, outdir, 16, workers=0)
    assert snapshot(source) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("work of years")
    with pytest.raises(ValueError, match="is not empty and has no manifest.json"):
        prepare_folder(source, mine, 16, workers=0)
    (mine / "manifest.json").write_text('{"image_size": 16}')
    with pytest.raises(ValueError, match="not a manifest of prepared images"):
        prepare_folder(source, mine, 16, workers=0)
    with pytest.raises(ValueError, match="is a file"):
        prepare_folder(source, mine / "thesis.tex", 16, workers=0)
    with pytest.raises(ValueError, match="wanted at least 1"):
        prepare_folder(source, tmp_path / "new", 0, workers=0)


def test_another_source_is_refused_but_a_source_that_moved_is_not(make_folder, tmp_path):
    source, out = make_folder(6), tmp_path / "out"
    prepare_folder(source, out, 16, workers=0)
    with pytest.raises(ValueError, match="was made from .*images, not from .*others"):
        prepare_folder(make_folder(9, name="others"), out, 16, workers=0)
    source.rename(tmp_path / "moved")
    assert prepare_folder(tmp_path / "moved", out, 16, workers=0)["complete"]
