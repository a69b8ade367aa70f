import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.data import DataError, ImageFolder, ImageTars, PillowLoader, open_images, prepare_shards, tars


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "epg_fast"


def png(seed, size=(12, 10)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path, members, format=tarfile.PAX_FORMAT):
    """Write {name: content} as the tar `path`, with Python's tarfile.

    A str is the target of a symbolic link, or of a hard one behind "hard:"; None is a directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                hard = content.startswith("hard:")
                info.type = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
                info.linkname = content.removeprefix("hard:")
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def samples(first, count, extension="png", classes=3):
    members = {}
    for i in range(first, first + count):
        members[f"{i:04d}.{extension}"] = png(i)
        members[f"{i:04d}.cls"] = str(i % classes).encode()
    return members


def contents(source):
    return {path: source.read(i) for i, path in enumerate(source.paths)}


# layouts


def test_webdataset_shards_are_read_as_pythons_tarfile_reads_them(tmp_path):
    root = tmp_path / "shards"
    pack(root / "b-000001.tar", samples(10, 5, "JPEG") | {"0010.json": b'{"label": 9}'})
    # the label may come first, or in another order, and everything may lie in folders
    pack(
        root / "b-000000.tar",
        dict(reversed((samples(0, 4) | {"./deep/x y.webp": png(99), "deep/x y.cls": b" 2\n"}).items())),
    )
    (root / "notes.txt").write_text("not a tar")
    source = open_images(root)
    assert isinstance(source, ImageTars) and source.classes == ["0", "1", "2"] and source.root == root
    expected, labels = {}, []
    for name in ("b-000000.tar", "b-000001.tar"):
        with tarfile.open(root / name) as tar:
            read = {member.name.removeprefix("./"): tar.extractfile(member).read() for member in tar}
        for member, content in read.items():
            if not member.endswith((".cls", ".json")):
                expected[f"{name}/{member}"] = content
                labels.append(int(read[os.path.splitext(member)[0] + ".cls"]))
    assert list(source.paths) == list(expected) == [source.paths[i] for i in range(len(source))]
    assert contents(source) == expected
    assert source.labels.dtype == np.int64 and source.labels.tolist() == labels
    np.testing.assert_array_equal(
        np.asarray(source.load(0)), np.asarray(Image.open(io.BytesIO(expected[source.paths[0]])).convert("RGB"))
    )
    with pytest.raises(IndexError):
        source.paths[len(source)]
    assert source.paths[-1] == list(expected)[-1]


def test_a_single_shard_and_a_class_without_images(tmp_path):
    path = pack(tmp_path / "one.tar", {"a.png": png(0), "a.cls": b"0", "b.png": png(1), "b.cls": b"3"})
    source = open_images(path)
    assert source.classes == ["0", "1", "2", "3"] and source.labels.tolist() == [0, 3]
    assert list(source.paths) == ["one.tar/a.png", "one.tar/b.png"] and (source.root / source.paths[0]).parent == path


def imagenet(root):
    """The same six images as class tars, as a tar of class tars and as class folders."""
    names = {
        "n02": ["n02_1.JPEG", "n02_10.JPEG"],
        "n01": ["n01_7.JPEG"],
        "n03": ["n03_1.JPEG", "n03_2.JPEG", "n03_4.JPEG"],
    }
    members = {}
    for label, (name, files) in enumerate(names.items()):
        images = {file: png(10 * label + i) for i, file in enumerate(files)}
        members[f"{name}.tar"] = pack(root / "classes" / f"{name}.tar", images).read_bytes()
        for file, content in images.items():
            (root / "folder" / name).mkdir(parents=True, exist_ok=True)
            (root / "folder" / name / file).write_bytes(content)
    pack(root / "nested" / "ILSVRC2012_img_train.tar", members)
    return ImageFolder(root / "folder")


def test_a_tar_per_class_as_imagenets(tmp_path):
    folder, source = imagenet(tmp_path), open_images(tmp_path / "classes")
    assert source.classes == folder.classes == ["n01", "n02", "n03"] and source.labels.tolist() == folder.labels
    assert contents(source) == {path.replace("/", ".tar/"): content for path, content in contents(folder).items()}


@pytest.mark.parametrize("path", ["nested", "nested/ILSVRC2012_img_train.tar"])
def test_the_tar_of_class_tars_is_read_without_unpacking(tmp_path, path):
    folder, source = imagenet(tmp_path), open_images(tmp_path / path)
    assert source.classes == folder.classes and source.labels.tolist() == folder.labels
    prefix = "ILSVRC2012_img_train.tar/"
    assert contents(source) == {
        prefix + path.replace("/", ".tar/"): content for path, content in contents(folder).items()
    }


@pytest.mark.parametrize(
    "tars",
    [
        {f"x-{i:05d}.tar": [f"{i}.png"] for i in range(3)},
        {"cc3m-train-0001.tar": ["a.jpg"], "cc3m-train-0002.tar": ["b.jpg"]},
        {"0.tar": ["a.jpg"], "7.TAR": ["b.jpg"]},
        {"data-1-of-2.tar": ["data/a.png"], "data-2-of-2.tar": ["data/b.png"]},
        # img2dataset: a key begins with its shard's number, captions lie beside the images
        {"00000.tar": ["000000001.jpg", "000000001.txt"], "00003.tar": ["000030001.jpg", "000030001.json"]},
        {"east.tar": ["a.jpg", "a.txt"], "west.tar": ["b.jpg", "b.txt"]},
    ],
    ids=lambda tars: next(iter(tars)),
)
def test_shards_without_labels_are_one_class_and_no_classes(tmp_path, tars, caplog):
    for name, members in tars.items():
        pack(tmp_path / name, {member: png(0) if member.endswith("g") else b"{}" for member in members})
    for _ in range(2):
        # the second time from the index
        caplog.clear()
        source = open_images(tmp_path)
        assert source.classes == ["all"] and set(source.labels.tolist()) == {0} and len(source) == len(tars)
        assert caplog.text.count("no image has a label: one class, 'all'") == 1
    assert open_images(tmp_path / next(iter(tars))).classes == ["all"]


@pytest.mark.parametrize(
    "tars",
    [
        {"n01440764.tar": ["n01440764_18.JPEG", "n01440764_36.JPEG"], "n01443537.TAR": ["n01443537_2.JPEG"]},
        {"class1.tar": ["class1/0.png"], "class2.tar": ["class2/0.png", "@eaDir/class2/0.png", "__MACOSX/._0.png"]},
        {"dog.tar": ["dog.0.jpg", "dog1.jpg", "dog.txt"], "cat.tar": ["cat (1).jpg"]},
        {"dogs.tar": ["1.jpg"], "cats.tar": ["2.jpg"]},
    ],
    ids=lambda tars: next(iter(tars)),
)
def test_tars_of_classes_are_classes(tmp_path, tars):
    for name, members in tars.items():
        pack(tmp_path / name, {member: png(0) for member in members})
    (tmp_path / "@eaDir").mkdir()
    (tmp_path / "Thumbs.db").write_bytes(b"")
    source = open_images(tmp_path)
    assert source.classes == sorted(name[: -len(".tar")] for name in tars)
    for path, label in zip(source.paths, source.labels, strict=True):
        assert path.startswith(source.classes[label]) and "@eaDir" not in path


def test_labels_in_json_and_names_in_any_case(tmp_path, caplog):
    entries = [{"label": 3}, {"caption": "x", "cls": "4"}, {"label": "cat", "class_id": 5}, {"class": 2, "target": 7}]
    members = {}
    for i, entry in enumerate(entries):
        members |= {f"{i}.JPG": png(i), f"{i}.json": json.dumps(entry).encode()}
    pack(tmp_path / "a.tar", members | {"9.jfif": png(9), "9.CLS": b"1", "9.Json": b'{"label": 8}'})
    pack(tmp_path / "B.TAR", samples(20, 2))
    caplog.set_level(logging.INFO, "epg_fast")
    source = open_images(tmp_path)
    found = {path: int(label) for path, label in zip(source.paths, source.labels, strict=True)}
    assert found == {
        "B.TAR/0020.png": 2,
        "B.TAR/0021.png": 0,
        **{f"a.tar/{i}.JPG": label for i, label in enumerate((3, 4, 5, 2))},
        "a.tar/9.jfif": 1,
    }
    assert "ignored" not in caplog.text
    # pandas writes whole numbers beside gaps as floats
    source = open_images(pack(tmp_path / "y" / "a.tar", {"0.png": png(0), "0.json": b'{"label": 4.0}'}))
    assert source.labels.tolist() == [4]
    # one that has no class index is no label
    for content in (
        b"[" * 100_000,
        b'{"label": 1e400}',
        b'{"label": "cat"}',
        b'{"label": true}',
        b'{"label": -1}',
        b'{"label": 1.5}',
        b"[3]",
        b"3",
        b"{",
    ):
        pack(tmp_path / "x" / "a.tar", {"0.png": png(0), "0.json": content, "1.png": png(1), "1.json": b'{"label": 0}'})
        with pytest.raises(ValueError, match=r"a.tar has 0.png but no 0.cls \(or .json with label/cls/class/"):
            open_images(tmp_path / "x")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names(tmp_path, format):
    names = ["d" * 90 + "/" + "x" * 120, "with space, 'quotes' and \n", "Ünïcödé/图像", "two.dots.in", "-dash"]
    members = {}
    for i, name in enumerate(names):
        members |= {f"{name}.png": png(i), f"{name}.cls": str(i).encode()}
    path = pack(tmp_path / "odd näme 1.tar", members, format)
    for _ in range(2):
        # the second time from the index
        source = open_images(path)
        assert contents(source) == {f"odd näme 1.tar/{name}.png": members[f"{name}.png"] for name in names}
        assert source.labels.tolist() == [0, 1, 2, 3, 4]


def test_hidden_members_and_other_files_are_ignored_and_counted(tmp_path, caplog):
    extra = {"sub": None, "._0000.png": b"", ".git/x.png": b"", "README.md": b"", "a.json": b"", "dataset.json": b""}
    with caplog.at_level(logging.INFO, "epg_fast"):
        source = open_images(pack(tmp_path / "x.tar", extra | samples(0, 2)))
    assert list(source.paths) == ["x.tar/0000.png", "x.tar/0001.png"]
    assert "ignored 1 '._*', 1 '.git': hidden" in caplog.text
    assert caplog.text.count("ignored 3 files that are no images or labels: 2 '.json', 1 '.md'") == 1


def test_links_are_followed_as_when_unpacking(tmp_path, caplog):
    members = {
        ".store/a": png(0),  # as tools that keep each content once lay it out
        ".store/1": b"1",
        "x/a.png": "../.store/a",
        "x/a.cls": "../.store/1",
        "x/b.png": "hard:.store/a",
        "x/b.cls": "hard:./.store/1",
        "later.png": "x/c.png",
        "later.cls": "x/a.cls",  # a link to a link
        "again.png": "hard:later.png",
        "again.cls": "hard:.store/1",
        "current": "x",
        "through.png": "current/c.png",  # by a link to a folder
        "through.cls": "current/../x/./c.cls",
        "x/c.png": png(1),
        "x/c.cls": b"2",
        "replaced.png": "x/a.png",
        "old.png": "hard:replaced.png",
    }
    members |= {"old.cls": b"0", "replaced.cls": b"0"}
    path = pack(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:  # what was a link is a file in the end
        info = tarfile.TarInfo("replaced.png")
        info.size = len(png(7))
        tar.addfile(info, io.BytesIO(png(7)))
    (tmp_path / "unpacked").mkdir()
    # not Python's tarfile, which writes through links
    subprocess.run(["tar", "-xf", path, "-C", tmp_path / "unpacked"], check=True)
    unpacked = {str(file.relative_to(tmp_path / "unpacked")): file for file in (tmp_path / "unpacked").rglob("[!.]*")}
    unpacked = {name: file.read_bytes() for name, file in unpacked.items() if file.is_file() and name[0] != "."}
    for _ in range(2):
        # the second time from the index
        source = open_images(path)
        assert contents(source) == {f"x.tar/{name}": c for name, c in unpacked.items() if name.endswith(".png")}
        labels = {
            str(Path(name).relative_to("x.tar").with_suffix(".cls")): label
            for name, label in zip(source.paths, source.labels, strict=True)
        }
        assert labels == {name: int(content) for name, content in unpacked.items() if name.endswith(".cls")}
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message.split("tar: ")[1] for message in warned] == ["x.tar/current -> x (a folder)"]


def test_links_that_lead_to_no_file_of_the_tar_are_named_once(tmp_path, caplog):
    lost = {
        "gone.png": ("0007.png", "nothing"),
        "hard.png": ("hard:0007.png", "nothing"),
        "up.png": ("../0000.png", "outside of the tar"),
        "root.png": ("/data/0000.png", "outside of the tar"),
        "self.png": ("self.png", "a circle"),
        "sub": (".", "a folder"),
    }
    for name, (target, reason) in lost.items():
        caplog.clear()
        source = open_images(pack(tmp_path / name / "x.tar", samples(0, 2) | {name: target}))
        assert list(source.paths) == ["x.tar/0000.png", "x.tar/0001.png"]
        (record,) = (record for record in caplog.records if record.levelname == "WARNING")
        target = target.removeprefix("hard:")
        assert (
            f"left out 1 links that lead to no file in the same tar: x.tar/{name} -> {target} (" in record.getMessage()
        )
        assert record.getMessage().endswith(f"({reason})")


def test_class_tars_of_links_alone_keep_their_class(tmp_path, caplog):
    pack(tmp_path / "classes" / "cat.tar", {"a.png": png(0), "b.png": "a.png", "c.png": "hard:a.png"})
    pack(tmp_path / "classes" / "dog.tar", {"a.png": "../cat/a.png", "b.png": "hard:../cat/a.png"})
    source = open_images(tmp_path / "classes")
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0, 0, 0]
    assert set(contents(source).values()) == {png(0)}
    assert "left out 2 links" in caplog.text and "dog.tar/b.png -> ../cat/a.png" in caplog.text
    inner = {"n01.tar": (tmp_path / "classes" / "cat.tar").read_bytes(), "n00.tar": "n01.tar"}
    source = open_images(pack(tmp_path / "nested.tar", inner))
    assert source.classes == ["n00", "n01"] and source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert set(contents(source).values()) == {png(0)}


def test_the_last_of_the_members_with_one_name_counts(tmp_path, caplog):
    def append(path, members):
        with tarfile.open(path, "a") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    def unpacked(path):
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "unpacked" / path.stem, filter="data")
        files = sorted((tmp_path / "unpacked" / path.stem).iterdir())
        return {f"{path.name}/{file.name}": file.read_bytes() for file in files if file.suffix in (".png", ".tar")}

    path = pack(tmp_path / "x.tar", samples(0, 4))
    append(path, {"./0001.png": png(50), "0001.cls": b"0", "0003.png": png(51)})
    append(path, {"0001.png": png(52)})
    source = open_images(path)
    assert list(source.paths) == ["x.tar/0000.png", "x.tar/0002.png", "x.tar/0003.png", "x.tar/0001.png"]
    assert contents(source) == unpacked(path) and source.labels.tolist() == [0, 2, 0, 0]
    assert caplog.text.count("left out 3 members whose names come again") == 1
    # the same names in two tars are two images
    caplog.clear()
    for i in range(2):
        pack(tmp_path / "two" / f"s-{i}.tar", samples(0, 2))
    assert len(open_images(tmp_path / "two")) == 4 and "left out" not in caplog.text
    # a tar of class tars, with a new version of one of them that has a new version of an image
    images = [{f"{name}_{i}.png": png(60 + i) for i in range(3)} for name in ("a", "b")]
    inner = [pack(tmp_path / "inner" / f"{i}.tar", members) for i, members in enumerate(images)]
    outer = pack(tmp_path / "outer.tar", {"a.tar": inner[0].read_bytes(), "b.tar": inner[1].read_bytes()})
    append(inner[0], {"a_0.png": png(70), "a_7.png": png(71)})
    append(outer, {"a.tar": inner[0].read_bytes()})
    source = open_images(outer)
    wanted = unpacked(inner[0]) | unpacked(inner[1])
    assert contents(source) == {f"outer.tar/{path[-7]}.tar/{path[-7:]}": wanted[path] for path in wanted}
    assert source.classes == ["a", "b"] and source.labels.tolist() == [0] * 4 + [1] * 3
    assert "left out 2 members" in caplog.text


# refused


def test_what_is_no_dataset_is_refused_with_a_remedy(tmp_path):
    def refused(path, *texts):
        with pytest.raises(ValueError) as caught:
            open_images(path)
        for text in texts:
            assert text in str(caught.value)

    good = samples(0, 3)
    pack(tmp_path / "unlabelled" / "s.tar", {k: v for k, v in good.items() if k != "0001.cls"})
    refused(tmp_path / "unlabelled", "s.tar has 0001.png but no 0001.cls")
    for content in (b"cat", b"", b"-1", b"1.0", b"9" * 30):
        refused(pack(tmp_path / "label.tar", good | {"0002.cls": content}), "0002.cls holds", "wanted a class index")
    refused(pack(tmp_path / "texts.tar", {"a.txt": b"x"}), "no images in", "wanted members ending in .png")
    refused(pack(tmp_path / "none.tar", {}), "no images in")
    (tmp_path / "zero.tar").write_bytes(b"")
    refused(tmp_path / "zero.tar", "is empty")
    (tmp_path / "text.tar").write_bytes(b"no tar " * 300)
    refused(tmp_path / "text.tar", "text.tar is no tar or is damaged")
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "none.tar", "x.png")
    refused(tmp_path / "z.tar.gz", "z.tar.gz is compressed", "decompress it")
    (tmp_path / "named.tar").write_bytes((tmp_path / "z.tar.gz").read_bytes())
    refused(tmp_path / "named.tar", "is compressed (gzip)", "decompress it")
    (tmp_path / "gz").mkdir()
    (tmp_path / "z.tar.gz").rename(tmp_path / "gz" / "z.tar.gz")
    refused(tmp_path / "gz", "is compressed")
    refused(tmp_path / "missing", "does not exist")
    refused("", "empty path")
    (tmp_path / "file.txt").write_text("x")
    refused(tmp_path / "file.txt", "is a file", "wanted a folder of class folders")
    pack(tmp_path / "both" / "a.tar", good)
    (tmp_path / "both" / "cats").mkdir()
    refused(tmp_path / "both", "both tars (a.tar) and folders (cats)", "pass")
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        pack(tmp_path / "splits" / name, good)
    refused(tmp_path / "splits", "of training and of other images; pass one tar")
    for name in ("cc3m-Train-0001.tar", "cc3m-Valid-0001.TAR"):
        pack(tmp_path / "shards of splits" / name, good)
    refused(tmp_path / "shards of splits", "of training and of other images; pass one tar")
    for above in ("", "data/"):
        members = {f"{above}{name}.png": png(0) for name in ("train/a/0", "train/b/1", "val/2")}
        refused(
            pack(tmp_path / "whole.tar", members), "the splits train, val lie", "pass the folder train or a tar of it"
        )
    one = pack(tmp_path / "one.tar", {"train/0.png": png(0), "extra/0.png": png(1)})
    assert open_images(one).classes == ["all"]
    (tmp_path / "edm.zip").write_bytes(b"PK")
    refused(tmp_path / "edm.zip", "is a file", "unzip it and pass the folder")
    refused(pack(tmp_path / "mixed.tar", good | {"n01.tar": b""}), "has both tars and images")
    imagenet(tmp_path)
    pack(tmp_path / "nested" / "more.tar", good)
    refused(tmp_path / "nested", "is a tar of class tars, which is read alone; pass that file")


@pytest.mark.parametrize("layout", ["shard", "nested"])
def test_a_truncated_tar_is_an_error_wherever_it_was_cut(tmp_path, layout):
    """tarfile itself takes a tar cut inside of a header, or between two members, for a complete one."""
    imagenet(tmp_path)
    whole = (
        pack(tmp_path / "s.tar", samples(0, 4)) if layout == "shard" else tmp_path / "nested/ILSVRC2012_img_train.tar"
    )
    content = whole.read_bytes()
    with tarfile.open(whole) as tar:
        last = tar.getmembers()[-1]
    total = len(open_images(whole))
    end = last.offset_data + -(-last.size // 512) * 512
    cut = tmp_path / "cut.tar"
    for size in (end, end - 1, end - 512, last.offset_data + 1, last.offset_data, last.offset + 100, last.offset, 700):
        cut.write_bytes(content[:size])
        with pytest.raises(
            ValueError, match=f"cut.tar.* is truncated: it ends after {size} bytes|n03.tar is truncated"
        ):
            open_images(cut)
    cut.write_bytes(content[: end + 512])
    assert len(open_images(cut)) == total


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_cut_of_a_tar_with_long_names_passes_for_complete(tmp_path, format):
    members = {"y" * 120 + name: content for name, content in samples(0, 2).items()}
    whole = pack(tmp_path / "s.tar", members, format).read_bytes()
    with tarfile.open(tmp_path / "s.tar") as tar:
        end = tar.getmembers()[-1].offset_data + 512
    cut = tmp_path / "cut.tar"
    for size in range(256, end + 512, 256):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is truncated"):
            open_images(cut)


def test_a_class_tar_that_was_cut_before_it_was_packed_is_an_error(tmp_path):
    """Behind the last one lie the zeros of the outer tar's end, which are not its own."""
    imagenet(tmp_path)
    with tarfile.open(tmp_path / "classes" / "n03.tar") as tar:
        last = tar.getmembers()[-1]
    members = {path.name: path.read_bytes() for path in sorted((tmp_path / "classes").glob("*.tar"))}
    members["n03.tar"] = members["n03.tar"][: last.offset]
    with pytest.raises(ValueError, match="outer.tar/n03.tar is truncated"):
        open_images(pack(tmp_path / "outer.tar", members))


def test_a_damaged_header_and_joined_tars_do_not_shorten_the_dataset(tmp_path):
    path = pack(tmp_path / "s.tar", samples(0, 4))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmembers()[3].offset
    path.write_bytes(content[:third] + b"\1" * 512 + content[third + 512 :])
    with pytest.raises(ValueError, match="s.tar is no tar or is damaged"):
        open_images(path)
    path.write_bytes(content + pack(tmp_path / "t.tar", samples(4, 2)).read_bytes())
    with pytest.raises(ValueError, match="several tars were joined"):
        open_images(path)


# the index


def count_scans(monkeypatch):
    scanned, scan = [], tars.scan_tars
    monkeypatch.setattr(tars, "scan_tars", lambda *args: scanned.append(args) or scan(*args))
    return scanned


def test_headers_are_read_once_and_again_when_a_tar_changes(tmp_path, monkeypatch, caplog):
    scanned = count_scans(monkeypatch)
    root = tmp_path / "shards"
    pack(root / "s-0.tar", samples(0, 3))
    first = open_images(root)
    assert contents(open_images(root)) == contents(first) and len(scanned) == 1
    assert open_images(root).fingerprint() == first.fingerprint()
    pack(root / "s-1.tar", samples(3, 3))
    assert len(open_images(root)) == 6 and len(scanned) == 2
    # same size, other content and time
    swapped = samples(3, 3) | {"0003.cls": b"2"}
    pack(root / "s-1.tar", swapped)
    os.utime(root / "s-1.tar", ns=(0, 0))
    assert open_images(root).labels.tolist()[3] == 2 and len(scanned) == 3
    (root / "s-0.tar").unlink()
    assert len(open_images(root)) == 3 and len(scanned) == 4
    # a tar by itself has an index of its own
    open_images(root / "s-1.tar")
    open_images(root)
    assert len(scanned) == 5
    assert sorted(path.name for path in root.iterdir()) == ["index.npz", "s-1.tar", "s-1.tar.index.npz"]


def test_a_damaged_index_is_made_again_with_one_line(tmp_path, monkeypatch, caplog):
    scanned = count_scans(monkeypatch)
    root = tmp_path / "shards"
    pack(root / "s-0.tar", samples(0, 3))
    open_images(root)
    good = (root / "index.npz").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 255
    with np.load(root / "index.npz") as file:
        columns = dict(file)
    wrong = []
    for change in ({"offset": columns["offset"] + 10**6}, {"label": columns["label"] + 3}, {"version": 0}):
        np.savez(tmp_path / "wrong.npz", **columns | change)
        wrong.append((tmp_path / "wrong.npz").read_bytes())
    del columns["size"]
    np.savez(tmp_path / "wrong.npz", **columns)
    wrong.append((tmp_path / "wrong.npz").read_bytes())
    for content in (b"", b"rubbish", good[:-30], bytes(flipped), *wrong):
        (root / "index.npz").write_bytes(content)
        caplog.clear()
        assert len(open_images(root)) == 3
        warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warned) == 1 and "index.npz" in warned[0] and warned[0].endswith("the tars are indexed again")
        assert (root / "index.npz").read_bytes() == good
    assert len(scanned) == 9


def test_an_index_of_an_earlier_version_is_made_again_unless_prepare_data_wrote_it(make_folder, tmp_path, monkeypatch):
    prepare_shards(make_folder(6), tmp_path / "prepared", 8, workers=0)
    pack(tmp_path / "others" / "s.tar", samples(0, 3))
    open_images(tmp_path / "others")
    scanned = count_scans(monkeypatch)
    for name in ("prepared", "others"):
        with np.load(tmp_path / name / "index.npz") as file:
            columns = dict(file)
        np.savez(tmp_path / name / "index.npz", **columns | {"version": 1})
        assert len(open_images(tmp_path / name)) == len(columns["label"])
    assert [root.name for root, _ in scanned] == ["others"]


def test_an_index_npz_of_somebody_else_is_left_alone(tmp_path, monkeypatch, cache):
    scanned = count_scans(monkeypatch)
    root = tmp_path / "shards"
    pack(root / "s-0.tar", samples(0, 3))
    np.savez(root / "index.npz", theirs=np.arange(3))
    before = (root / "index.npz").read_bytes()
    assert len(open_images(root)) == len(open_images(root)) == 3
    assert (root / "index.npz").read_bytes() == before and len(scanned) == 1 and len(list(cache.iterdir())) == 1


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(tmp_path, monkeypatch, cache, caplog):
    scanned = count_scans(monkeypatch)
    root = tmp_path / "shards"
    pack(root / "s-0.tar", samples(0, 3))
    save = tars.TarIndex.save

    def read_only(self, path):
        if path.parent in broken:
            raise PermissionError(13, "Permission denied", str(path))
        save(self, path)

    monkeypatch.setattr(tars.TarIndex, "save", read_only)
    broken = {root, cache}
    assert len(open_images(root)) == 3 and "cannot be stored" in caplog.text
    broken = {root}
    assert len(open_images(root)) == len(open_images(root)) == 3
    assert len(scanned) == 2 and [path.name for path in root.iterdir()] == ["s-0.tar"]
    assert len(list(cache.iterdir())) == 1


def test_a_user_without_a_home_can_read_tars(tmp_path, monkeypatch, caplog):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    path = pack(tmp_path / "s.tar", samples(0, 3))
    np.savez(tmp_path / "s.tar.index.npz", theirs=np.arange(3))
    assert len(open_images(path)) == 3 and "cannot be stored (no home folder" in caplog.text
    (tmp_path / "s.tar.index.npz").unlink()
    monkeypatch.setattr(tars.TarIndex, "save", full)
    caplog.clear()
    assert len(open_images(path)) == 3 and "No space left" in caplog.text


def index_with_others(root, barrier, found):
    barrier.wait()
    source = ImageTars(root)
    found.put((len(source), source.fingerprint()))


@pytest.mark.skipif(sys.platform != "linux", reason="starts processes by fork")
def test_processes_that_index_at_once_see_the_same_images(tmp_path):
    root = tmp_path / "shards"
    for i in range(3):
        pack(root / f"s-{i}.tar", samples(100 * i, 60))
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(3), context.Queue()
    processes = [context.Process(target=index_with_others, args=(root, barrier, found)) for _ in range(3)]
    for process in processes:
        process.start()
    results = {found.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert results == {(180, ImageTars(root).fingerprint())} and all(process.exitcode == 0 for process in processes)
    assert sorted(path.name for path in root.iterdir()) == ["index.npz", "s-0.tar", "s-1.tar", "s-2.tar"]


# reading


def test_threads_forks_and_pickles_read_the_same_with_few_descriptors(tmp_path, monkeypatch):
    root = tmp_path / "shards"
    for i in range(12):
        pack(root / f"s-{i:02d}.tar", samples(10 * i, 2))
    monkeypatch.setattr(tars, "_OPEN_TARS", 3)
    source = ImageTars(root)
    expected = [source.read(i) for i in range(len(source))]

    def opened():
        return sum(os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(root)) for fd in os.listdir("/proc/self/fd"))

    assert opened() == 3 and len(set(expected)) == 24
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(24, size=400).tolist():
            if source.read(i) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and opened() == 3
    again = pickle.loads(pickle.dumps(source))
    assert [again.read(i) for i in range(24)] == expected and again.classes == source.classes
    source, again = None, None
    assert opened() == 0


def test_a_tar_that_changes_after_it_was_indexed_is_an_oserror(tmp_path):
    path = pack(tmp_path / "s.tar", samples(0, 3))
    source = open_images(path)
    path.write_bytes(path.read_bytes()[: int(source.index.offset[2]) + 5])
    with pytest.raises(OSError, match="ends inside of s.tar/0002.png"):
        source.read(2)
    copy = pickle.loads(pickle.dumps(source))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        copy.read(0)


def test_a_wrong_checksum_is_a_bad_file_for_the_loader(make_folder, tmp_path):
    prepare_shards(make_folder(40), tmp_path / "out", 16, workers=0, images_per_shard=25)
    source = open_images(tmp_path / "out")
    loader = PillowLoader(source, image_size=16, batch_size=8, seed=0, workers=0, max_bad_fraction=0.1)
    assert all(next(loader)["x"].shape == (8, 3, 16, 16) for _ in range(10)) and not loader.bad_files
    shard = tmp_path / "out" / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[int(source.index.offset[30]) + 40] ^= 1
    shard.write_bytes(content)
    source = open_images(tmp_path / "out")
    with pytest.raises(OSError, match="checksum of shard-000001.tar/.*png .* differs"):
        source.read(30)
    loader = PillowLoader(source, image_size=16, batch_size=8, seed=0, workers=0, max_bad_fraction=0.1)
    for _ in range(5):
        assert 30 not in next(loader)["index"].tolist()
    assert list(loader.bad_files) == [source.paths[30]] and "OSError: checksum" in loader.bad_files[source.paths[30]]
    strict = PillowLoader(source, image_size=16, batch_size=8, seed=0, workers=0)
    with pytest.raises(DataError, match="checksum"):
        for _ in range(5):
            next(strict)


@pytest.mark.parametrize("workers", [1, 2])
def test_tars_give_exactly_the_batches_of_the_folder_they_were_packed_from(make_folder, tmp_path, workers):
    folder = ImageFolder(make_folder(21, size=(40, 31)))
    for label in range(len(folder.classes)):
        files = [path for path, of in zip(folder.paths, folder.labels, strict=True) if of == label]
        pack(
            tmp_path / "tars" / f"{'abc'[label]}.tar",
            {Path(path).name: (folder.root / path).read_bytes() for path in files},
        )
    source = open_images(tmp_path / "tars")
    assert source.labels.tolist() == folder.labels

    def batches(images, workers):
        with PillowLoader(images, image_size=16, batch_size=6, seed=5, workers=workers) as loader:
            return list(itertools.islice(loader, 7))

    for left, right in zip(batches(source, workers), batches(folder, 0), strict=True):
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
