"""The ladder of training: the package's update and the plain one have the same losses from the same start."""

import pytest
import torch

from bench import bench_train
from bench.bench_train import RUNGS, Training
from bench.ladder import NotHere, Rung, attempt
from bench.train_jobs import JOBS, OurTraining, PlainTraining, Problem

CPU = torch.device("cpu")


def _ladder(job, **options):
    return Training(job, "digits_32", 8, **({"seconds": 0, "compared": 2, "device": "cpu"} | options))


@pytest.mark.parametrize("job", JOBS)
def test_losses_of_the_first_updates_are_those_of_the_plain_code(job):
    problem = Problem(job, "digits_32", 8, CPU)
    ours = OurTraining(problem, "torch", precision="fp32", compile="off").losses(4)
    plain = PlainTraining(problem, None).losses(4)
    assert ours == pytest.approx(plain, rel=1e-5) and len(set(ours)) == 4


@pytest.mark.parametrize("job", JOBS)
def test_the_reference_that_saves_memory_has_the_same_losses(job):
    problem = Problem(job, "digits_32", 8, CPU)
    again, plain = (PlainTraining(problem, None, recompute=recompute).losses(3) for recompute in (True, False))
    assert again == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("job, exempt", [("pretrain", 0), ("finetune-diffusion", 2), ("finetune-consistency", 2)])
def test_the_plain_code_decays_the_weights_that_the_package_does(job, exempt):
    problem = Problem(job, "digits_32", 8, CPU)
    groups = PlainTraining(problem, None).trainer.optimizer.param_groups
    ours = OurTraining(problem, "torch", precision="fp32").state.optimizer.param_groups
    wanted = {group["weight_decay"]: len(group["params"]) for group in ours}
    assert {group["weight_decay"]: len(group["params"]) for group in groups if group["params"]} == wanted
    assert len(groups[1]["params"]) == exempt == wanted.get(0.0, 0)


def test_updates_learn():
    problem = Problem("finetune-diffusion", "digits_32", 8, CPU)
    for training in (PlainTraining(problem, None), OurTraining(problem, "torch", precision="fp32")):
        before = [p.detach().clone() for p in _parameters(training)]
        training.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, _parameters(training), strict=True))


def _parameters(training):
    if isinstance(training, PlainTraining):
        return [*training.trainer.network.parameters(), *training.trainer.average.parameters()]
    stage = training.state.stage
    return [*stage.network.parameters(), *stage.ema.parameters()]


@pytest.mark.parametrize("job", JOBS)
def test_the_lowest_rung_is_in_the_released_precision(job):
    rung, trainer = RUNGS[job][0], _ladder(job)._made(RUNGS[job][0]).trainer
    wanted = torch.float16 if job == "pretrain" else None
    assert rung.name == "plain" and trainer.dtype == wanted and trainer.scaler.is_enabled() == (wanted is not None)


@pytest.mark.parametrize("job", JOBS)
def test_a_rung_has_speed_and_the_error_of_its_losses(job):
    row = attempt(_ladder(job), next(rung for rung in RUNGS[job] if rung.name == "ours"))
    assert row.unit == "images/s" and row.median > 0 and 0 < row.error < 0.05
    assert len(row.details["first_losses"]) == 2 and row.details["mfu"] > 0 and row.job == job


def test_a_profiled_update_has_its_products_and_its_optimiser():
    row = attempt(_ladder("finetune-diffusion"), RUNGS["finetune-diffusion"][1])
    taken = row.details["split"]["milliseconds"]
    assert taken["matrix products"] > 0 and taken["optimiser"] > 0 and row.details["split"]["of"] == "an update"


@pytest.mark.parametrize("name", ["ours, network, CUDA graphs", "ours, blocks, Triton kernels", "ours, blocks, FP8"])
def test_what_needs_a_gpu_is_a_row_that_says_so(name):
    ladder = _ladder("pretrain")
    ladder.reference = None
    row = attempt(ladder, next(rung for rung in ladder.rungs if rung.name == name))
    assert row.median is None and row.note == "needs a CUDA device"


def test_without_the_extension_its_rungs_say_why(monkeypatch):
    monkeypatch.setattr(bench_train, "extension_status", lambda: (False, "not built"))
    with pytest.raises(NotHere, match="the extension is not built"):
        _ladder("pretrain")._made(Rung("x", "bf16", {"optimizer": "fused", "compile": "off"}))


def test_an_unknown_preset_is_named_in_a_line(tmp_path, capsys):
    assert bench_train.main(["--preset", "digits", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "did you mean" in error and error.count("\n") == 1
