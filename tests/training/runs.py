"""Whole runs of the command line, and what they leave behind."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from epg_fast.__main__ import main
from epg_fast.training import loop
from epg_fast.training.checkpoint import by_step
from epg_fast.training.state import RunState
from tests.training.stages import JOBS

TIMINGS = ("images_per_second", "data_wait", "evaluation_seconds")


def run_command(tiny_run, outdir, job="finetune-diffusion", **extra):
    # Dropout must draw the same masks again.
    own = [] if job == "pretrain" else ["--preview.every", "0", "--dropout", "0.5"]
    flags = [word for name, value in extra.items() for word in (f"--{name}", str(value))]
    recipe = ["--config", f"digits_{JOBS[job].lower()}"]
    return [job, *tiny_run[:2], *recipe, *tiny_run[2:], *own, *flags, "--outdir", str(outdir)]


def fails(capsys, arguments, *expected):
    """The command ends with exit code 2 and one line that has all of this."""
    assert main([str(a) for a in arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(text in line for text in expected), line


def in_new_process(act, data, folder):
    """`act(data, folder)`, a module's function, in a new process, which forks ranks."""
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "kernels"))), "OMP_NUM_THREADS": "1"}
    code = f"import sys; from pathlib import Path; from {act.__module__} import {act.__name__}; "
    code += f"{act.__name__}(*map(Path, sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(data), str(folder)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]


def few_digits(digits, folder):
    """Make train/ and test/ with a few images of each class, which are quick to judge."""
    for part, number in (("train", 12), ("test", 6)):
        for of_class in (digits / part).iterdir():
            (folder / part / of_class.name).mkdir(parents=True)
            for path in sorted(of_class.iterdir())[:number]:
                (folder / part / of_class.name / path.name).hardlink_to(path)
    return folder


def lines_of(outdir):
    """The lines of metrics.jsonl, whole."""
    path = Path(outdir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_lines(outdir):
    """The lines of metrics.jsonl without what time measures."""
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines_of(outdir)]


def forget_figures(outdir, step=0):
    """Take what was measured from `step` on away from metrics.jsonl, and return it: [(step, figures)]."""
    lines = lines_of(outdir)
    kept = [line for line in lines if "lr" in line or line["step"] < step]
    (Path(outdir) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    found = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines if line not in kept]
    return [(line.pop("step"), line) for line in found]


def evaluations_of(outdir):
    """{step: {weights: what evaluation/step_<step>.json says of them}}"""
    files = by_step(Path(outdir) / "evaluation", ".json")
    contents = {step: json.loads(path.read_text()) for step, path in sorted(files.items())}
    assert all(content["step"] == step for step, content in contents.items())
    return {step: content["weights"] for step, content in contents.items()}


def saved_steps(outdir):
    return [*by_step(Path(outdir) / "checkpoints")]


def saved_state(outdir):
    """state.json of the newest checkpoint."""
    return json.loads((Path(outdir) / f"checkpoints/step_{saved_steps(outdir)[0]:09d}/state.json").read_text())


def assert_same_run(got, want):
    """Bit for bit: metrics, weights, everything in the newest checkpoint, snapshots, previews and evaluations."""
    assert run_lines(got) == run_lines(want)
    assert saved_steps(got)[0] == saved_steps(want)[0] and saved_state(got) == saved_state(want)
    assert evaluations_of(got) == evaluations_of(want)
    names = [f"checkpoints/step_{saved_steps(want)[0]:09d}/*.safetensors", "*.safetensors", "posthoc_ema/*.safetensors"]
    for name in names:
        files = [{path.name: path for path in run.glob(name)} for run in (got, want)]
        assert files[0].keys() == files[1].keys()
        for one, other in zip(files[0].values(), (files[1][name] for name in files[0]), strict=True):
            tensors, wanted = load_file(one), load_file(other)
            assert tensors.keys() == wanted.keys()
            differing = [name for name in wanted if not torch.equal(tensors[name], wanted[name])]
            assert not differing, differing
            with safe_open(one, "pt") as file, safe_open(other, "pt") as wanted:
                assert file.metadata() == wanted.metadata()
    pictures = [{path.name: path.read_bytes() for path in run.glob("previews/*.png")} for run in (got, want)]
    assert pictures[0] == pictures[1]


def assert_same_training(measured, plain):
    """Bit for bit, but for what measurements add; returns what they found."""
    trained = measured.with_name(f"{measured.name}, without its figures")
    shutil.copytree(measured, trained)
    found = forget_figures(trained)
    assert found and not (plain / "evaluation").exists()
    shutil.rmtree(trained / "evaluation", ignore_errors=True)
    (trained / "best.safetensors").unlink(missing_ok=True)
    assert_same_run(trained, plain)
    return found


class Killed(BaseException):
    """As SIGKILL: nothing that a run catches."""


def kill():
    raise Killed


def crash_after_save(monkeypatch, step):
    """Let a run end with an exception when it has saved `step`."""
    save = RunState.save

    def save_then_crash(self, metrics):
        save(self, metrics)
        if self.iteration == step:
            raise RuntimeError("crash")

    monkeypatch.setattr(RunState, "save", save_then_crash)


def crashes_after_save(command, step):
    """The command ends with an exception when it has saved `step`."""
    with pytest.MonkeyPatch.context() as patched:
        crash_after_save(patched, step)
        assert main(command) == 1


def before_step(monkeypatch, act):
    """Let `act(state, batch)` be called before every step."""
    step = loop.train_step

    def act_and_step(state, batch, metrics):
        act(state, batch)
        step(state, batch, metrics)

    monkeypatch.setattr(loop, "train_step", act_and_step)


class _Hanging:
    """A loader whose disk hangs at a batch."""

    def __init__(self, loader, at, wait):
        self.loader, self.at, self.wait = loader, at, wait

    def __iter__(self):
        return self

    def __next__(self):
        if self.loader.iteration == self.at:
            self.wait()
        return next(self.loader)

    def __getattr__(self, name):
        return getattr(self.loader, name)


def hang(monkeypatch, at, wait):
    """Let the loader call `wait` before batch `at`, which the run takes for a disk that hangs after 0.2 s."""
    make = loop.make_loader
    monkeypatch.setattr(loop, "make_loader", lambda *a, **k: _Hanging(make(*a, **k), at, wait))
    monkeypatch.setattr(loop, "Prefetcher", functools.partial(loop.Prefetcher, patience=0.2))


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
