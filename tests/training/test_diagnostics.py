"""What pre-training measures of its features: right figures, training as if nothing were measured, no figure lost."""

import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch

from epg_fast.__main__ import main
from epg_fast.config import CollapseConfig, EvaluateConfig, ProbeConfig
from epg_fast.distributed import joined
from epg_fast.evaluation import evaluate_probe
from epg_fast.evaluation.probe import evenly_chosen
from epg_fast.models import from_pretrained
from epg_fast.training import loop
from epg_fast.training.measuring import alignment, effective_rank, uniformity
from epg_fast.training.parallel import is_sharded, parallelize
from tests.training import rank_worker
from tests.training.rank_worker import on_ranks, one_run
from tests.training.runs import assert_same_run, before_step, fails, in_new_process, run_command, run_lines, send
from tests.training.stages import make_stage

NAMES = {
    "collapse": {f"collapse/{name}" for name in ("feature_rank", "projection_rank", "alignment", "uniformity")},
    "probe": {"probe_accuracy/0.002", "probe_accuracy/2"},
}


def figures_of(run):
    """[(step, figures)] of what a run has measured, whose lines are taken out of metrics.jsonl."""
    lines = run_lines(run)
    found = [line for line in lines if "lr" not in line]
    kept = [line for line in lines if "lr" in line]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return [(line.pop("step"), line) for line in found]


# -- the figures


def test_the_effective_rank_is_the_number_of_equal_eigenvalues():
    """Of any basis, mean and scale; unequal ones count less, by their entropy."""
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    for k in (1, 3, 8):
        signs = torch.cat([torch.eye(8)[:k], -torch.eye(8)[:k]]).double()
        assert effective_rank(1e-4 * (signs @ rotation + 5)) == pytest.approx(k, rel=1e-6)
    unequal = torch.tensor([[1.0, 0], [-1, 0], [0, 3], [0, -3]])
    assert effective_rank(unequal) == pytest.approx(math.exp(-0.1 * math.log(0.1) - 0.9 * math.log(0.9)))


def test_collapsed_features_have_rank_1_and_uniformity_0():
    same = torch.randn(1, 32).expand(64, 32)
    assert effective_rank(same) == 1.0 == effective_rank(torch.zeros(4, 8))
    assert uniformity(same) == pytest.approx(0, abs=1e-12) and alignment(same, 2 * same) == pytest.approx(0, abs=1e-12)
    line = torch.randn(64, 1) * torch.randn(1, 32)
    assert effective_rank(line) == pytest.approx(1, rel=1e-3)


def test_isotropic_features_have_nearly_full_rank_and_spread_over_the_sphere():
    """exp(-2 d^2) over a sphere of many dimensions tends to e^-4; of 4000 samples in 16 dimensions the rank is 16
    but for the spread of the sample's eigenvalues."""
    features = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert 15.9 < effective_rank(features) < 16
    many = torch.randn(1000, 2000, generator=torch.Generator().manual_seed(0))
    assert uniformity(many) == pytest.approx(-4, abs=0.01)


def test_alignment_and_uniformity_by_hand():
    """Angles of 90 and 0 degrees; three points whose squared distances are 2, 2 and 4."""
    one, other = torch.tensor([[2.0, 0], [0, 1]]), torch.tensor([[0.0, 3], [0, 5]])
    assert alignment(one, other) == pytest.approx((2 + 0) / 2)
    points = torch.tensor([[1.0, 0], [0, 2], [-3, 0]])
    assert uniformity(points) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))


def test_images_are_chosen_evenly_over_the_classes():
    labels = np.repeat([0, 1, 2], [50, 5, 20])
    chosen = evenly_chosen(labels, 15)
    assert np.bincount(labels[chosen]).tolist() == [5, 5, 5] and (np.diff(chosen) > 0).all()
    assert np.bincount(labels[evenly_chosen(labels, 25)]).tolist() == [10, 5, 10]
    assert evenly_chosen(labels, 100).tolist() == list(range(75))
    assert chosen.tolist() == evenly_chosen(labels, 15).tolist() != list(range(5))


# -- runs


@pytest.fixture
def command(tiny_run, digits):
    pytest.importorskip("sklearn")

    def command(outdir, measured=True, **flags):
        own = {"probe.every": 3, "probe.test": digits / "test", "probe.num": "[60,30]", "collapse.every": 2}
        fields = {"steps": 7, "checkpoint_every": 4, "log_every": 2} | (own if measured else {}) | flags
        return run_command(tiny_run, outdir, job="pretrain", **fields)

    return command


STEPS = [(2, "collapse"), (3, "probe"), (4, "collapse"), (6, "collapse"), (6, "probe"), (7, "collapse"), (7, "probe")]
"""What such a run measures."""


@pytest.mark.parametrize("flags", [{"precision": "bf16"}, {"gradient_accumulation": 2, "precision": "fp16"}])
def test_training_is_the_same_bit_for_bit_whether_it_is_measured_or_not(flags, command, tmp_path):
    assert main(command(tmp_path / "plain", measured=False, **flags)) == 0
    random = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert main(command(tmp_path / "measured", **flags)) == 0
    assert torch.equal(torch.get_rng_state(), random[0]) and np.random.get_state()[1].tolist() == random[1]
    found = figures_of(tmp_path / "measured")
    assert [(step, set(figures)) for step, figures in found] == [(step, NAMES[name]) for step, name in STEPS]
    for _, figures in found:
        assert all(math.isfinite(value) for value in figures.values())
    assert_same_run(tmp_path / "measured", tmp_path / "plain")


def test_the_last_probe_is_what_evaluate_finds_of_the_weights(command, digits, tmp_path):
    flags = {"precision": "fp32", "probe.num": "[5000,5000]", "collapse.every": 0, "steps": 3}
    assert main(command(tmp_path, **flags)) == 0
    config = EvaluateConfig(
        probe=str(tmp_path), train=str(digits / "train"), test=str(digits / "test"), sigmas=[0.002, 2]
    )
    wanted = evaluate_probe(config, from_pretrained(tmp_path))["accuracy"]
    assert figures_of(tmp_path) == [(3, {f"probe_accuracy/{sigma}": value for sigma, value in wanted.items()})]


def test_what_is_compiled_for_training_is_not_compiled_again(command, tmp_path, monkeypatch):
    """Nor run: batches of another size would make it code for any size, with other roundings."""
    counts = []
    compile_stage = loop.compile_stage

    def counting(graph, inputs):
        counts[-1] += 1
        return graph.forward

    def compile_counted(stage):
        counts.append(0)
        torch._dynamo.reset()
        compile_stage(stage, how="blocks", backend=counting, options=None)

    monkeypatch.setattr(loop, "compile_stage", compile_counted)
    for measured in (False, True):
        assert main(command(tmp_path / str(measured), measured=measured, steps=3)) == 0
    assert counts[0] == counts[1] > 0


def test_a_run_that_was_ended_before_it_measured_does_so_when_it_goes_on(command, tmp_path, monkeypatch):
    """By a signal within step 4, which is then the last."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(whole)) == 0
    with monkeypatch.context() as patched:
        before_step(patched, lambda state, batch: send() if state.iteration == 3 else None)
        assert main(command(cut)) == 0
    assert [line["step"] for line in run_lines(cut) if "lr" not in line] == [2, 3]
    assert main(command(cut)) == 0
    assert_same_run(cut, whole)


def test_a_run_that_was_killed_between_its_last_checkpoint_and_its_figures_measures_them(
    command, tmp_path, monkeypatch, capsys
):
    """Those that are missing alone; afterwards it is complete, and nothing is written any more."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(whole)) == 0
    shutil.copytree(whole, cut)
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "probe" in lines[-1]
    (cut / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    assert main(command(cut)) == 0
    assert_same_run(cut, whole)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "Measuring", None)
        assert main(command(cut)) == 0
    assert "is complete" in capsys.readouterr().err


def test_measurements_may_be_begun_and_ended_within_a_run(command, tmp_path):
    """They are no setting that a run must keep."""
    assert main(command(tmp_path, measured=False, steps=7)) == 0
    (tmp_path / "metrics.jsonl").unlink()
    assert main(command(tmp_path, **{"probe.every": 0})) == 0
    assert [(line["step"], set(line)) for line in run_lines(tmp_path)] == [(7, NAMES["collapse"] | {"step"})]


def test_the_rank_needs_neither_classes_nor_sklearn(command, digits, tmp_path, monkeypatch):
    flat = tmp_path / "data"
    shutil.copytree(digits / "train" / "0", flat / "all")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    run = tmp_path / "run"
    assert main(command(run, **{"data.path": flat, "probe.every": 0, "steps": 2})) == 0
    assert [(step, set(figures)) for step, figures in figures_of(run)] == [(2, NAMES["collapse"])]


def test_features_that_are_not_finite_are_reported_and_training_goes_on(command, tmp_path, monkeypatch, capsys):

    def spoil(state, batch):
        if state.iteration == 1:
            state.stage.network.pos_embed.data.fill_(float("nan"))

    before_step(monkeypatch, spoil)
    assert main(command(tmp_path, steps=3)) == 0
    told = re.findall(r"step (\d): no result of (\w+): .*not finite; training goes on", capsys.readouterr().err)
    assert told == [("2", "collapse"), ("3", "collapse"), ("3", "probe")]
    assert not figures_of(tmp_path)


# -- several ranks


def two_ranks(data, folder):
    """Runs of one rank and of two, measured and not."""

    def run(name, measured, **fields):
        config, *rest = rank_worker.make_config(data, folder, name, "pretrain", steps=3, **fields)
        if measured:
            # an uneven share each, and noise that decides about many images
            config.probe = ProbeConfig(2, test=str(data / "test"), num=(201, 151), sigmas=[0.3, 0.5])
            config.collapse = CollapseConfig(1)
        return one_run, config, *rest

    on_ranks(1, [run("one", True, parallelism="ddp")])
    kinds = {"ddp": {"parallelism": "ddp"}, "fsdp": {"gradient_accumulation": 2}}
    split = (stays_split, *rank_worker.make_config(data, folder, "none", "pretrain"))
    on_ranks(2, [split, *(run(f"{k}-{m}", m, **fields) for k, fields in kinds.items() for m in (False, True))])
    for kind, fields in kinds.items():
        killed(shutil.copytree(folder / f"{kind}-True", folder / f"{kind}-killed"))
        on_ranks(2, [run(f"{kind}-killed", True, **fields)])


def killed(run):
    """Leave a run as a kill may do, between the checkpoint and the figures of step 2."""
    shutil.rmtree(run / "checkpoints" / "step_000000003")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 1,' in line or '"lr"' in line))


def stays_split(rank, config, job, interference):
    """What a measurement puts together of weights is let go, before a checkpoint asks for the parts."""
    with joined("cpu") as ranks:
        stage = make_stage(job, config, ranks=ranks)
        parallel = parallelize(stage)
        feature = parallel.observe(stage.network.encode, torch.randn(2, 3, 32, 32), torch.zeros(2))
        assert len(feature) == 2 and all(map(is_sharded, stage.network.parameters()))


@pytest.mark.slow
def test_two_ranks_measure_the_same_and_train_as_if_they_did_not(digits, tmp_path):
    pytest.importorskip("sklearn")
    in_new_process(two_ranks, digits, tmp_path)
    want = figures_of(tmp_path / "one")
    assert [step for step, _ in want] == [1, 2, 2, 3, 3]
    for kind in ("ddp", "fsdp"):
        assert_same_run(tmp_path / f"{kind}-killed", tmp_path / f"{kind}-True")
        got = figures_of(tmp_path / f"{kind}-True")
        assert [(step, set(figures)) for step, figures in got] == [(step, set(figures)) for step, figures in want]
        for (_, figures), (_, wanted) in zip(got, want, strict=True):
            # rounding may move a test image over the border of two classes
            tolerance = 1.5 / 151 if "probe_accuracy/0.3" in wanted else 0
            assert figures == pytest.approx(wanted, rel=1e-3, abs=tolerance)
        assert_same_run(tmp_path / f"{kind}-True", tmp_path / f"{kind}-False")


# -- mistakes


def test_mistakes_are_answered_before_anything_is_written(command, digits, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    one, fewer, damaged = tmp_path / "one", tmp_path / "fewer", tmp_path / "damaged"
    shutil.copytree(digits / "train" / "3", one / "3")
    shutil.copytree(digits / "test", fewer)
    shutil.rmtree(fewer / "7")
    shutil.copytree(digits / "test", damaged)
    next((damaged / "0").iterdir()).write_bytes(b"no image")
    for flags, *expected in (
        ({"probe.test": ""}, "error: probe.test: got nothing", "--probe.test FOLDER"),
        ({"probe.test": tmp_path / "none"}, f"probe.test: {tmp_path / 'none'} does not exist"),
        ({"probe.train": tmp_path / "none"}, f"probe.train: {tmp_path / 'none'} does not exist"),
        ({"probe.train": one}, f"probe.train: {one} has images of one class, 3, want two at least"),
        ({"probe.test": fewer}, f"only that has ['7'], only {fewer} has []"),
        ({"probe.num": "[60,9]"}, f"probe.num: got 9, want at least the 10 classes of {digits / 'test'}"),
        ({"probe.sigmas": "[0.002,0]"}, "error: probe.sigmas is [0.002, 0.0], want more than 0"),
        ({"probe.test": damaged, "probe.num": "[60,1000]"}, str(damaged), "cannot be decoded"),
    ):
        fails(capsys, command(run, **flags), *expected)
        assert not run.exists()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    fails(capsys, command(run), "scikit-learn", "pip install")
    assert not run.exists()
