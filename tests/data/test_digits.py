import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from epg_fast.data import ImageFolder, prepare_digits
from tests.commands import snapshot
from tests.data.images import touch


def test_files_hold_the_original_8x8_digits_once_each_in_a_stratified_split(digits):
    data, seen = load_digits(), []
    for split, count in (("train", 1347), ("test", 450)):
        folder = ImageFolder(digits / split)
        assert len(folder) == count and folder.classes == [str(digit) for digit in range(10)]
        for i, (path, label) in enumerate(zip(folder.paths, folder.labels, strict=True)):
            row = int(Path(path).stem)
            seen.append(row)
            assert label == data.target[row]
            expected = np.floor(data.images[row] * 255 / 16 + 0.5)
            np.testing.assert_array_equal(np.asarray(folder.load(i)), np.dstack([expected] * 3))
    assert sorted(seen) == list(range(1797))
    assert np.abs(np.bincount(folder.labels) - np.bincount(data.target) / 4).max() < 1


def test_again_completes_an_interrupted_output_to_the_same_bytes(digits, tmp_path):
    shutil.copytree(digits, tmp_path, dirs_exist_ok=True)
    for path in sorted(tmp_path.rglob("*.png"))[::7]:
        path.unlink()
    touch(tmp_path, "train/0/.0000.png.12.tmp")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert prepare_digits(tmp_path) == {"train": 1347, "test": 450}
    assert {path: data for path, data in snapshot(tmp_path).items() if path.endswith(".png")} == snapshot(digits)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


@pytest.mark.parametrize("name", ["notes.txt", "train/0/9999.png"])
def test_a_folder_with_other_files_is_refused_untouched(tmp_path, name):
    touch(tmp_path, name, content=b"mine")
    with pytest.raises(ValueError, match=f"holds {name}.*choose another outdir"):
        prepare_digits(tmp_path)
    assert snapshot(tmp_path) == {name: b"mine"}
    with pytest.raises(ValueError, match="is a file"):
        prepare_digits(tmp_path / name)
