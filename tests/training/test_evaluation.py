"""Evaluation while training: right figures, the best weights, and a run that is what it is without."""

import functools
import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from epg_fast.__main__ import main
from epg_fast.evaluation.judge import Judges
from epg_fast.models import compilation, load_weights
from epg_fast.sampling import engine
from epg_fast.training import evaluation, loop
from tests.training import evaluation_worker
from tests.training.runs import (
    assert_same_run,
    before_step,
    fails,
    forget_last_line,
    in_new_process,
    run_command,
    run_lines,
    saved_steps,
    send,
)

FIGURES = {"accuracy", "frechet_distance"}
POSTHOC = {"posthoc_ema.sigma_rel": "[0.05,0.1]", "posthoc_ema.every": 3}
WIDTHS = POSTHOC | {"evaluate.sigma_rel": "[0.1]"}


@pytest.fixture(scope="module")
def few_digits(digits, tmp_path_factory):
    """train/ and test/ with a few images of each class, which are read at every evaluation."""
    folder = tmp_path_factory.mktemp("few_digits")
    for part, number in (("train", 12), ("test", 6)):
        for of_class in (digits / part).iterdir():
            (folder / part / of_class.name).mkdir(parents=True)
            for path in sorted(of_class.iterdir())[:number]:
                (folder / part / of_class.name / path.name).hardlink_to(path)
    return folder


@pytest.fixture
def evaluates(few_digits):
    """Flags of an evaluation of 20 images in three batches at every other step, judged as small data."""
    return {
        "evaluate.every": 2,
        "evaluate.num": 20,
        "evaluate.batch_size": 8,
        "evaluate.components": 5,
        "evaluate.train": few_digits / "train",
        "evaluate.test": few_digits / "test",
        "preview.steps": 2,
    }


def figures_of(run):
    """{step: {weights: what evaluation/step_<step>.json says of them}}"""
    files = {path: json.loads(path.read_text()) for path in sorted((run / "evaluation").glob("step_*.json"))}
    assert all(path.name == f"step_{content['step']:09d}.json" for path, content in files.items())
    return {content["step"]: content["weights"] for content in files.values()}


def assert_same_evaluations(got, want):
    assert figures_of(got) == figures_of(want) and figures_of(want)
    assert_same_run(got, want)


def assert_same_training(with_it, without):
    """Bit for bit, but for what evaluation adds."""
    trained = with_it.with_name(f"{with_it.name}, without what evaluation adds")
    shutil.copytree(with_it, trained)
    lines = (with_it / "metrics.jsonl").read_text().splitlines(keepends=True)
    (trained / "metrics.jsonl").write_text("".join(line for line in lines if "evaluation_seconds" not in line))
    (trained / "best.safetensors").unlink()
    assert_same_run(trained, without)


def during_evaluation(monkeypatch, step, act, rows=1):
    """Let `act` be called when the evaluation of `step` has judged so many batches."""
    figures, judge, seen = loop.Evaluation.figures, Judges.rows, []

    def noted(self):
        seen[:] = [self._state.iteration, 0]
        return figures(self)

    def judged(self, *arguments):
        if seen:
            seen[1] += 1
        found = judge(self, *arguments)
        if seen == [step, rows]:
            act()
        return found

    monkeypatch.setattr(loop.Evaluation, "figures", noted)
    monkeypatch.setattr(Judges, "rows", judged)


class Killed(BaseException):
    """As SIGKILL: nothing that a run catches."""


def kill():
    raise Killed


RUNS = {
    "diffusion, widths": ("finetune-diffusion", WIDTHS),
    "diffusion, EMA in host memory": ("finetune-diffusion", WIDTHS | {"offload_ema": "true"}),
    "diffusion, fp16": ("finetune-diffusion", {"precision": "fp16"}),
    "consistency, bf16": ("finetune-consistency", {"precision": "bf16", "preview.sampler": "onestep"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_nothing_of_the_training_changes(run, tiny_run, evaluates, tmp_path, monkeypatch):
    """Bit for bit, with evaluations in the middle of an interval of metrics, by judges that draw at random."""
    job, flags = RUNS[run]
    command = functools.partial(run_command, tiny_run, job=job, steps=7, log_every=3, checkpoint_every=4, **flags)
    figures, judge = loop.Evaluation.figures, Judges.rows

    def state(stage):
        modes = [module.training for module in stage.network.modules()]
        threads, products = torch.get_num_threads(), torch.get_float32_matmul_precision()
        generators = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
        return modes, threads, products, torch.is_grad_enabled(), generators

    def watched(self):
        before = state(self._stage)
        found = figures(self)
        assert found and state(self._stage) == before
        return found

    def draws(self, *arguments):
        torch.rand(3), np.random.rand(3), random.random()
        return judge(self, *arguments)

    monkeypatch.setattr(loop.Evaluation, "figures", watched)
    monkeypatch.setattr(Judges, "rows", draws)
    with_it, without = tmp_path / "with", tmp_path / "without"
    assert main(command(with_it, **evaluates)) == 0
    assert main(command(without, **({"preview.steps": 2}))) == 0
    assert figures_of(with_it).keys() == {2, 4, 6, 7} and not (without / "evaluation").exists()
    assert [line["step"] for line in run_lines(with_it)] == [2, 3, 4, 6, 6, 7, 7]
    assert_same_training(with_it, without)


@pytest.mark.slow
def test_what_the_first_evaluation_compiles_serves_the_others_and_training_compiles_nothing_again(
    tiny_run, evaluates, tmp_path, monkeypatch
):
    """Graphs are counted; no code is made of them, which would take long."""
    torch._dynamo.reset()
    for module in (compilation, engine):
        monkeypatch.setattr(module, "compile_options", lambda *_, **__: {"dynamic": False, "backend": "eager"})
    figures, compiled = loop.Evaluation.figures, []

    def counted(self):
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        found = figures(self)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return found

    monkeypatch.setattr(loop.Evaluation, "figures", counted)
    assert main(run_command(tiny_run, tmp_path / "run", steps=6, compile="blocks", **evaluates)) == 0
    before, first, *later = compiled
    assert first > before and later == [first] * 4


def test_figures_are_those_of_the_commands_sample_and_evaluate(tiny_run, evaluates, few_digits, tmp_path, capsys):
    """Also with the run's guidance; in metrics.jsonl with their spreads."""
    run, drawn = tmp_path / "run", tmp_path / "drawn"
    evaluates |= {"evaluate.num": 16, "preview.guidance": 2.0, "preview.interval": "[0.1,30.0]", "evaluate.seed": 7}
    assert main(run_command(tiny_run, run, steps=3, **evaluates)) == 0
    settings = {"num": 16, "batch_size": 8, "steps": 2, "guidance": 2.0, "interval": "[0.1,30.0]", "seed": 7}
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    assert main(["sample", "--checkpoint", str(run), "--outdir", str(drawn), "--device", "cpu", *words]) == 0
    real = ["--train", str(few_digits / "train"), "--test", str(few_digits / "test"), "--components", "5"]
    capsys.readouterr()
    assert main(["evaluate", "--samples", str(drawn / "samples.npz"), *real]) == 0
    judged = json.loads(capsys.readouterr().out)
    found = figures_of(run)[3]["ema"]
    assert found["figures"] == {name: pytest.approx(judged[name], rel=1e-9) for name in FIGURES}
    line = run_lines(run)[-1]
    assert line == {"step": 3} | found["figures"] | {f"{name}/spread": found["spread"][name] for name in FIGURES}
    assert found["spread"]["frechet_distance"] > 0


def test_inception_judges_a_run_against_a_reference_that_is_seen_once(tiny_run, tmp_path, tiny_inception):
    run, images = tmp_path / "run", tmp_path / "reference.npz"
    np.savez(images, arr_0=np.random.default_rng(0).integers(256, size=(30, 32, 32, 3), dtype=np.uint8))
    flags = {"evaluate.every": 1, "evaluate.num": 20, "evaluate.splits": 2, "preview.steps": 2}
    flags |= {"evaluate.reference": images, "evaluate.inception": tiny_inception}
    command = run_command(tiny_run, run, steps=2, **flags)
    assert main(command) == 0
    first = figures_of(run)
    assert {"fid", "inception_score", "precision", "recall"} <= first[2]["ema"]["figures"].keys()
    (reference,) = (run / "evaluation").glob("reference_*.npz")
    seen = reference.stat().st_mtime_ns
    (run / "evaluation/step_000000002.json").unlink()
    forget_last_line(run)
    assert main(command) == 0
    assert figures_of(run) == first and reference.stat().st_mtime_ns == seen
    assert load_weights(run / "best.safetensors")[1]["best"]["figure"] == "fid"


@pytest.mark.slow
def test_a_run_killed_in_evaluations_goes_on_exactly(tiny_run, evaluates, tmp_path, monkeypatch):
    """In one without a checkpoint; with one; between its figures and its line; in the last. None is lost or doubled."""
    command = functools.partial(run_command, tiny_run, steps=7, log_every=3, checkpoint_every=4, **WIDTHS, **evaluates)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(whole)) == 0
    for step, made in ((2, []), (4, [2]), (6, [2, 4]), (7, [2, 4, 6])):
        with monkeypatch.context() as patched:
            during_evaluation(patched, step, kill, rows=4)
            with pytest.raises(Killed):
                main(command(cut))
        assert list(figures_of(cut)) == made
    with monkeypatch.context() as patched:
        patched.setattr(loop.Metrics, "write_figures", lambda *arguments: kill())
        with pytest.raises(Killed):
            main(command(cut))
    assert list(figures_of(cut)) == [2, 4, 6, 7]
    assert main(command(cut)) == 0
    assert_same_evaluations(cut, whole)


@pytest.mark.slow
def test_evaluations_after_the_checkpoint_are_made_again(tiny_run, evaluates, tmp_path, monkeypatch):
    """They are gone until then, and nobody mistakes them for the run's own."""
    command = functools.partial(run_command, tiny_run, steps=6, checkpoint_every=3, **evaluates)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(whole)) == 0
    with monkeypatch.context() as patched:
        before_step(patched, lambda state, batch: state.iteration == 5 and kill())
        with pytest.raises(Killed):
            main(command(cut))
    assert saved_steps(cut) == [3] and list(figures_of(cut)) == [2, 4]
    there = []
    before_step(monkeypatch, lambda state, batch: there.append(list(figures_of(cut))))
    assert main(command(cut)) == 0
    assert there == [[2], [2, 4], [2, 4]]
    assert_same_evaluations(cut, whole)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5])
def test_a_signal_breaks_an_evaluation_off_and_the_next_run_begins_with_it(
    step, tiny_run, evaluates, tmp_path, monkeypatch, capsys
):
    """The checkpoint is of its step, though none was due; also in the last step."""
    command = functools.partial(run_command, tiny_run, steps=5, checkpoint_every=10, **evaluates)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(whole)) == 0
    with monkeypatch.context() as patched:
        during_evaluation(patched, step, send)
        assert main(command(cut)) == 0
    assert saved_steps(cut) == [step] and step not in figures_of(cut)
    said = capsys.readouterr().err
    assert f"step {step}: no result of evaluate yet; the same command begins with it" in said
    assert ("SIGTERM: stopped at step 2" in said) == (step == 2)
    assert main(command(cut)) == 0
    assert_same_evaluations(cut, whole)


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
    forget_last_line(run)
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
    assert list(figures_of(run)) == [4]


def test_images_that_are_not_finite_are_counted(tiny_run, evaluates, tmp_path, monkeypatch, capsys):
    def spoil(state, batch):
        with torch.no_grad():
            state.stage.ema.out.bias.fill_(float("nan"))

    before_step(monkeypatch, spoil)
    assert main(run_command(tiny_run, tmp_path / "run", steps=1, **evaluates)) == 0
    assert "ema: 20 of the images drawn are not finite, and judged as black" in capsys.readouterr().err
    assert figures_of(tmp_path / "run")[1]["ema"]["not_finite"] == 20


MISTAKES = {
    "nothing to judge by": (
        {"evaluate.test": "", "evaluate.train": ""},
        "--evaluate.reference and --evaluate.inception",
    ),
    "a folder that is not there": ({"evaluate.train": "/nowhere"}, "/nowhere"),
    "a reference as well": ({"evaluate.reference": "x.npz"}, "got --evaluate.reference and --evaluate.train"),
    "a network without a reference": (
        {"evaluate.inception": "CHANGELOG.md", "evaluate.train": "", "evaluate.test": ""},
        "got --evaluate.inception without --evaluate.reference",
    ),
    "a width that is not tracked": (
        {"evaluate.sigma_rel": "[0.1,0.2]", "posthoc_ema.sigma_rel": "[0.1]"},
        "evaluate.sigma_rel: got 0.2, want widths that the run tracks; --posthoc_ema.sigma_rel is [0.1]",
    ),
    "a figure that nobody computes": (
        {"evaluate.best": "fid"},
        "evaluate: best 'fid': the judges have accuracy, frechet_distance",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_before_training(mistake, tiny_run, evaluates, tmp_path, capsys):
    flags, said = MISTAKES[mistake]
    command = run_command(tiny_run, tmp_path / "run", steps=2, **evaluates | flags)
    fails(capsys, command, said)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_network_file_that_is_something_else_is_answered_before_training(tiny_run, tmp_path, capsys):
    network, reference = tmp_path / "network.pt", tmp_path / "reference.npz"
    network.write_bytes(b"something else")
    np.savez(reference, arr_0=np.zeros((8, 32, 32, 3), np.uint8))
    flags = {"evaluate.every": 2, "evaluate.reference": reference, "evaluate.inception": network}
    fails(capsys, run_command(tiny_run, tmp_path / "run", steps=2, **flags), "evaluate: ", str(network))
    assert run_lines(tmp_path / "run") == []


@pytest.fixture(scope="module")
def runs_of_ranks(few_digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    in_new_process(evaluation_worker.main, few_digits, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", evaluation_worker.SAME_WEIGHTS)
def test_figures_do_not_depend_on_the_ranks(name, runs_of_ranks):
    """Bit for bit, of the EMA and of a width: the weights of a complete run, which is asked for evaluation later."""
    want, got = figures_of(runs_of_ranks / "1 rank"), figures_of(runs_of_ranks / name)
    assert got == want and got[2].keys() == {"ema", "sigma_rel_0.1"} and got[2]["ema"] != got[2]["sigma_rel_0.1"]
    one, other = (load_file(runs_of_ranks / run / "best.safetensors") for run in ("1 rank", name))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", evaluation_worker.RUNS)
def test_nothing_of_the_training_changes_on_two_ranks(name, runs_of_ranks):
    with_it, without = (runs_of_ranks / f"{name}, {on}" for on in (True, False))
    assert figures_of(with_it).keys() == {2, 4}
    assert_same_training(with_it, without)


@pytest.mark.slow
@pytest.mark.parametrize("name", evaluation_worker.STOPPED)
def test_a_signal_to_one_rank_breaks_the_evaluation_off_on_all(name, runs_of_ranks):
    """And the same command goes on as if nothing had been."""
    stopped = runs_of_ranks / f"stopped {name}"
    assert saved_steps(stopped) == [4, 2]
    assert_same_evaluations(stopped, runs_of_ranks / f"{name}, True")
