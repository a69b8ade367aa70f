from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from epg_fast.data import ImageFolder, prepare_digits
from epg_fast.data.prepare import digits as module
from tests.commands import snapshot
from tests.data.images import touch


def test_files_hold_the_original_8x8_digits_once_each_in_a_stratified_split(digits):
    data, seen = load_digits(), []
    for split, count in (("train", 1347), ("test", 450)):
        folder = ImageFolder(digits / split)
        assert len(folder) == count and folder.classes == [str(digit) for digit in range(10)]
        rows = [int(Path(path).stem) for path in folder.paths]
        assert folder.labels == data.target[rows].tolist()
        for i, row in enumerate(rows):
            expected = np.floor(data.images[row] * 255 / 16 + 0.5)
            np.testing.assert_array_equal(np.asarray(folder.load(i)), np.dstack([expected] * 3))
        seen += rows
    assert sorted(seen) == list(range(1797))
    assert np.abs(np.bincount(folder.labels) - np.bincount(data.target) / 4).max() < 1


def test_again_completes_an_interrupted_output_and_leaves_the_rest_alone(tmp_path, monkeypatch):
    some = dict(list(module._digit_images().items())[1340:1360])
    monkeypatch.setattr(module, "_digit_images", lambda: some)
    for _ in range(2):
        assert prepare_digits(tmp_path / "out") == {"train": 7, "test": 13}
    whole, files = snapshot(tmp_path / "out"), sorted((tmp_path / "out").rglob("*.png"))
    files[3].unlink()
    touch(files[0].parent, ".0000.png.12.tmp")
    times = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    prepare_digits(tmp_path / "out")
    assert {path: data for path, data in snapshot(tmp_path / "out").items() if path.endswith(".png")} == whole
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


@pytest.mark.parametrize("name", ["notes.txt", "train/0/9999.png"])
def test_a_folder_with_other_files_is_refused_untouched(tmp_path, name):
    touch(tmp_path, name, content=b"mine")
    for outdir, message in ((tmp_path, f"holds {name}.*choose another outdir"), (tmp_path / name, "is a file")):
        with pytest.raises(ValueError, match=message):
            prepare_digits(outdir)
    assert snapshot(tmp_path) == {name: b"mine"}
