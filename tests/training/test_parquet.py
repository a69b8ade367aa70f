"""A run on parquet files, from the first step to samples by the names of their classes."""

import json

import numpy as np
import pytest
from PIL import Image

from epg_fast import from_pretrained
from epg_fast.__main__ import main
from epg_fast.data import ImageFolder
from tests.training.runs import assert_same_run, crashes_after_save, fails, run_command

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
NAMES = ["zero, nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def parquet_run(tiny_run, digits, tmp_path):
    """Flags of a tiny run on the digits in parquet files, and their folder."""
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
