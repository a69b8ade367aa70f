"""Sharded runs do what plain ones do, and their checkpoints serve any number of ranks."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from epg_fast import training
from epg_fast.config import DiffusionConfig
from epg_fast.distributed import Ranks
from epg_fast.training.checkpoint import list_checkpoints, load_newest
from epg_fast.training.sharded_checkpoint import read_any
from tests.training.runs import assert_same_run, run_lines
from tests.training.sharding_worker import JOBS, make_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    worker = [sys.executable, "-m", "tests.training.sharding_worker", str(digits), str(folder)]
    done = subprocess.run(worker, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def whole_state(run, job):
    """The newest checkpoint of a run, put together in this process, with the optimiser's state by name."""
    config = make_config(Path(), Path(), "unused", job, parallelism="ddp")[0]
    if job == "consistency":
        config.perceptual = None
    network = getattr(training, JOBS[job] + "Stage")(config, Ranks(0, 1, torch.device("cpu"))).network

    def read(path):
        return read_any(path, None, network.state_dict(), (0, 1))

    state = load_newest(run / "checkpoints", read=read)
    return state


def assert_close(got, want, path="", tolerance=5e-5):
    if isinstance(want, torch.Tensor):
        error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-6)
        assert got.shape == want.shape and error < tolerance, f"{path}: relative error {error:.1e}"
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), path
        for name in want:
            assert_close(got[name], want[name], f"{path}/{name}", tolerance)
    elif isinstance(want, list):
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_close(a, b, f"{path}/{i}", tolerance)
    else:
        assert got == want, path


def assert_close_runs(got, want, job):
    assert_close(whole_state(got, job), whole_state(want, job))
    snapshots = [(f"posthoc_ema/step_00000000{step}", 1e-3) for step in (3, 4)]  # in float16
    for name, tolerance in [("model", 5e-5), *snapshots]:
        assert_close(*(load_file(run / f"{name}.safetensors") for run in (got, want)), name, tolerance)
    lines, wanted = run_lines(got), run_lines(want)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] == [line["step"] for line in wanted]
    for a, b in zip(lines, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("job", ["pretrain", "diffusion", "consistency"])
def test_two_sharded_ranks_train_as_one_plain_rank(job, runs):
    """Weights, averages, moments, statistics of BatchNorm, gradient norms; the updates after the first are clipped.

    One of pre-training's updates is skipped, and its gradients are accumulated over two parts, as those of consistency
    training. Diffusion computes activations again, and was ended by a signal at step 3
    and started again. Consistency training goes on from the file that a plain rank wrote at step 2.
    """
    assert_close_runs(runs / f"{job}-2", runs / f"{job}-1", job)
    kinds = [path.name for path in list_checkpoints(runs / f"{job}-2/checkpoints")]
    assert (
        kinds
        == {
            "pretrain": ["step_000000004", "step_000000002"],
            "diffusion": ["step_000000004", "step_000000003"],
            "consistency": ["step_000000004", "step_000000002.pt"],
        }[job]
    )


def test_weights_that_are_used_without_gradient_first_get_theirs_under_autocast(runs):
    """For the keys of pre-training the network runs without gradient."""
    plain, sharded = (whole_state(runs / f"half-{name}", "pretrain")["optimizer"] for name in ("ddp", "fsdp"))
    assert_close(sharded, plain, tolerance=0.01)


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_a_folder_of_two_ranks_is_resumed_by_one(parallelism, runs):
    run = runs / parallelism
    assert_close_runs(run, runs / "diffusion-1", "diffusion")
    newest = "step_000000004" + ".pt" * (parallelism == "ddp")
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [newest, "step_000000002"]


def test_a_damaged_part_gives_way_to_the_checkpoint_before_and_the_run_repeats_bit_for_bit(runs):
    assert_same_run(runs / "damaged", runs / "pretrain-2")
    names = {path.name for path in (runs / "damaged/checkpoints").iterdir()}
    assert names == {"step_000000002", "step_000000004", "step_000000004.damaged"}
    want = (runs / "pretrain-2/checkpoints/step_000000004/__1_0.distcp").read_bytes()
    assert (runs / "damaged/checkpoints/step_000000004/__1_0.distcp").read_bytes() == want


def test_a_disk_that_is_full_for_one_rank_ends_all_with_the_checkpoint_before(runs):
    errors = [(runs / f"full/error_{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1] and "rank 1: [Errno 27]" in errors[0]
    assert "step_000000002 is intact" in errors[0]
    assert [path.name for path in (runs / "full/checkpoints").iterdir()] == ["step_000000002"]
    assert len(run_lines(runs / "full")) < 10
    assert whole_state(runs / "full", "diffusion")["step"] == 2


@pytest.mark.parametrize("run, step", [("diffusion-2", 4), ("fsdp", 2)])
def test_sharded_averages_are_sampled_by_all_ranks(run, step, runs):
    """Also at the start of a run, if the picture of the checkpoint is missing."""
    name = f"previews/step_00000000{step}.png"
    one, two = (np.asarray(Image.open(runs / which / name)).astype(int) for which in ("diffusion-1", run))
    assert np.abs(one - two).max() <= 1


@pytest.mark.parametrize("option", [{"offload_ema": True}, {"fp8": "rowwise"}, {"compile": "network"}])
def test_what_sharded_networks_do_not_take_is_refused(option):
    with pytest.raises(ValueError, match="got parallelism fsdp, want ddp"):
        DiffusionConfig(parallelism="fsdp", **option)


def test_code_in_the_metadata_is_not_executed(runs, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    folder = tmp_path / "run/checkpoints"
    shutil.copytree(runs / "fsdp/checkpoints", folder)
    metadata = pickle.dumps(Evil())
    (folder / "step_000000004/.metadata").write_bytes(metadata)
    checksums = json.loads((folder / "step_000000004/checksums.json").read_text())
    checksums[".metadata"] = [len(metadata), zlib.crc32(metadata)]
    (folder / "step_000000004/checksums.json").write_text(json.dumps(checksums))
    assert whole_state(tmp_path / "run", "diffusion")["step"] == 2
    assert not (tmp_path / "executed").exists()
