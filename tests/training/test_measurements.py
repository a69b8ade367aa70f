"""What a run measures beside training: right figures, the best weights, and a run that is what it is without."""

import functools
import json
import math
import random
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from epg_fast.__main__ import main
from epg_fast.config import EvaluateConfig
from epg_fast.evaluation import evaluate_probe
from epg_fast.evaluation.judge import Judges
from epg_fast.evaluation.probe import evenly_chosen
from epg_fast.models import compilation, from_pretrained, load_weights
from epg_fast.sampling import engine
from epg_fast.training import evaluation, gradients, loop
from epg_fast.training.measuring import alignment, effective_rank, uniformity
from tests.training.runs import (
    Killed,
    assert_same_training,
    before_step,
    evaluations_of,
    fails,
    few_digits,
    forget_figures,
    kill,
    run_command,
    run_lines,
)

WIDTHS = {"posthoc_ema.sigma_rel": "[0.05,0.1]", "posthoc_ema.every": 3, "evaluate.sigma_rel": "[0.1]"}
JUDGED = {"accuracy", "frechet_distance"}
COLLAPSE = {f"collapse/{name}" for name in ("feature_rank", "projection_rank", "alignment", "uniformity")}
PROBE = {"probe_accuracy/0.002", "probe_accuracy/2"}


@pytest.fixture(scope="module")
def few(digits, tmp_path_factory):
    return few_digits(digits, tmp_path_factory.mktemp("few"))


@pytest.fixture
def evaluates(few):
    """Flags of an evaluation of 20 images in three batches at every other step, judged as small data."""
    own = {"every": 2, "num": 20, "batch_size": 8, "components": 5, "train": few / "train", "test": few / "test"}
    return {f"evaluate.{name}": value for name, value in own.items()} | {"preview.steps": 2}


@pytest.fixture
def probes(digits):
    """Flags of pre-training that is measured."""
    pytest.importorskip("sklearn")
    return {"probe.every": 3, "probe.test": digits / "test", "probe.num": "[60,30]", "collapse.every": 2}


# -- the figures


def test_the_effective_rank_is_the_number_of_equal_eigenvalues():
    """Of any basis, mean and scale; unequal ones count less, by their entropy. Collapsed features have rank 1."""
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    for k in (1, 3, 8):
        signs = torch.cat([torch.eye(8)[:k], -torch.eye(8)[:k]]).double()
        assert effective_rank(1e-4 * (signs @ rotation + 5)) == pytest.approx(k, rel=1e-6)
    unequal = torch.tensor([[1.0, 0], [-1, 0], [0, 3], [0, -3]])
    assert effective_rank(unequal) == pytest.approx(math.exp(-0.1 * math.log(0.1) - 0.9 * math.log(0.9)))
    assert effective_rank(torch.randn(1, 32).expand(64, 32)) == 1.0 == effective_rank(torch.zeros(4, 8))
    assert effective_rank(torch.randn(64, 1) * torch.randn(1, 32)) == pytest.approx(1, rel=1e-3)
    # but for the spread of a sample's eigenvalues
    assert 15.9 < effective_rank(torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))) < 16


def test_alignment_and_uniformity_by_hand():
    """Angles of 90 and 0 degrees; three points whose squared distances are 2, 2 and 4; one point; a sphere of many
    dimensions, over which exp(-2 d^2) tends to e^-4."""
    one, other = torch.tensor([[2.0, 0], [0, 1]]), torch.tensor([[0.0, 3], [0, 5]])
    assert alignment(one, other) == pytest.approx((2 + 0) / 2)
    points = torch.tensor([[1.0, 0], [0, 2], [-3, 0]])
    assert uniformity(points) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))
    same = torch.randn(1, 32).expand(64, 32)
    assert uniformity(same) == pytest.approx(0, abs=1e-12) and alignment(same, 2 * same) == pytest.approx(0, abs=1e-12)
    many = torch.randn(1000, 2000, generator=torch.Generator().manual_seed(0))
    assert uniformity(many) == pytest.approx(-4, abs=0.01)


def test_images_are_chosen_evenly_over_the_classes():
    labels = np.repeat([0, 1, 2], [50, 5, 20])
    chosen = evenly_chosen(labels, 15)
    assert np.bincount(labels[chosen]).tolist() == [5, 5, 5] and (np.diff(chosen) > 0).all()
    assert np.bincount(labels[evenly_chosen(labels, 25)]).tolist() == [10, 5, 10]
    assert evenly_chosen(labels, 100).tolist() == list(range(75))
    assert chosen.tolist() == evenly_chosen(labels, 15).tolist() != list(range(5))


# -- runs


def state_of(stage):
    """What a measurement must leave as it is, and weights do not show."""
    modes = [module.training for network in (stage.network, stage.ema) for module in network.modules()]
    return modes, torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()


def around(monkeypatch, act):
    """Let `act(measurement)` be called before each measurement and after it."""
    for kind in (loop.Collapse, loop.Probe, loop.Evaluation):

        def figures(self, kind_figures=kind.figures):
            act(self)
            found = kind_figures(self)
            act(self)
            return found

        monkeypatch.setattr(kind, "figures", figures)


RUNS = {
    "pre-training, bf16": ("pretrain", {"precision": "bf16"}),
    "pre-training, GradCache, fp16": ("pretrain", {"gradient_accumulation": 2, "precision": "fp16"}),
    "EMA in host memory, fp16": ("finetune-diffusion", WIDTHS | {"offload_ema": "true", "precision": "fp16"}),
    "consistency, bf16": ("finetune-consistency", {"precision": "bf16", "preview.sampler": "onestep"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_nothing_of_the_training_changes(run, tiny_run, evaluates, probes, tmp_path, monkeypatch):
    """Bit for bit, with figures in the middle of an interval of metrics, by judges that draw at random."""
    job, flags = RUNS[run]
    command = functools.partial(run_command, tiny_run, job=job, steps=7, log_every=3, checkpoint_every=4, **flags)
    judge, states = Judges.rows, []

    def draws(self, *arguments):
        torch.rand(3), np.random.rand(3), random.random()
        return judge(self, *arguments)

    around(monkeypatch, lambda measurement: states.append(state_of(measurement._state.stage)))
    monkeypatch.setattr(Judges, "rows", draws)
    assert main(command(tmp_path / "with", **(probes if job == "pretrain" else evaluates))) == 0
    assert main(command(tmp_path / "without", **({} if job == "pretrain" else {"preview.steps": 2}))) == 0
    assert states and states[::2] == states[1::2]
    found = assert_same_training(tmp_path / "with", tmp_path / "without")
    assert all(math.isfinite(value) for _, figures in found for value in figures.values())
    names = [(step, set(figures)) for step, figures in found]
    if job == "pretrain":
        made = {2: [COLLAPSE], 3: [PROBE], 4: [COLLAPSE], 6: [COLLAPSE, PROBE], 7: [COLLAPSE, PROBE]}
        assert names == [(step, own) for step, kinds in made.items() for own in kinds]
    else:
        assert [step for step, _ in names] == [2, 4, 6, 7] == [*evaluations_of(tmp_path / "with")]


@pytest.mark.slow
@pytest.mark.parametrize("job, compiles", [("pretrain", False), ("finetune-diffusion", True)])
def test_no_measurement_but_the_first_compiles_and_training_compiles_nothing_again(
    job, compiles, tiny_run, evaluates, probes, tmp_path, monkeypatch
):
    """Graphs are counted; no code is made of them, which would take long.

    Networks in training are not run by what is compiled for them: batches of another size would make it code for any
    size, with other roundings.
    """
    torch._dynamo.reset()
    for module in (compilation, engine, gradients):
        monkeypatch.setattr(module, "compile_options", lambda *_, **__: {"dynamic": False, "backend": "eager"})
    counts = []
    around(monkeypatch, lambda _: counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    flags = probes if job == "pretrain" else evaluates
    assert main(run_command(tiny_run, tmp_path / "run", job, steps=6, compile="blocks", **flags)) == 0
    before, *later = counts
    assert later == [later[0]] * len(later) and (later[0] > before if compiles else later[0] == before > 0)


def test_the_last_probe_is_what_evaluate_finds_of_the_weights(tiny_run, probes, digits, tmp_path):
    flags = probes | {"precision": "fp32", "probe.num": "[5000,5000]", "collapse.every": 0}
    assert main(run_command(tiny_run, tmp_path, "pretrain", steps=3, **flags)) == 0
    sets = {name: str(digits / name) for name in ("train", "test")}
    config = EvaluateConfig(probe=str(tmp_path), sigmas=[0.002, 2], **sets)
    wanted = evaluate_probe(config, from_pretrained(tmp_path))["accuracy"]
    assert forget_figures(tmp_path) == [(3, {f"probe_accuracy/{sigma}": value for sigma, value in wanted.items()})]


def test_the_rank_needs_neither_classes_nor_sklearn(tiny_run, digits, tmp_path, monkeypatch):
    shutil.copytree(digits / "train" / "0", tmp_path / "data" / "all")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    run, flags = tmp_path / "run", {"data.path": tmp_path / "data", "collapse.every": 2}
    assert main(run_command(tiny_run, run, "pretrain", steps=2, **flags)) == 0
    assert [(step, set(figures)) for step, figures in forget_figures(run)] == [(2, COLLAPSE)]


def test_what_is_not_finite_is_said_and_training_goes_on(tiny_run, evaluates, probes, tmp_path, monkeypatch, capsys):
    def spoil(state, batch):
        weights = state.stage.network.pos_embed if state.config.batch_size == 12 else state.stage.ema.out.bias
        if state.iteration:
            weights.data.fill_(float("nan"))

    before_step(monkeypatch, spoil)
    first, second = tmp_path / "1", tmp_path / "2"
    assert main(run_command(tiny_run, first, "pretrain", steps=3, **probes | {"batch_size": 12})) == 0
    told = re.findall(r"step (\d): no result of (\w+): .*not finite; training goes on", capsys.readouterr().err)
    assert told == [("2", "collapse"), ("3", "collapse"), ("3", "probe")] and not forget_figures(first)
    assert main(run_command(tiny_run, second, steps=2, **evaluates)) == 0
    assert "ema: 20 of the images drawn are not finite, and judged as black" in capsys.readouterr().err
    assert evaluations_of(second)[2]["ema"]["not_finite"] == 20


def test_figures_are_those_of_the_commands_sample_and_evaluate(tiny_run, evaluates, few, tmp_path, capsys):
    """Also with the run's guidance; in metrics.jsonl with their spreads."""
    run, drawn = tmp_path / "run", tmp_path / "drawn"
    evaluates |= {"evaluate.num": 16, "preview.guidance": 2.0, "preview.interval": "[0.1,30.0]", "evaluate.seed": 7}
    assert main(run_command(tiny_run, run, steps=3, **evaluates)) == 0
    settings = {"num": 16, "batch_size": 8, "steps": 2, "guidance": 2.0, "interval": "[0.1,30.0]", "seed": 7}
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    assert main(["sample", "--checkpoint", str(run), "--outdir", str(drawn), "--device", "cpu", *words]) == 0
    real = ["--train", str(few / "train"), "--test", str(few / "test"), "--components", "5"]
    capsys.readouterr()
    assert main(["evaluate", "--samples", str(drawn / "samples.npz"), *real]) == 0
    judged = json.loads(capsys.readouterr().out)
    found = evaluations_of(run)[3]["ema"]
    assert found["figures"] == {name: pytest.approx(judged[name], rel=1e-9) for name in JUDGED}
    line = run_lines(run)[-1]
    assert line == {"step": 3} | found["figures"] | {f"{name}/spread": found["spread"][name] for name in JUDGED}
    assert found["spread"]["frechet_distance"] > 0


def test_inception_judges_a_run_against_a_reference_that_is_seen_once(tiny_run, tmp_path, tiny_inception):
    run, images = tmp_path / "run", tmp_path / "reference.npz"
    np.savez(images, arr_0=np.random.default_rng(0).integers(256, size=(30, 32, 32, 3), dtype=np.uint8))
    flags = {"evaluate.every": 1, "evaluate.num": 20, "evaluate.splits": 2, "preview.steps": 2}
    flags |= {"evaluate.reference": images, "evaluate.inception": tiny_inception}
    command = run_command(tiny_run, run, steps=2, **flags)
    assert main(command) == 0
    first = evaluations_of(run)
    assert {"fid", "inception_score", "precision", "recall"} <= first[2]["ema"]["figures"].keys()
    (reference,) = (run / "evaluation").glob("reference_*.npz")
    seen = reference.stat().st_mtime_ns
    (run / "evaluation/step_000000002.json").unlink()
    forget_figures(run, 2)
    assert main(command) == 0
    assert evaluations_of(run) == first and reference.stat().st_mtime_ns == seen
    assert load_weights(run / "best.safetensors")[1]["best"]["figure"] == "fid"


def scripted(monkeypatch, values):
    """Let figures be what `values` says, in turn."""
    values = iter(values)

    def measured(figures):
        value = next(values)
        return {"figures": dict.fromkeys(figures, value), "spread": dict.fromkeys(figures, 0.5)}

    monkeypatch.setattr(evaluation, "measured", measured)


@pytest.mark.slow
@pytest.mark.parametrize("figure, sign", [("frechet_distance", 1), ("accuracy", -1)])
def test_the_best_weights_are_kept(figure, sign, tiny_run, evaluates, tmp_path, monkeypatch):
    """The EMA of step 2, a post-hoc width of step 4; neither of step 6, nor of step 8 after the run was killed."""
    run = tmp_path / "run"
    values = [5.0, 6.0, 7.0, 4.0, 4.0, float("nan"), 4.5, 4.25]
    scripted(monkeypatch, [sign * value for value in values])
    flags = WIDTHS | evaluates | {"evaluate.best": figure, "checkpoint_every": 2, "keep_checkpoints": 9}
    command = run_command(tiny_run, run, steps=8, **flags)
    for crash, step, name, value in ((2, 2, "ema", 5.0), (6, 4, "sigma_rel_0.1", 4.0), (None, 4, "sigma_rel_0.1", 4.0)):
        with monkeypatch.context() as patched:
            if crash:
                before_step(patched, lambda state, batch, crash=crash: state.iteration == crash and kill())
                with pytest.raises(Killed):
                    main(command)
            else:
                assert main(command) == 0
        weights, metadata = load_weights(run / "best.safetensors")
        said = {"step": step, "weights": name, "figure": figure, "value": sign * value, "spread": 0.5}
        assert metadata["step"] == step and metadata["best"].items() >= said.items()
        saved = load_file(run / f"checkpoints/step_{step:09d}/rank_00000.safetensors")
        group = "ema/" if name == "ema" else "posthoc_ema/0.1/"
        parameters = {key.removeprefix(group): tensor for key, tensor in saved.items() if key.startswith(group)}
        assert parameters and all(torch.equal(weights[key], tensor) for key, tensor in parameters.items())
    line = next(line for line in run_lines(run) if line["step"] == 6 and figure in line)
    assert f"{figure}/sigma_rel_0.1" not in line
    last = json.loads((run / "evaluation/step_000000008.json").read_text())
    assert last["best"] == said


def test_the_best_by_another_yardstick_is_sought_anew_and_the_old_one_stays(tiny_run, evaluates, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(run_command(tiny_run, run, steps=4, **evaluates)) == 0
    before = (run / "best.safetensors").read_bytes()
    forget_figures(run, 4)
    assert main(run_command(tiny_run, run, steps=4, **evaluates | {"evaluate.num": 48})) == 0
    assert (run / "best_until_step_000000004.safetensors").read_bytes() == before
    assert "chosen in another way (sampling.num was 20, now 48)" in capsys.readouterr().err
    with safe_open(run / "best.safetensors", "pt") as file:
        assert json.loads(file.metadata()["epg_fast"])["best"]["protocol"]["sampling"]["num"] == 48


def test_a_full_disk_and_a_full_gpu_end_no_run(tiny_run, evaluates, tmp_path, monkeypatch, capsys):
    run, write, judge = tmp_path / "run", evaluation.write_atomically, Judges.rows

    def full(path, *arguments):
        raise OSError(f"cannot write {path}: No space left on device")

    def out_of_memory(self, images, labels):
        if len(calls) == 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB\nand more")
        calls.append(len(images))
        return judge(self, images, labels)

    calls = []
    monkeypatch.setattr(evaluation, "save_weights", full)
    monkeypatch.setattr(evaluation, "write_atomically", full)
    monkeypatch.setattr(Judges, "rows", out_of_memory)
    assert main(run_command(tiny_run, run, steps=4, **evaluates)) == 0
    said = capsys.readouterr().err
    for line in (
        "step 2: the best weights so far are not kept (cannot write",
        "step 2: its figures are in metrics.jsonl alone (cannot write",
        "step 4: no result of evaluate: CUDA out of memory. Tried to allocate 20 GiB; training goes on",
    ):
        assert line in said
    assert [line["step"] for line in run_lines(run)] == [1, 2, 2, 3, 4]
    monkeypatch.setattr(evaluation, "write_atomically", write)
    monkeypatch.setattr(Judges, "rows", judge)
    assert main(run_command(tiny_run, run, steps=4, **evaluates)) == 0
    assert list(evaluations_of(run)) == [4]


# -- mistakes

MISTAKES = {
    "nothing to judge by": ({"train": "", "test": ""}, "--evaluate.reference and --evaluate.inception"),
    "a folder that is not there": ({"train": "/nowhere"}, "/nowhere"),
    "a reference as well": ({"reference": "x.npz"}, "got --evaluate.reference and --evaluate.train"),
    "a network without a reference": (
        {"inception": "CHANGELOG.md", "train": "", "test": ""},
        "got --evaluate.inception without --evaluate.reference",
    ),
    "a width that is not tracked": (
        {"sigma_rel": "[0.1,0.2]"},
        "evaluate.sigma_rel: got 0.2, want widths that the run tracks; --posthoc_ema.sigma_rel is [0.1]",
    ),
    "a figure that nobody computes": ({"best": "fid"}, "evaluate: best 'fid': the judges have accuracy, frechet_dist"),
    "a file that is no network": ({"reference": "{0}.npz", "inception": "{0}", "train": "", "test": ""}, "{0}"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_about_evaluation_is_answered_before_training(mistake, tiny_run, evaluates, tmp_path, capsys):
    flags, said = MISTAKES[mistake]
    network = tmp_path / "network.pt"
    network.write_bytes(b"something else")
    np.savez(f"{network}.npz", arr_0=np.zeros((8, 32, 32, 3), np.uint8))
    flags = evaluates | {f"evaluate.{name}": value.format(network) for name, value in flags.items()}
    command = run_command(tiny_run, tmp_path / "run", steps=2, **flags | {"posthoc_ema.sigma_rel": "[0.1]"})
    fails(capsys, command, "evaluate", said.format(network))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_mistakes_about_the_probe_are_answered_before_anything_is_written(
    tiny_run, probes, digits, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    command = functools.partial(run_command, tiny_run, run, "pretrain", steps=7)
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
        fails(capsys, command(**probes | flags), *expected)
        assert not run.exists()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    fails(capsys, command(**probes), "scikit-learn", "pip install")
    assert not run.exists()
