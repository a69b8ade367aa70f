"""Whole runs of the command line, and what they leave behind."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

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


def assert_same_run(got, want):
    assert run_lines(got) == run_lines(want)
    got, want = load_file(got / "model.safetensors"), load_file(want / "model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def crash_after_save(monkeypatch, step):
    """Let a run end with an exception when it has saved `step`."""
    save = RunState.save

    def save_then_crash(self, outdir, metrics):
        save(self, outdir, metrics)
        if self.step == step:
            raise RuntimeError("crash")

    monkeypatch.setattr(RunState, "save", save_then_crash)
