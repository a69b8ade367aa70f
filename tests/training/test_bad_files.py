"""Files that cannot be decoded: where they are written down, what a resumed run knows, and that all ranks agree."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from epg_fast.__main__ import main
from epg_fast.data import DataError, ImageFolder, PillowLoader
from epg_fast.distributed import Ranks
from epg_fast.training.bad_files import BadFiles
from epg_fast.training.checkpoint import list_checkpoints
from tests.training.runs import saved_state

BATCH = 16


@pytest.fixture
def dataset(digits, tmp_path):
    """A copy of the digits that may be damaged."""
    return ImageFolder(shutil.copytree(digits / "train", tmp_path / "digits"))


def _drawn(dataset, iterations, rank=0, world_size=1):
    """Positions in the dataset of what a rank draws first."""
    options = {"image_size": 32, "batch_size": BATCH, "seed": 0, "workers": 0}
    with PillowLoader(dataset, rank=rank, world_size=world_size, **options) as loader:
        return [int(i) for _ in range(iterations) for i in next(loader)["index"]]


def _damage(dataset, i):
    (dataset.root / dataset.paths[i]).write_bytes(b"")
    return dataset.paths[i]


def _command(tiny_run, dataset, outdir, **flags):
    flags = {"steps": 3, "preview.every": 0, "data.path": dataset.root, "outdir": outdir, **flags}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["finetune-diffusion", *tiny_run[:2], "--config", "digits_diffusion", *tiny_run[2:], *words]


def _listed(outdir):
    return [line.split("\t") for line in (outdir / "bad_files.txt").read_text().splitlines()]


def _saved(outdir):
    return saved_state(outdir)["bad_files"]


def test_bad_files_are_listed_in_the_run_folder_and_known_to_the_resumed_run(tiny_run, dataset, tmp_path, capsys):
    first, second = _drawn(dataset, 2)[:: 2 * BATCH - 1]
    bad = [_damage(dataset, first)]
    content = (dataset.root / dataset.paths[second]).read_bytes()
    bad.append(_damage(dataset, second))
    run, flags = tmp_path / "run", {"steps": 5, "checkpoint_every": 3}
    assert main(_command(tiny_run, dataset, run, **flags)) == 0
    assert sorted(bad) == [path for path, _ in _listed(run)] == sorted(_saved(run))
    assert all("not a PNG, JPEG" in reason for _, reason in _listed(run))
    assert str(run / "bad_files.txt") in capsys.readouterr().err

    # one of them is restored before the run goes on from step 3: it belongs to the dataset again
    shutil.rmtree(list_checkpoints(run / "checkpoints")[0])
    assert sorted(_saved(run)) == sorted(bad)
    (dataset.root / bad[1]).write_bytes(content)
    assert main(_command(tiny_run, dataset, run, **flags)) == 0
    assert list(_saved(run)) == bad[:1]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_too_many_bad_files_stop_the_run_with_their_list(tiny_run, dataset, tmp_path, capsys, workers):
    bad = _damage(dataset, _drawn(dataset, 2)[-1])
    run = tmp_path / "run"
    command = _command(tiny_run, dataset, run, **{"data.max_bad_fraction": 0, "data.workers": workers})
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"1 of {len(dataset)} images" in error and f"listed in {run / 'bad_files.txt'}" in error
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


def test_a_loader_is_told_of_what_it_has_not_met_itself_and_only_once(dataset, tmp_path):
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


def test_a_list_that_cannot_be_written_does_not_end_the_run(dataset, tmp_path, log):
    (tmp_path / "bad_files.txt").mkdir()
    bad_files = BadFiles({}, _Loader(a="empty"), dataset, 1, tmp_path, Ranks(0, 1, None))
    bad_files.exchange()
    assert len(log.messages) == 1 and str(tmp_path / "bad_files.txt") in log.messages[0]


# Both runs in one pair of processes, since starting them takes most of the time. No torchrun, which would stop one
# rank for the failure of the other before it has spoken.
RANK = """
import json, os, sys
from epg_fast.__main__ import main
for port, command in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    print(main(command), flush=True)
os._exit(0)
"""


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _on_two_ranks(commands):
    """Return what each of two ranks printed as exit codes of the commands, and its error messages."""
    program = [sys.executable, "-c", RANK, json.dumps([(_free_port(), command) for command in commands])]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[2]}
    ranks = [subprocess.Popen(program, env=os.environ | place | {"RANK": str(rank)}, **pipes) for rank in range(2)]
    results = []
    for rank in ranks:
        output, log = rank.communicate(timeout=120)
        results.append((output.split(), [line for line in log.splitlines() if ": error: " in line], log))
    return results


@pytest.mark.slow
def test_a_bad_file_of_one_rank_counts_on_all_of_them(tiny_run, dataset, tmp_path):
    """One that only rank 1 meets is allowed; another one that only rank 0 meets is too many for both."""
    flags = {"log_every": 2, "data.max_bad_fraction": 1 / len(dataset)}
    bad = [_damage(dataset, _drawn(dataset, 1, rank=1, world_size=2)[3])]
    worse = ImageFolder(shutil.copytree(dataset.root, tmp_path / "worse"))
    bad.append(_damage(worse, _drawn(worse, 1, rank=0, world_size=2)[3]))
    under, over = tmp_path / "under", tmp_path / "over"
    results = _on_two_ranks([_command(tiny_run, dataset, under, **flags), _command(tiny_run, worse, over, **flags)])
    assert [codes for codes, _, _ in results] == [["0", "2"]] * 2, results

    assert list(_saved(under)) == bad[:1] == [path for path, _ in _listed(under)]
    (first,), (second,) = (errors for _, errors, _ in results)
    assert first == second and f"2 of {len(worse)} images" in first and str(over / "bad_files.txt") in first
    assert [path for path, _ in _listed(over)] == sorted(bad)
    assert not (over / "metrics.jsonl").exists()  # both stopped at the first exchange, before a line was written
