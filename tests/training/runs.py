"""Whole runs of the command line, and what they leave behind."""

import functools
import json
import os
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
from epg_fast.training.checkpoint import iteration_of, list_checkpoints
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


def forget_last_line(outdir):
    """Take the last line of metrics.jsonl away, as if the run had been killed before."""
    path = Path(outdir) / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def run_lines(outdir):
    path = Path(outdir) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def saved_steps(outdir):
    return [iteration_of(path) for path in list_checkpoints(Path(outdir) / "checkpoints")]


def saved_state(outdir):
    """state.json of the newest checkpoint."""
    return json.loads((list_checkpoints(Path(outdir) / "checkpoints")[0] / "state.json").read_text())


def assert_same_run(got, want):
    """Bit for bit: metrics, weights, everything in the newest checkpoint, snapshots and previews."""
    assert run_lines(got) == run_lines(want)
    assert saved_steps(got)[0] == saved_steps(want)[0] and saved_state(got) == saved_state(want)
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
    for picture in (want / "previews").glob("*.png"):
        assert (got / "previews" / picture.name).read_bytes() == picture.read_bytes()


def crash_after_save(monkeypatch, step):
    """Let a run end with an exception when it has saved `step`."""
    save = RunState.save

    def save_then_crash(self, outdir, metrics):
        save(self, outdir, metrics)
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
