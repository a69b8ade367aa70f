"""A run's images: bad files, who decodes, which classes they have; the same after a resume. Ranks: test_distributed."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from epg_fast import from_pretrained
from epg_fast.__main__ import main
from epg_fast.data import DataError, ImageFolder, PillowLoader
from epg_fast.distributed import Ranks
from epg_fast.training import checkpoint, dataset, state
from epg_fast.training.dataset import BadFiles, choose_backend, note_classes
from tests.training.runs import (
    assert_same_run,
    crash_after_save,
    crashes_after_save,
    fails,
    run_command,
    run_lines,
    saved_state,
)
from tests.training.stages import ALONE

BATCH = 16


@pytest.fixture
def images(digits, tmp_path):
    """A copy of the digits that may be damaged."""
    return ImageFolder(shutil.copytree(digits / "train", tmp_path / "digits"))


def _drawn(images, iterations):
    """Positions in the dataset of what a run draws first."""
    with PillowLoader(images, image_size=32, batch_size=BATCH, seed=0, workers=0) as loader:
        return [int(i) for _ in range(iterations) for i in next(loader)["index"]]


def _damage(images, i):
    (images.root / images.paths[i]).write_bytes(b"")
    return images.paths[i]


def _listed(outdir):
    return [line.split("\t") for line in (outdir / "bad_files.txt").read_text().splitlines()]


def _saved(outdir):
    return saved_state(outdir)["bad_files"]


def test_bad_files_are_listed_in_the_run_folder_and_known_to_the_resumed_run(tiny_run, images, tmp_path, capsys):
    first, second = _drawn(images, 2)[:: 2 * BATCH - 1]
    bad = [_damage(images, first)]
    content = (images.root / images.paths[second]).read_bytes()
    bad.append(_damage(images, second))
    run = tmp_path / "run"
    command = run_command(tiny_run, run, steps=5, checkpoint_every=3, **{"data.path": images.root})
    assert main(command) == 0
    assert sorted(bad) == [path for path, _ in _listed(run)] == sorted(_saved(run))
    assert all("not a PNG, JPEG" in reason for _, reason in _listed(run))
    assert str(run / "bad_files.txt") in capsys.readouterr().err

    # one of them is restored before the run goes on from step 3: it belongs to the dataset again
    shutil.rmtree(run / "checkpoints/step_000000005")
    assert sorted(_saved(run)) == sorted(bad)
    (images.root / bad[1]).write_bytes(content)
    assert main(command) == 0
    assert list(_saved(run)) == bad[:1]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_too_many_bad_files_stop_the_run_with_their_list(tiny_run, images, tmp_path, capsys, workers):
    bad = _damage(images, _drawn(images, 2)[-1])
    run, flags = tmp_path / "run", {"data.path": images.root, "data.max_bad_fraction": 0, "data.workers": workers}
    command = run_command(tiny_run, run, steps=3, **flags)
    fails(capsys, command, f"1 of {len(images)} images", f"listed in {run / 'bad_files.txt'}")
    assert [path for path, _ in _listed(run)] == [bad]
    # the remedy that the error names, on the same run
    assert main([*command, "--data.max_bad_fraction", "0.01"]) == 0


class _Loader:
    def __init__(self, **bad_files):
        self.bad_files, self.added = dict(bad_files), []

    def add_bad_files(self, found):
        self.added.append(found)
        self.bad_files |= found


class _Others(Ranks):
    """The first of two ranks; the other has met `met`."""

    met: dict = {}

    def gather(self, value, while_waiting=None):
        return [value, dict(self.met)]


def test_a_loader_is_told_of_what_it_has_not_met_itself_and_only_once(digits, tmp_path):
    images = ImageFolder(digits / "train")
    ranks, loader, known = _Others(0, 2, None), _Loader(b="text"), {"a": "vanished"}
    bad_files = BadFiles(known, loader, images, 4 / len(images), tmp_path, ranks)
    assert loader.added == [{"a": "vanished"}]
    ranks.met = {"c": "empty"}
    bad_files.exchange()
    assert loader.added[1:] == [{"c": "empty"}] and known == {"a": "vanished", "b": "text", "c": "empty"}
    ranks.met = {}
    bad_files.exchange()
    assert len(loader.added) == 2  # nothing new anywhere
    ranks.met = {"d": "text", "e": "text"}
    with pytest.raises(DataError, match=f"5 of {len(images)} images"):
        bad_files.exchange()
    assert [path for path, _ in _listed(tmp_path)] == ["a", "b", "c", "d", "e"]


def test_a_list_that_cannot_be_written_does_not_end_the_run(digits, tmp_path, log):
    (tmp_path / "bad_files.txt").mkdir()
    bad_files = BadFiles({}, _Loader(a="empty"), ImageFolder(digits / "train"), 1, tmp_path, ALONE)
    bad_files.exchange()
    assert len(log.messages) == 1 and str(tmp_path / "bad_files.txt") in log.messages[0]


# ---- who decodes


def resolved(there):
    """`resolve_backend` of a machine where these decoders are installed; `auto` takes the first."""

    def resolve(name, device):
        if name not in ("auto", *there):
            raise ValueError(f"{name} cannot be imported")
        return there[0] if name == "auto" else name

    return resolve


@pytest.mark.parametrize(
    "wanted, used, chosen, warnings",
    [
        *(("auto", None, "dali", 0), ("pillow", None, "pillow", 0), ("dali", None, "dali", 0)),
        *(("auto", "pillow", "pillow", 0), ("auto", "dali", "dali", 0), ("dali", "dali", "dali", 0)),
        ("dali", "pillow", "dali", 1),
    ],
)
def test_a_run_keeps_its_decoder_unless_another_is_named(wanted, used, chosen, warnings, monkeypatch, log):
    monkeypatch.setattr(dataset, "resolve_backend", resolved(["dali", "pillow"]))
    assert choose_backend(wanted, used, ALONE) == chosen
    assert sum("so far, now by" in message for message in log.messages) == warnings


def test_a_run_whose_decoder_is_gone_says_what_to_do(tiny_run, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    command = run_command(tiny_run, run, steps=2, checkpoint_every=1)

    def write_as_by_dali(folder, step, parts, saved, *rest):
        checkpoint.write_checkpoint(folder, step, parts, saved | {"data_backend": "dali"}, *rest)

    with monkeypatch.context() as patched:
        crash_after_save(patched, 1)
        patched.setattr(state, "write_checkpoint", write_as_by_dali)
        assert main(command) == 1
    monkeypatch.setattr(dataset, "resolve_backend", resolved(["pillow"]))
    before = run_lines(run)
    wanted = ("dali cannot be imported", "pip install nvidia-dali", "--data.backend pillow")
    fails(capsys, [*command, "--data.backend", "auto"], *wanted)
    assert run_lines(run) == before
    assert main(command) == 0 and saved_state(run)["data_backend"] == "pillow"
    assert "decoded by dali so far, now by pillow as asked" in capsys.readouterr().err


# ---- classes


def stage_of(num_classes, before=None):
    return SimpleNamespace(
        network=SimpleNamespace(num_classes=num_classes), untrained_before=before, untrained_classes=[]
    )


def source_of(labels, classes=None):
    return SimpleNamespace(root="data", labels=labels, classes=classes or [str(i) for i in range(max(labels) + 1)])


@pytest.mark.parametrize(
    "labels, classes, before, untrained, said",
    [
        ([0, 1, 2], 5, None, [3, 4], r"2 of the model's 5 classes \(3-4\).*pass --model.num_classes 3 for"),
        ([1, 2, 3], 4, None, [0], r"1 of the model's 4 classes \(0\).*if labels count from 1 or have gaps"),
        ([0, 4, 9], 12, None, [1, 2, 3, 5, 6, 7, 8, 10, 11], r"\(1-3, 5-8, 10-11\): 9 stay untrained.*gaps"),
        # those of the weights to start from count as trained, and nobody can change their number
        ([0, 2], 4, [1], [1], r"2 of the model's 4 classes \(1, 3\): 1 stay untrained((?!num_classes).)*$"),
        ([0, 2], 4, [], [], "they stay as they are in --init_from"),
        # all classes, or none in the network
        ([2, 0, 1], 3, None, [], None),
        ([0, 5], 0, None, [], None),
        ([0, 0], 0, None, [], None),
    ],
)
def test_classes_without_images_are_named_with_a_remedy(log, labels, classes, before, untrained, said):
    it = stage_of(classes, before)
    note_classes(it, source_of(labels))
    assert it.untrained_classes == untrained and len(log.messages) == bool(said)
    assert not said or re.search(said, log.messages[0]), log.messages


@pytest.mark.parametrize(
    "classes, names",
    [
        (["n01440764", "n01443537"], True),
        (["1", "10", "2"], True),
        (["0", "1"], False),
        ([f"{i:03d}" for i in range(101)], False),
        (["all"], False),
    ],
)
def test_the_names_of_classes_are_noted_where_they_say_more_than_numbers(classes, names):
    it = stage_of(len(classes))
    note_classes(it, source_of(list(range(len(classes))), classes))
    assert it.class_names == (classes if names else [])


@pytest.mark.parametrize(
    "labels, names, message",
    [
        ([1, 2, 3, 4], None, "no image is of class 0: if the labels count from 1, write them from 0; or pass --model"),
        ([0, 4], None, r"data has 5 classes, but the model has 4; pass --model.num_classes 5$"),
        ([0, 0], ["all"], r"has no labels, but the model has 4 classes; wanted .*key.cls.*--model.num_classes 0"),
    ],
)
def test_classes_that_do_not_fit_are_refused(labels, names, message):
    with pytest.raises(ValueError, match=message):
        note_classes(stage_of(4), source_of(labels, names))


# ---- parquet files, from the first step to samples by the names of their classes

NAMES = ["zero, nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def parquet_run(tiny_run, digits, tmp_path):
    """Flags of a tiny run on the digits in parquet files."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = ImageFolder(digits / "train")
    feature = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": NAMES}}
    metadata = {"huggingface": json.dumps({"info": {"features": feature}})}
    images = [{"bytes": folder.read(i), "path": None} for i in range(len(folder))]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, struct), "label": folder.labels}).replace_schema_metadata(metadata)
    (tmp_path / "data").mkdir()
    for i, begin in enumerate((0, 700)):
        pq.write_table(table[begin : begin + 700], tmp_path / "data" / f"train-{i}-of-2.parquet", row_group_size=100)
    return [str(tmp_path / "data") if word == f"{digits}/train" else word for word in tiny_run]


def test_a_killed_run_on_parquet_goes_on_exactly_and_its_model_knows_the_classes(parquet_run, tmp_path, capsys):
    whole, killed, samples = (tmp_path / name for name in ("whole", "killed", "samples"))
    options = {"steps": 4, "checkpoint_every": 2, "preview.every": 4, "preview.num": 4, "preview.steps": 2}
    assert main(run_command(parquet_run, whole, **options)) == 0
    millions = sum(p.numel() for p in from_pretrained(whole).parameters()) / 1e6
    assert f"network: digits_32, {millions:.2f} M parameters\n" in capsys.readouterr().err
    crashes_after_save(run_command(parquet_run, killed, **options), 2)
    assert main(run_command(parquet_run, killed, **options)) == 0
    assert_same_run(killed, whole)
    assert from_pretrained(whole).metadata["class_names"] == NAMES
    with Image.open(whole / "previews/step_000000004.png") as grid:  # two rows of tiles of 96, with names below
        assert grid.size == (198, 198 + 2 * 14)
    sample = ["sample", "--checkpoint", str(whole), "--num", "5", "--steps", "2", "--outdir", str(samples)]
    fails(capsys, [*sample, "--labels", "sevven"], "no class 'sevven' (did you mean 'seven'?)")
    assert not samples.exists()
    assert main([*sample, "--labels", "Seven,nought,3"]) == 0
    with np.load(samples / "samples.npz") as stored:
        assert stored["arr_1"].tolist() == [7, 0, 3, 7, 0]
