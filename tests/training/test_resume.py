"""A killed run, started again, continues with the same numbers as if it had never stopped."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from epg_fast.__main__ import main

JOBS = {
    "pretrain": ["pretrain", "--config", "digits_pretrain"],
    "diffusion": ["finetune-diffusion", "--config", "digits_diffusion", "--preview.every", "0"],
    "consistency": ["finetune-consistency", "--config", "digits_consistency", "--preview.every", "0"],
}
TIMINGS = ("images_per_second", "data_wait")


def _command(job, tiny_run, outdir, **extra):
    # Dropout must draw the same masks again.
    dropout = [] if job == "pretrain" else ["--dropout", "0.5"]
    flags = [word for name, value in extra.items() for word in (f"--{name}", str(value))]
    name, *recipe = JOBS[job]
    return [name, *tiny_run[:2], *recipe, *tiny_run[2:], *dropout, *flags, "--outdir", str(outdir)]


def _lines(outdir):
    path = Path(outdir) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def _assert_same_run(got, want):
    assert _lines(got) == _lines(want)
    got, want = load_file(got / "model.safetensors"), load_file(want / "model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("job", JOBS)
def test_kill_9_and_resume_is_bit_identical(job, tiny_run, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Workers on in the killed run only: they must not matter either.
    command = [sys.executable, "-m", "epg_fast"]
    assert subprocess.run([*command, *_command(job, tiny_run, whole, steps=34)], capture_output=True).returncode == 0
    process = subprocess.Popen(
        [*command, *_command(job, tiny_run, killed, steps=34, **{"data.workers": 1})], stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while len(_lines(killed)) < 16 and time.time() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = len(_lines(killed))
    assert 16 <= reached < 34, f"the run was at step {reached} when it was killed"
    done = subprocess.run([*command, *_command(job, tiny_run, killed, steps=34)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    _assert_same_run(killed, whole)


def test_a_log_interval_cut_by_a_checkpoint_gives_the_same_means(tiny_run, tmp_path, monkeypatch):
    """Checkpoints every 10 steps, lines every 7: the unfinished interval is part of the checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(_command("diffusion", tiny_run, whole, steps=28, log_every=7)) == 0
    import epg_fast.training.loop as loop

    save = loop.RunState.save

    def save_then_crash(self, outdir, metrics):
        save(self, outdir, metrics)
        if self.step == 10:
            raise RuntimeError("crash")

    monkeypatch.setattr(loop.RunState, "save", save_then_crash)
    assert main(_command("diffusion", tiny_run, cut, steps=28, log_every=7)) == 1
    monkeypatch.undo()
    assert main(_command("diffusion", tiny_run, cut, steps=28, log_every=7)) == 0
    _assert_same_run(cut, whole)


def test_a_finished_run_is_left_alone(tiny_run, tmp_path, capsys):
    command = _command("diffusion", tiny_run, tmp_path / "run", steps=3)
    assert main(command) == 0
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*.pt")}
    assert main(command) == 0
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*.pt")} == before
    assert "complete" in capsys.readouterr().err
