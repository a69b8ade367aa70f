"""Ranks that share a batch, or the networks, do what one rank does; checkpoints serve any number of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from epg_fast.training.checkpoint import load_newest
from epg_fast.training.state import RunState
from tests.training import rank_worker
from tests.training.rank_worker import make_config
from tests.training.runs import (
    assert_same_run,
    assert_same_training,
    evaluations_of,
    forget_figures,
    in_new_process,
    run_lines,
    saved_state,
    saved_steps,
)
from tests.training.stages import ALONE, JOBS, Images, make_stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    in_new_process(rank_worker.main, digits, folder)
    return folder


@pytest.fixture(scope="module")
def measured(digits, runs):
    in_new_process(rank_worker.measure, digits, runs)
    return runs


def whole_tensors(run, job):
    """The tensors of the newest checkpoint of a run, as a single rank reads them."""
    config = make_config(Path(), Path(), "unused", job, parallelism="ddp")[0]
    if job == "finetune-consistency":
        config.perceptual = None
    state = RunState(make_stage(job, config, perceptual=False), Images())
    load_newest(run / "checkpoints", tensors := state.tensors(), ALONE)
    return tensors


def assert_close(got, want, tolerance=5e-5):
    assert got.keys() == want.keys() and len(want) > 20
    for name, tensor in want.items():
        error = (got[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-6)
        assert got[name].shape == tensor.shape and error < tolerance, f"{name}: relative error {error:.1e}"


def assert_close_runs(got, want, job):
    tensors = [whole_tensors(run, job) for run in (got, want)]
    assert_close(*tensors)
    assert any(t.any() for name, t in tensors[0].items() if "/exp_avg/" in name)
    snapshots = [(f"posthoc_ema/step_00000000{step}", 1e-3) for step in (3, 4)]  # in float16
    for name, tolerance in [("model", 5e-5), *snapshots]:
        assert_close(*(load_file(run / f"{name}.safetensors") for run in (got, want)), tolerance)
    lines, wanted = run_lines(got), run_lines(want)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] == [line["step"] for line in wanted]
    for a, b in zip(lines, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("ranks, micro_batches", [(1, 4), (2, 1), (2, 3)])
@pytest.mark.parametrize("job", JOBS)
def test_gradients_do_not_depend_on_the_number_of_ranks_and_micro_batches(job, ranks, micro_batches, runs):
    """Contrastive negatives and BatchNorm statistics span the global batch; float32 tolerance."""
    want, got = (torch.load(runs / f"gradients-{job}-{which}.pt") for which in ("1-1", f"{ranks}-{micro_batches}"))
    names = {prefix: {n for n in want if n.startswith("fp8.") == prefix} for prefix in (False, True)}
    assert_close({n: got[n] for n in got if n in names[False]}, {n: want[n] for n in names[False]}, 2e-4)
    if job == "finetune-diffusion":  # a value near a tie may be rounded to the other side in FP8
        assert_close({n: got[n] for n in got if n in names[True]}, {n: want[n] for n in names[True]}, 2e-2)
    else:
        assert not names[True]


@pytest.mark.parametrize(
    "run, job",
    [
        *((name, "pretrain") for name in ("pretrain-2", "pretrain-ddp-2")),
        *((name, "finetune-diffusion") for name in ("diffusion-2", "ddp", "fsdp")),
        ("consistency-2", "finetune-consistency"),
    ],
)
def test_two_ranks_train_as_one(run, job, runs):
    """Weights, averages, moments, statistics of BatchNorm, gradient norms; the updates after the first are clipped.

    pretrain-2: sharded, one step is skipped, GradCache with two micro-batches. pretrain-ddp-2: the same step, without.
    diffusion-2: sharded, computes activations again, was ended by a signal and started again. consistency-2: sharded,
    goes on from the checkpoint of a plain rank, micro-batches. ddp, fsdp: one rank goes on from the checkpoint of two
    sharded ones.
    """
    assert_close_runs(runs / run, runs / f"{job}-1", job)
    ranks = 1 if run in ("ddp", "pretrain-ddp-2", "fsdp") else 2
    assert saved_steps(runs / run) == [4, 3 if run == "diffusion-2" else 2]
    assert saved_state(runs / run)["ranks"] == ranks


def test_weights_that_are_used_without_gradient_first_get_theirs_under_autocast(runs):
    """For the keys of pre-training the network runs without gradient."""
    found = [whole_tensors(runs / f"half-{name}", "pretrain") for name in ("fsdp", "ddp")]
    assert_close(*({n: t for n, t in state.items() if n.startswith("optimizer/")} for state in found), tolerance=0.01)


def test_a_damaged_part_gives_way_to_the_checkpoint_before_and_the_run_repeats_bit_for_bit(runs):
    assert_same_run(runs / "damaged", runs / "pretrain-2")
    names = {path.name for path in (runs / "damaged/checkpoints").iterdir()}
    assert names == {"step_000000002", "step_000000004", "step_000000004.damaged"}


def test_kill_9_and_resume_is_bit_identical(runs):
    assert_same_run(runs / "killed", runs / "pretrain-1")


def test_a_disk_that_is_full_for_one_rank_ends_all_with_the_checkpoint_before(runs):
    errors = [(runs / f"full/error_{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1] and "cannot write" in errors[0] and "rank_00001" in errors[0]
    assert "step_000000002 is intact" in errors[0]
    assert [path.name for path in (runs / "full/checkpoints").iterdir()] == ["step_000000002"]
    assert len(run_lines(runs / "full")) < 10


def test_a_bad_file_of_one_rank_counts_on_all_of_them(runs):
    """One that only rank 1 meets is allowed; another one that only rank 0 meets is too many for both."""
    listed = {name: (runs / name / "bad_files.txt").read_text().splitlines() for name, _ in rank_worker.BAD}
    (line,), saved = listed["bad-allowed"], saved_state(runs / "bad-allowed")["bad_files"]
    assert [line.partition("\t")[0]] == [*saved] and len(listed["bad-too-many"]) == 2
    errors = [(runs / f"bad-too-many/error_{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1] and "2 of " in errors[0] and str(runs / "bad-too-many/bad_files.txt") in errors[0]
    # both stopped at the first exchange, before a line was written
    assert not (runs / "bad-too-many/metrics.jsonl").exists() and len(run_lines(runs / "bad-allowed")) == 2


@pytest.mark.parametrize("run, step", [("diffusion-2", 4), ("fsdp", 2)])
def test_sharded_averages_are_sampled_by_all_ranks(run, step, runs):
    """Also at the start of a run, if the picture of the checkpoint is missing."""
    name = f"previews/step_00000000{step}.png"
    one, two = (np.asarray(Image.open(runs / which / name)).astype(int) for which in ("finetune-diffusion-1", run))
    assert np.abs(one - two).max() <= 1


# ---- measured


@pytest.mark.parametrize("name", rank_worker.SAME_WEIGHTS)
def test_figures_do_not_depend_on_the_ranks(name, measured):
    """Bit for bit, of the EMA and of a width: the weights of a complete run, which is asked for evaluation later."""
    want, got = evaluations_of(measured / "1 rank"), evaluations_of(measured / name)
    assert got == want and got[4].keys() == {"ema", "sigma_rel_0.1"} and got[4]["ema"] != got[4]["sigma_rel_0.1"]
    one, other = (load_file(measured / run / "best.safetensors") for run in ("1 rank", name))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", rank_worker.MEASURED)
def test_nothing_of_the_training_changes_where_it_is_measured(name, measured):
    found = assert_same_training(measured / f"{name}-measured", measured / name)
    if not name.startswith("pretrain"):
        assert [step for step, _ in found] == [2, 4] == [*evaluations_of(measured / f"{name}-measured")]
        return
    want = forget_figures(Path(shutil.copytree(measured / "pretrain-1-measured", measured / f"{name}-wanted")))
    assert [step for step, _ in want] == [1, 2, 2, 3, 4, 4]
    for (step, figures), (wanted_step, wanted) in zip(found, want, strict=True):
        # rounding may move a test image over the border of two classes
        tolerance = 1.5 / 151 if "probe_accuracy/0.3" in wanted else 0
        assert step == wanted_step and figures == pytest.approx(wanted, rel=1e-3, abs=tolerance)


@pytest.mark.parametrize("name", ["pretrain-2-killed", "pretrain-ddp-2-killed", "stopped-fsdp"])
def test_a_run_cut_before_its_figures_or_by_a_signal_to_one_rank_measures_them_when_it_goes_on(name, measured):
    whole = {"stopped-fsdp": "evaluated-fsdp-measured"}.get(name, name.replace("killed", "measured"))
    assert_same_run(measured / name, measured / whole)
    assert saved_steps(measured / name) == [4, 2]
