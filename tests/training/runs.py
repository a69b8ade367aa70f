"""Whole runs of the command line, and what they leave behind."""

import json
import os
import signal
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from epg_fast.training import loop
from epg_fast.training.checkpoint import iteration_of, list_checkpoints
from epg_fast.training.state import RunState

JOBS = {
    "pretrain": ["pretrain", "--config", "digits_pretrain"],
    "diffusion": ["finetune-diffusion", "--config", "digits_diffusion", "--preview.every", "0"],
    "consistency": ["finetune-consistency", "--config", "digits_consistency", "--preview.every", "0"],
}
TIMINGS = ("images_per_second", "data_wait")


def run_command(job, tiny_run, outdir, **extra):
    # Dropout must draw the same masks again.
    dropout = [] if job == "pretrain" else ["--dropout", "0.5"]
    flags = [word for name, value in extra.items() for word in (f"--{name}", str(value))]
    name, *recipe = JOBS[job]
    return [name, *tiny_run[:2], *recipe, *tiny_run[2:], *dropout, *flags, "--outdir", str(outdir)]


def run_lines(outdir):
    path = Path(outdir) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def saved_steps(outdir):
    return [iteration_of(path) for path in list_checkpoints(Path(outdir) / "checkpoints")]


def saved_state(outdir):
    """state.json of the newest checkpoint."""
    return json.loads((list_checkpoints(Path(outdir) / "checkpoints")[0] / "state.json").read_text())


def change_saved_state(outdir, **entries):
    """Change state.json of the newest checkpoint, and its checksum."""
    path = list_checkpoints(Path(outdir) / "checkpoints")[0]
    content = json.dumps(saved_state(outdir) | entries).encode()
    (path / "state.json").write_bytes(content)
    checksums = json.loads((path / "checksums.json").read_text())
    checksums["state.json"] = [len(content), zlib.crc32(content)]
    (path / "checksums.json").write_text(json.dumps(checksums))


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


def before_step(monkeypatch, act):
    """Let `act(state, batch)` be called before every step."""
    step = loop.train_step

    def act_and_step(state, batch, metrics):
        act(state, batch)
        step(state, batch, metrics)

    monkeypatch.setattr(loop, "train_step", act_and_step)


def spoil(batch):
    """Make the gradient of a batch NaN."""
    batch["x"] = torch.full(batch["x"].shape, float("nan"))


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
