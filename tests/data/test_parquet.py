"""Parquet files as the hub hands datasets out: their images, classes and splits, batches, what is refused."""

import json
import pickle
import sys

import numpy as np
import pytest

from epg_fast.config import DataConfig
from epg_fast.data import NO_LABELS, ImageFolder, ImageParquet, make_loader, open_images
from epg_fast.data.sources import parquet
from tests.data.images import (
    assert_same,
    batches,
    contents,
    encode,
    noise,
    open_loader,
    pack,
    png,
    refused,
    samples,
    touch,
)

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
NAMES = ["tench, Tinca tinca", "goldfish", "a/b"]


def hub(names=None, image="image", label="label"):
    """The metadata that the hub's library writes into a schema."""
    of_label = {"_type": "ClassLabel", "names": names} if names else {"_type": "Value", "dtype": "int64"}
    features = {image: {"_type": "Image"}, label: of_label}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def table(images, labels=None, image="image", label="label", names=NAMES, kind=None, label_type=None):
    """Encoded images, and their labels, as the hub has them; the first half of the paths is null."""
    struct = pa.struct([("bytes", kind or pa.binary()), ("path", pa.string())])
    rows = [{"bytes": b, "path": None if i < len(images) / 2 else f"{i}.png"} for i, b in enumerate(images)]
    columns = {image: pa.array(rows, struct)}
    if labels is not None:
        columns[label] = pa.array(labels, label_type or pa.int64())
    return pa.table(columns).replace_schema_metadata(hub(names, image, label))


def write(path, content, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, **{"row_group_size": 4, **options})
    return path


@pytest.fixture
def dataset(tmp_path):
    """Two files of training images, 11 and 6 in row groups of at most 4, and one of validation."""
    for name, first, count in (
        ("train-00000-of-00002", 0, 11),
        ("train-00001-of-00002", 11, 6),
        ("validation-0", 90, 5),
    ):
        images = [png(i) for i in range(first, first + count)]
        write(tmp_path / "data" / f"{name}.parquet", table(images, [i % 3 for i in range(first, first + count)]))
    touch(tmp_path / "data", "README.md")
    return tmp_path / "data"


# what is read


def test_the_hubs_files_are_read_row_by_row_with_their_class_names(dataset):
    source = open_images(dataset)
    assert isinstance(source, ImageParquet) and source.classes == NAMES and source.root == dataset
    places = [("train-00000-of-00002", i) for i in range(11)] + [("train-00001-of-00002", i) for i in range(6)]
    assert contents(source) == {f"{file}.parquet/{row:06d}": png(i) for i, (file, row) in enumerate(places)}
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [i % 3 for i in range(17)]
    assert np.array_equal(np.asarray(source.load(7)), np.asarray(noise(12, 10, 7)))


def test_of_a_folder_with_splits_the_training_set_is_read_and_others_by_a_pattern(dataset, log):
    assert len(open_images(dataset)) == 17
    pattern = dataset / "validation-*.parquet"
    assert any(f"such as validation-0.parquet (1): '{pattern}' reads those" in line for line in log.messages)
    assert contents(open_images(pattern)) == {f"validation-0.parquet/{i:06d}": png(90 + i) for i in range(5)}
    assert len(open_images(dataset / "*.parquet")) == 22
    one = open_images(dataset / "train-00001-of-00002.parquet")
    assert one.read(5) == png(16) and one.paths[5] == "train-00001-of-00002.parquet/000005"
    for file in dataset.glob("train*"):
        file.unlink()
    assert len(open_images(dataset)) == 5  # a single split
    write(dataset / "test-0.parquet", table([png(1)], [0]))
    refused(dataset, r"several splits .* no training set; pass .* pattern, such as '.*\*.parquet'")


@pytest.mark.parametrize(
    "options, kind",
    [({"compression": "none", "use_dictionary": False}, pa.binary()), ({"compression": "zstd"}, pa.large_binary())],
)
def test_any_compression_and_width_of_bytes_gives_the_same_images(tmp_path, options, kind):
    images = [png(i) for i in range(10)]
    write(tmp_path / "a.parquet", table(images, range(10), names=None, kind=kind, label_type=pa.uint8()), **options)
    source = open_images(tmp_path / "a.parquet")
    assert list(contents(source).values()) == images and source.classes == [str(i) for i in range(10)]


def test_columns_of_other_names_are_found_where_one_can_be_meant(tmp_path):
    images, labels = [png(i) for i in range(3)], [2, 0, 1]
    plain = pa.table({"n": labels, "caption": ["a", "b", "c"], "webp": images})
    marked = table(images, labels, image="img", label="fine").replace_schema_metadata(hub(NAMES, "img", "fine"))
    for name, content, classes in (("plain", plain, ["0", "1", "2"]), ("marked", marked, NAMES)):
        source = open_images(write(tmp_path / name / "x.parquet", content))
        assert list(contents(source).values()) == images and source.labels.tolist() == labels
        assert source.classes == classes


@pytest.mark.parametrize("labels", [None, [-1, -1, -1], [None, None, None]])
def test_images_without_labels_are_one_class(tmp_path, labels, log):
    source = open_images(write(tmp_path / "x.parquet", table([png(i) for i in range(3)], labels)))
    assert source.classes == NO_LABELS and source.labels.tolist() == [0, 0, 0]
    assert "no image has a label: one class, 'all'" in log.messages[0]


@pytest.mark.parametrize("names", [["a", "a"], "ab", None, [1, 2]])
def test_class_names_that_are_none_are_numbers(tmp_path, names):
    content = table([png(0), png(1)], [0, 1]).replace_schema_metadata(hub(names))
    assert open_images(write(tmp_path / "x.parquet", content)).classes == ["0", "1"]
    for metadata in ({"huggingface": "{"}, {"huggingface": "[]"}, {}):
        content = content.replace_schema_metadata(metadata)
        assert open_images(write(tmp_path / "x.parquet", content)).classes == ["0", "1"]


# what is refused


def test_what_is_no_dataset_of_images_is_refused_in_one_line_with_the_remedy(tmp_path):
    image, label = [png(0), png(1)], [0, 1]
    good = table(image, label)
    file = write(tmp_path / "x.parquet", good)
    numbers = pa.table({"a": label, "b": label})
    cases = {
        "no images": (numbers, "the columns a (int64), b (int64); wanted one of encoded images, `image`"),
        "two labels": (
            table(image, label, label="coarse", names=None).append_column("fine", pa.array(label)),
            *("coarse (int64), fine (int64)", "`label`; write it again with these names"),
        ),
        "two images": (pa.table({"a": image, "b": image, "label": label}), "a (binary), b (binary)"),
        "words": (table(image, ["cat", "dog"], label_type=pa.string()), "label (string)"),
        "negative": (table(image, [0, -2]), "x.parquet/000001 has the label -2, wanted a class index from 0 to 2"),
        "missing": (table(image, [None, 1]), "x.parquet/000000 has the label -1"),
        "beyond the names": (table(image, [3, 1]), "x.parquet/000000 has the label 3"),
        "rows": (good.slice(0, 0), "without rows"),
    }
    for content, *expected in cases.values():
        refused(write(file, content), str(file), *expected)
    write(file, good)
    whole = file.read_bytes()
    for content in (whole[:-20], whole[:200], b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n"):
        file.write_bytes(content)
        refused(file, str(file), "cannot be read as parquet", "get it again", "git lfs pull")
    refused(tmp_path / "y*.parquet", "no file in", "y*.parquet")
    refused(tmp_path / "nowhere" / "y*.parquet", "does not exist")


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    images = [png(0)]
    write(tmp_path / "a.parquet", table(images, [0]))
    for other in (table(images, [0], names=["x", "y", "z"]), table(images), table(images, [0], image="img")):
        write(tmp_path / "b.parquet", other)
        refused(tmp_path, "b.parquet has other columns or class names than a.parquet")


def test_a_folder_above_the_files_and_one_with_other_kinds_are_refused(tmp_path):
    content = table([png(0)], [0])
    write(tmp_path / "repo" / "data" / "train-0.parquet", content)
    touch(tmp_path / "repo", "README.md", ".cache/x.parquet")
    refused(tmp_path / "repo", "parquet files in data, wanted", f"pass {tmp_path}/repo/data")
    refused(
        tmp_path / "repo" / "data",
        "`epg-fast prepare-data --layout folder --source .*repo/data` makes class",
        use=ImageFolder,
    )
    for split in ("test", "train", "a"):
        write(tmp_path / "converted" / "default" / split / "0000.parquet", content)
    refused(tmp_path / "converted", f"pass {tmp_path}/converted/default/train")
    write(tmp_path / "mixed" / "x.parquet", content)
    pack(tmp_path / "mixed" / "s.tar", samples(0, 2))
    refused(tmp_path / "mixed", "has both tars (s.tar) and parquet files (x.parquet), wanted one kind")
    (tmp_path / "mixed" / "s.tar").unlink()
    touch(tmp_path / "mixed", "cat/0.png", content=png(0))
    refused(tmp_path / "mixed", "has both parquet files (x.parquet) and folders (cat)")


def test_without_pyarrow_one_line_says_what_to_install(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(dataset, str(dataset), "pyarrow", "pip install pyarrow")


# batches


def test_batches_are_those_of_the_same_images_in_a_folder_also_from_processes_and_a_copy(dataset, tmp_path):
    source = open_images(dataset)
    labels = [[f"{i:03d}.png", int(label)] for i, label in enumerate(source.labels)]
    touch(tmp_path / "folder", "dataset.json", content=json.dumps({"labels": labels}).encode())
    for i, (name, _) in enumerate(labels):
        touch(tmp_path / "folder", name, content=source.read(i))
    expected = batches(ImageFolder(tmp_path / "folder"), 9, batch_size=4)
    again = pickle.loads(pickle.dumps(source))  # `source` has read before processes are forked
    for options in ({"source": source}, {"source": source, "workers": 2}, {"source": again}):
        assert_same(batches(count=9, batch_size=4, **options), expected)
    assert again.fingerprint() == source.fingerprint() != open_images(dataset / "*.parquet").fingerprint()


def test_an_image_that_cannot_be_decoded_is_named_by_file_and_row(tmp_path, log):
    images = [png(i) for i in range(10)]
    images[3], images[8] = b"no image", None
    source = open_images(write(tmp_path / "x.parquet", table(images, [0] * 10)))
    with open_loader(source, batch_size=5, max_bad_fraction=0.5) as loader:
        used = {int(i) for _ in range(4) for i in next(loader)["index"]}
        assert loader.bad_files.keys() == {"x.parquet/000003", "x.parquet/000008"}
    assert "no bytes in this row" in loader.bad_files["x.parquet/000008"]
    assert not {3, 8} & used and any(f"{tmp_path}/x.parquet/000003" in line for line in log.messages)


def test_a_damaged_row_group_is_bad_and_the_others_are_read(tmp_path):
    images = [png(i) for i in range(12)]
    file = write(tmp_path / "x.parquet", table(images, [0] * 12), use_dictionary=False, compression="zstd")
    begin = pq.read_metadata(file).row_group(1).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[begin : begin + 8] = b"\xff" * 8
    file.write_bytes(content)
    source = open_images(file)
    reasons = [source.examine(i)[1] for i in range(12)]
    assert [reason is None for reason in reasons] == [True] * 4 + [False] * 4 + [True] * 4


# memory and speed


def test_a_process_keeps_few_row_groups_and_reads_each_once_in_a_mixed_order(tmp_path, monkeypatch, log):
    images = [encode(noise(40, 40, i)) for i in range(80)]
    write(tmp_path / "x.parquet", table(images, [0] * 80), row_group_size=5)
    whole = open_images(tmp_path)
    assert not whole.slow_at_random and sorted(whole.mixed(np.random.default_rng(0))) == list(range(80))
    assert whole._group.cache_info().maxsize >= 16
    size = sum(map(len, images)) / 16
    monkeypatch.setattr(parquet, "_CACHE", int(8.5 * size))
    source = open_images(tmp_path)
    for images_of, said in ((whole, 0), (source, 1)):  # training is told what it costs
        options = {"backend": "pillow", "image_size": 8, "batch_size": 4, "seed": 0}
        make_loader(images_of, DataConfig(workers=0), **options).close()
        assert sum(f"prepare-data --source {tmp_path}` reads" in line for line in log.messages) == said
    assert "row groups (of 5 images" in source.slow_at_random
    order = source.mixed(np.random.default_rng(0))
    assert sorted(order) == list(range(80)) and not np.array_equal(order, source.mixed(np.random.default_rng(1)))
    assert [source.read(i) for i in order] == [images[i] for i in order]
    info = source._group.cache_info()
    # windows of half of what is kept: neighbours of an order are of few groups, and each is read once
    assert info.maxsize in (7, 8) and info.misses == 16
    assert len({i // 5 for i in order[:5]}) > 1
    for i in np.random.default_rng(0).permutation(80):
        source.read(i)
    assert source._group.cache_info().misses > 40
