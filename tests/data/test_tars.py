"""Tars of every layout, read in place: their images and classes, what is refused, the index that is kept."""

import io
import json
import logging
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from epg_fast.data import ImageFolder, ImageTars, open_images
from epg_fast.data.sources import tars
from tests.data.images import contents, encode, labels, noise, pack, png, refused, samples, touch

# layouts


def test_webdataset_shards_are_read_as_pythons_tarfile_reads_them(tmp_path):
    root = tmp_path / "shards"
    pack(root / "b-000001.tar", samples(10, 5, "JPEG") | {"0010.json": b'{"label": 9}'})
    # the label may come first, or in another order, and everything may lie in folders
    deep = {"./deep/x y.webp": png(99), "deep/x y.cls": b" 2\n"}
    pack(root / "b-000000.tar", dict(reversed((samples(0, 4) | deep).items())))
    touch(root, "notes.txt")
    source = open_images(root)
    assert isinstance(source, ImageTars) and source.classes == ["0", "1", "2"] and source.root == root
    expected, found = {}, []
    for name in ("b-000000.tar", "b-000001.tar"):
        with tarfile.open(root / name) as tar:
            read = {member.name.removeprefix("./"): tar.extractfile(member).read() for member in tar}
        for member, content in read.items():
            if not member.endswith((".cls", ".json")):
                expected[f"{name}/{member}"] = content
                found.append(int(read[os.path.splitext(member)[0] + ".cls"]))
    assert list(source.paths) == list(expected) and contents(source) == expected
    assert source.labels.dtype == np.int64 and source.labels.tolist() == found
    image = np.asarray(Image.open(io.BytesIO(expected[source.paths[0]])).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(source.load(0)), image)


def imagenet(root):
    """The same six images as class tars, as a tar of class tars and as class folders."""
    names = {"n02": ("1", "10"), "n01": ("7",), "n03": ("1", "2", "4")}
    members = {}
    for label, (name, files) in enumerate(names.items()):
        images = {f"{name}_{file}.JPEG": png(10 * label + i) for i, file in enumerate(files)}
        members[f"{name}.tar"] = pack(root / "classes" / f"{name}.tar", images).read_bytes()
        for file, content in images.items():
            touch(root / "folder" / name, file, content=content)
    pack(root / "nested" / "ILSVRC2012_img_train.tar", members)
    return ImageFolder(root / "folder")


@pytest.mark.parametrize("path", ["classes", "nested", "nested/ILSVRC2012_img_train.tar"])
def test_imagenets_tars_are_read_as_its_folders_without_unpacking(tmp_path, path):
    prefix = "" if path == "classes" else "ILSVRC2012_img_train.tar/"
    folder, source = imagenet(tmp_path), open_images(tmp_path / path)
    assert source.classes == folder.classes == ["n01", "n02", "n03"] and source.labels.tolist() == folder.labels
    assert contents(source) == {
        prefix + path.replace("/", ".tar/"): content for path, content in contents(folder).items()
    }


IMG2DATASET = {"00000.tar": ["000000001.jpg", "000000001.txt"], "00003.tar": ["000030001.jpg", "000030001.json"]}
IMAGENET = {"n01440764.tar": ["n01440764_18.JPEG", "n01440764_36.JPEG"], "n01443537.TAR": ["n01443537_2.JPEG"]}
JUNK = ["class2/0.png", "@eaDir/class2/0.png", "__MACOSX/._0.png"]
LAYOUTS = {
    "shards": ({f"x-{i:05d}.tar": [f"{i}.png"] for i in range(3)}, ["all"]),
    "splits in words of shards": ({"cc3m-train-0001.tar": ["a.jpg"], "cc3m-train-0002.tar": ["b.jpg"]}, ["all"]),
    "numbers": ({"0.tar": ["a.jpg"], "7.TAR": ["b.jpg"]}, ["all"]),
    "of": ({"data-1-of-2.tar": ["data/a.png"], "data-2-of-2.tar": ["data/b.png"]}, ["all"]),
    # a key begins with its shard's number, captions lie beside the images
    "img2dataset": (IMG2DATASET, ["all"]),
    "captions": ({"east.tar": ["a.jpg", "a.txt"], "west.tar": ["b.jpg", "b.txt"]}, ["all"]),
    "one": ({"n01440764.tar": ["n01440764_18.JPEG"]}, ["all"]),
    "imagenet": (IMAGENET, ["n01440764", "n01443537"]),
    "folders": ({"class1.tar": ["class1/0.png"], "class2.tar": JUNK}, ["class1", "class2"]),
    "kaggle": ({"dog.tar": ["dog.0.jpg", "dog1.jpg", "dog.txt"], "cat.tar": ["cat (1).jpg"]}, ["cat", "dog"]),
    "names": ({"dogs.tar": ["1.jpg"], "cats.tar": ["2.jpg"]}, ["cats", "dogs"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_labels_tars_are_classes_or_shards_by_their_names(tmp_path, log, layout):
    members, classes = LAYOUTS[layout]
    for name, files in members.items():
        pack(tmp_path / name, {file: png(0) if file.lower().endswith("g") else b"{}" for file in files})
    touch(tmp_path, "@eaDir/x", "Thumbs.db")
    for times in (1, 2):  # the second time from the index
        source = open_images(tmp_path)
        assert source.classes == classes and not any("@eaDir" in path for path in source.paths)
        said = sum("no image has a label: one class, 'all'" in line for line in log.messages)
        assert said == times * (classes == ["all"])
        for path, label in labels(source).items():
            assert classes == ["all"] or path.startswith(classes[label])


def test_labels_in_json_and_names_in_any_case(tmp_path, caplog):
    entries = [{"label": 3}, {"caption": "x", "cls": "4"}, {"label": "cat", "class_id": 5}, {"class": 2, "target": 7}]
    entries += [{"label": 4.0}]  # as pandas writes whole numbers beside gaps
    members = {}
    for i, entry in enumerate(entries):
        members |= {f"{i}.JPG": png(i), f"{i}.json": json.dumps(entry).encode()}
    pack(tmp_path / "a.tar", members | {"9.jfif": png(9), "9.CLS": b"1", "9.Json": b'{"label": 8}'})
    pack(tmp_path / "B.TAR", samples(20, 2))
    caplog.set_level(logging.INFO, "epg_fast")
    wanted = {f"a.tar/{i}.JPG": label for i, label in enumerate((3, 4, 5, 2, 4))}
    wanted |= {"B.TAR/0020.png": 2, "B.TAR/0021.png": 0, "a.tar/9.jfif": 1}
    assert labels(open_images(tmp_path)) == wanted and "ignored" not in caplog.text
    # one that has no class index is no label
    for label in ("1e400", '"cat"', "true", "-1", None):
        content = b"[" * 100_000 if label is None else b'{"label": %s}' % label.encode()
        pack(tmp_path / "x" / "a.tar", {"0.png": png(0), "0.json": content, "1.png": png(1), "1.json": b'{"label": 0}'})
        refused(tmp_path / "x" / "a.tar", r"a.tar has 0.png but no 0.cls \(or .json with label/cls/class/")


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
    extra = {"sub": None, "._0000.png": b"", ".git/x.png": b"", "README.md": b"", "a.json": b"", "link": "README.md"}
    with caplog.at_level(logging.INFO, "epg_fast"):
        source = open_images(pack(tmp_path / "x.tar", extra | samples(0, 2)))
    assert list(source.paths) == ["x.tar/0000.png", "x.tar/0001.png"]
    assert "ignored 1 '._*', 1 '.git': hidden" in caplog.text
    assert caplog.text.count("ignored 3 files that are no images or labels: 1 '.md', 1 '.json', 1 'link'") == 1
    # names that lead out of the tar are no images
    source = open_images(pack(tmp_path / "x.tar", {"../up.png": png(1), "a/../../b.png": png(2), "/root.png": png(3)}))
    assert source.paths == ["x.tar/root.png"]


def test_the_last_of_the_members_with_one_name_counts(tmp_path, caplog):
    def unpacked(path):
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "unpacked" / path.stem, filter="data")
        files = sorted((tmp_path / "unpacked" / path.stem).glob("*.png"))
        return {f"{path.name}/{file.name}": file.read_bytes() for file in files}

    path = pack(tmp_path / "x.tar", samples(0, 4))
    pack(path, {"./0001.png": png(50), "0001.cls": b"0", "0003.png": png(51)}, mode="a")
    pack(path, {"0001.png": png(52)}, mode="a")
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
    inner = [pack(tmp_path / "inner" / f"{name}.tar", each) for name, each in zip("ab", images, strict=True)]
    outer = pack(tmp_path / "outer.tar", {path.name: path.read_bytes() for path in inner})
    pack(inner[0], {"a_0.png": png(70), "a_7.png": png(71)}, mode="a")
    pack(outer, {"a.tar": inner[0].read_bytes()}, mode="a")
    source = open_images(outer)
    assert contents(source) == {f"outer.tar/{k}": v for path in inner for k, v in unpacked(path).items()}
    assert source.classes == ["a", "b"] and source.labels.tolist() == [0] * 4 + [1] * 3
    assert "left out 2 members" in caplog.text


# refused

GOOD = samples(0, 3)
SPLITS = "of training and of other images; pass one tar"
REFUSED = {
    "no label": ({"s.tar": {k: v for k, v in GOOD.items() if k != "0001.cls"}}, "s.tar has 0001.png but no 0001.cls"),
    "other files": ({"s.tar": {"a.txt": b"x"}}, "no images in .*, wanted tars with members ending in .png"),
    "nothing": ({"s.tar": {}}, "no images in"),
    "mixed": ({"s.tar": GOOD | {"n01.tar": bytes(1024)}}, "has both tars and images"),
    "symbolic link": ({"s.tar": GOOD | {"x.png": "0000.png"}}, "has x.png as a link.*with tar --dereference"),
    "hard link": ({"s.tar": GOOD | {"x.cls": "hard:0000.cls"}}, "has x.cls as a link.*--hard-dereference"),
    "splits": ({"ILSVRC2012_img_train.tar": GOOD, "ILSVRC2012_img_val.tar": GOOD}, SPLITS),
    "shards of splits": ({"cc3m-Train-0001.tar": GOOD, "cc3m-Valid-0001.TAR": GOOD}, SPLITS),
    "splits inside": (
        {"s.tar": {f"data/{name}.png": png(0) for name in ("train/a/0", "train/b/1", "val/2")}},
        "the splits train, val lie .*pass the folder train or a tar of it",
    ),
    **{
        f"label {content}": ({"s.tar": GOOD | {"0002.cls": content}}, "0002.cls holds .*, wanted a class index")
        for content in (b"cat", b"", b"-1", b"1.0", b"9" * 30, b"9999999")
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_tars_that_are_no_dataset_are_refused_with_a_remedy(tmp_path, case):
    members, message = REFUSED[case]
    for name, content in members.items():
        pack(tmp_path / name, content)
    refused(tmp_path, message)


def test_paths_that_are_no_dataset_are_refused_with_a_remedy(tmp_path):
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as tar:
        tar.add(pack(tmp_path / "x.tar", GOOD))
    touch(tmp_path, "named.tar", content=(tmp_path / "z.tar.gz").read_bytes())
    touch(tmp_path, "zero.tar", "file.txt", "edm.zip", "both/a.tar", "both/cats/0.png")
    touch(tmp_path, "inner/a.tar.gz", content=(tmp_path / "z.tar.gz").read_bytes())
    for path, message in (
        ("z.tar.gz", "is compressed .gzip., wanted a plain tar; decompress it"),
        ("named.tar", "is compressed .gzip."),
        ("inner", "a.tar.gz is compressed"),
        ("zero.tar", "was cut"),
        ("missing", "does not exist"),
        ("file.txt", "is a file, wanted a folder of class folders"),
        ("edm.zip", "is a file.*unzip it and pass the folder"),
        ("both", r"both tars \(a.tar\) and folders \(cats\).*pass"),
    ):
        refused(tmp_path / path, message)
    refused("", "empty path")


@pytest.mark.parametrize("layout", ["shard", "nested", tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_cut_tar_is_an_error_wherever_it_was_cut(tmp_path, layout):
    """tarfile itself takes a tar cut inside of a header, or between two members, for a complete one."""
    if layout == "nested":
        imagenet(tmp_path)
        whole = tmp_path / "nested/ILSVRC2012_img_train.tar"
    else:
        long = "" if layout == "shard" else "y" * 120
        members = {long + name: content for name, content in samples(0, 2).items()}
        whole = pack(tmp_path / "s.tar", members, tarfile.PAX_FORMAT if layout == "shard" else layout)
    content = whole.read_bytes()
    with tarfile.open(whole) as tar:
        last = tar.getmembers()[-1]
    total, end = len(open_images(whole)), last.offset_data + -(-last.size // 512) * 512
    cut = tmp_path / "cut.tar"
    for size in (*range(256, end, 256 if layout != "nested" else 1280), last.offset_data + 1, end - 1, end, end + 511):
        cut.write_bytes(content[:size])
        refused(cut, "was cut, is damaged or was joined")
    cut.write_bytes(content[: end + 512])
    assert len(open_images(cut)) == total


def test_damaged_and_joined_tars_do_not_shorten_the_dataset(tmp_path):
    path = pack(tmp_path / "s.tar", samples(0, 4))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmembers()[3].offset
    imagenet(tmp_path)
    # behind the last class tar lie the zeros of the outer tar's end, which are not its own
    members = {path.name: path.read_bytes() for path in sorted((tmp_path / "classes").glob("*.tar"))}
    with tarfile.open(tmp_path / "classes" / "n03.tar") as tar:
        members["n03.tar"] = members["n03.tar"][: tar.getmembers()[-1].offset]
    for damaged in (
        content[:third] + b"\1" * 512 + content[third + 512 :],
        content + pack(tmp_path / "t.tar", samples(4, 2)).read_bytes(),
        pack(tmp_path / "outer.tar", members).read_bytes(),
    ):
        path.write_bytes(damaged)
        refused(path, r"s.tar(/n03.tar)? was cut, is damaged or was joined of several tars")


# the index


def test_headers_are_read_once_and_again_when_a_tar_changes(tmp_path, monkeypatch, cache):
    scanned, scan = [], tars.scan_tars
    monkeypatch.setattr(tars, "scan_tars", lambda folder, names: scanned.append(names) or scan(folder, names))
    root = tmp_path / "shards"
    pack(root / "s-0.tar", samples(0, 3))
    first = open_images(root)
    assert contents(open_images(root)) == contents(first) and len(scanned) == 1
    assert open_images(root).fingerprint() == first.fingerprint()
    pack(root / "s-1.tar", samples(3, 3))
    assert len(open_images(root)) == 6 and len(scanned) == 2
    # same size, other content and time
    pack(root / "s-1.tar", samples(3, 3) | {"0003.cls": b"2"})
    os.utime(root / "s-1.tar", ns=(0, 0))
    assert open_images(root).labels.tolist()[3] == 2 and len(scanned) == 3
    (root / "s-0.tar").unlink()
    for _ in range(2):
        assert len(open_images(root)) == 3 and len(scanned) == 4
    assert [path.name for path in root.iterdir()] == ["s-1.tar"]
    # a damaged index is made again
    newest = max(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    content = newest.read_bytes()
    for i, damaged in enumerate((b"", b"rubbish", content[:-30], content[:300] + b"\xff" + content[301:])):
        newest.write_bytes(damaged)
        assert len(open_images(root)) == 3 and len(scanned) == 5 + i


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("reason", ["no home folder", "Not a directory", "No space left"])
def test_without_room_for_the_index_tars_are_read_all_the_same(tmp_path, monkeypatch, log, reason):
    if reason == "no home folder":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    elif reason == "Not a directory":
        monkeypatch.setenv("XDG_CACHE_HOME", str(touch(tmp_path, "file") / "file"))
    else:
        monkeypatch.setattr(tars.TarIndex, "save", full)
    assert len(open_images(pack(tmp_path / "s.tar", samples(0, 3)))) == 3
    assert "cannot be stored" in log.messages[-1] and reason in log.messages[-1]


# reading


def test_threads_and_pickles_read_the_same_with_few_descriptors(tmp_path, monkeypatch):
    root = tmp_path / "shards"
    for i in range(12):
        pack(root / f"s-{i:02d}.tar", samples(10 * i, 2))
    monkeypatch.setattr(tars, "_OPEN_TARS", 3)
    source = ImageTars(root)
    expected = [source.read(i) for i in range(len(source))]

    def opened():
        return sum(os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(root)) for fd in os.listdir("/proc/self/fd"))

    assert opened() == 3 and len(set(expected)) == 24

    def read_wrongly(seed):
        return [i for i in np.random.default_rng(seed).integers(24, size=400).tolist() if source.read(i) != expected[i]]

    with ThreadPoolExecutor(4) as threads:
        assert not sum(threads.map(read_wrongly, range(4)), [])
    assert opened() == 3
    again = pickle.loads(pickle.dumps(source))
    assert [again.read(i) for i in range(24)] == expected and again.classes == source.classes
    source, again = None, None
    assert opened() == 0


def test_a_disk_that_hands_out_little_gives_whole_images_and_a_changed_tar_is_an_oserror(tmp_path, monkeypatch):
    path = pack(tmp_path / "s.tar", {"0.png": encode(noise(64, 64)), "0.cls": b"0"} | samples(1, 2))
    source = open_images(path)
    expected, pread = source.read(0), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 1000), offset))
    assert source.read(0) == expected
    path.write_bytes(path.read_bytes()[: int(source.index.offset[2]) + 5])
    with pytest.raises(OSError, match="ends inside of s.tar/0002.png"):
        source.read(2)
    copy = pickle.loads(pickle.dumps(source))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        copy.read(0)
