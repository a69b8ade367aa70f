import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from epg_fast.data import ImageFolder, prepare_digits


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    outdir = tmp_path_factory.mktemp("data") / "digits"
    assert prepare_digits(outdir) == {"train": 1347, "test": 450}
    return outdir


def test_files_hold_the_original_8x8_digits_once_each(digits):
    data = load_digits()
    seen = []
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


def test_the_split_is_stratified(digits):
    counts = np.bincount(load_digits().target)
    test = np.bincount(ImageFolder(digits / "test").labels)
    assert np.abs(test - counts / 4).max() < 1


def test_again_leaves_everything_alone_and_elsewhere_gives_the_same_bytes(digits, tmp_path):
    times = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    prepare_digits(digits)
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*")} == times
    prepare_digits(tmp_path / "other")
    assert contents(tmp_path / "other") == contents(digits)


def test_an_interrupted_output_is_completed(digits, tmp_path):
    prepare_digits(tmp_path)
    for path in sorted(tmp_path.rglob("*.png"))[::7]:
        path.unlink()
    (tmp_path / "train" / "0" / ".0000.png.12.tmp").write_bytes(b"half")
    prepare_digits(tmp_path)
    assert {path: data for path, data in contents(tmp_path).items() if path.endswith(".png")} == contents(digits)


@pytest.mark.parametrize("name", ["notes.txt", "train/0/9999.png", "train/0/0000.png"])
def test_a_folder_with_other_files_is_refused_untouched(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"holds {name}.*choose another outdir"):
        prepare_digits(tmp_path)
    assert contents(tmp_path) == {name: b"mine"}
    with pytest.raises(ValueError, match="is a file"):
        prepare_digits(tmp_path / name)


def test_changed_pixels_are_refused(tmp_path):
    prepare_digits(tmp_path)
    one, two = sorted((tmp_path / "test" / "3").iterdir())[:2]
    two.write_bytes(one.read_bytes())
    with pytest.raises(ValueError, match=f"holds test/3/{two.name}"):
        prepare_digits(tmp_path)
    assert two.read_bytes() == one.read_bytes()


def test_scikit_learn_is_needed_for_the_digits_only_and_the_message_says_how_to_get_it(tmp_path):
    program = (
        "import sys; sys.modules['sklearn'] = None; import epg_fast.data as data\n"
        "try: data.prepare_digits(sys.argv[1])\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "pip install scikit-learn" in run.stdout
    assert not os.path.exists(tmp_path / "out")
