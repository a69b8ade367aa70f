"""Files that cannot be decoded: where they are written down, what a resumed run knows. Two ranks: test_distributed."""

import shutil

import pytest

from epg_fast.__main__ import main
from epg_fast.data import DataError, ImageFolder, PillowLoader
from epg_fast.distributed import Ranks
from epg_fast.training.checkpoint import list_checkpoints
from epg_fast.training.dataset import BadFiles
from tests.training.runs import fails, run_command, saved_state
from tests.training.stages import ALONE

BATCH = 16


@pytest.fixture
def dataset(digits, tmp_path):
    """A copy of the digits that may be damaged."""
    return ImageFolder(shutil.copytree(digits / "train", tmp_path / "digits"))


def _drawn(dataset, iterations):
    """Positions in the dataset of what a run draws first."""
    with PillowLoader(dataset, image_size=32, batch_size=BATCH, seed=0, workers=0) as loader:
        return [int(i) for _ in range(iterations) for i in next(loader)["index"]]


def _damage(dataset, i):
    (dataset.root / dataset.paths[i]).write_bytes(b"")
    return dataset.paths[i]


def _listed(outdir):
    return [line.split("\t") for line in (outdir / "bad_files.txt").read_text().splitlines()]


def _saved(outdir):
    return saved_state(outdir)["bad_files"]


def test_bad_files_are_listed_in_the_run_folder_and_known_to_the_resumed_run(tiny_run, dataset, tmp_path, capsys):
    first, second = _drawn(dataset, 2)[:: 2 * BATCH - 1]
    bad = [_damage(dataset, first)]
    content = (dataset.root / dataset.paths[second]).read_bytes()
    bad.append(_damage(dataset, second))
    run = tmp_path / "run"
    command = run_command(tiny_run, run, steps=5, checkpoint_every=3, **{"data.path": dataset.root})
    assert main(command) == 0
    assert sorted(bad) == [path for path, _ in _listed(run)] == sorted(_saved(run))
    assert all("not a PNG, JPEG" in reason for _, reason in _listed(run))
    assert str(run / "bad_files.txt") in capsys.readouterr().err

    # one of them is restored before the run goes on from step 3: it belongs to the dataset again
    shutil.rmtree(list_checkpoints(run / "checkpoints")[0])
    assert sorted(_saved(run)) == sorted(bad)
    (dataset.root / bad[1]).write_bytes(content)
    assert main(command) == 0
    assert list(_saved(run)) == bad[:1]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_too_many_bad_files_stop_the_run_with_their_list(tiny_run, dataset, tmp_path, capsys, workers):
    bad = _damage(dataset, _drawn(dataset, 2)[-1])
    run, flags = tmp_path / "run", {"data.path": dataset.root, "data.max_bad_fraction": 0, "data.workers": workers}
    command = run_command(tiny_run, run, steps=3, **flags)
    fails(capsys, command, f"1 of {len(dataset)} images", f"listed in {run / 'bad_files.txt'}")
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
    dataset = ImageFolder(digits / "train")
    ranks, loader, known = _Others(0, 2, None), _Loader(b="text"), {"a": "vanished"}
    bad_files = BadFiles(known, loader, dataset, 4 / len(dataset), tmp_path, ranks)
    assert loader.added == [{"a": "vanished"}]
    ranks.met = {"c": "empty"}
    bad_files.exchange()
    assert loader.added[1:] == [{"c": "empty"}] and known == {"a": "vanished", "b": "text", "c": "empty"}
    ranks.met = {}
    bad_files.exchange()
    assert len(loader.added) == 2  # nothing new anywhere
    ranks.met = {"d": "text", "e": "text"}
    with pytest.raises(DataError, match=f"5 of {len(dataset)} images"):
        bad_files.exchange()
    assert [path for path, _ in _listed(tmp_path)] == ["a", "b", "c", "d", "e"]


def test_a_list_that_cannot_be_written_does_not_end_the_run(digits, tmp_path, log):
    (tmp_path / "bad_files.txt").mkdir()
    bad_files = BadFiles({}, _Loader(a="empty"), ImageFolder(digits / "train"), 1, tmp_path, ALONE)
    bad_files.exchange()
    assert len(log.messages) == 1 and str(tmp_path / "bad_files.txt") in log.messages[0]
