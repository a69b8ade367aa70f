"""Runs that are asked to end, wait for a disk, lose a rank or cannot save."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from epg_fast.__main__ import main
from epg_fast.data.loading import prefetch
from epg_fast.models import load_weights
from epg_fast.training import checkpoint, loop, state
from tests.training.runs import (
    assert_same_run,
    before_step,
    crashes_after_save,
    hang,
    run_command,
    run_lines,
    saved_steps,
    send,
)
from tests.training.stages import spoil


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends(number, tiny_run, tmp_path, monkeypatch, capsys):
    """That the run goes on bit for bit is tested in test_resume."""
    handler = signal.getsignal(number)
    before_step(monkeypatch, lambda state, batch: state.iteration == 2 and send(number))
    assert main(run_command(tiny_run, tmp_path / "run", steps=5)) == 0
    assert signal.getsignal(number) == handler
    assert f"{number.name}: stopped at step 3; the same command goes on" in capsys.readouterr().err
    assert saved_steps(tmp_path / "run") == [3]


def test_signals_in_the_last_step_and_while_it_is_saved_change_nothing(tiny_run, tmp_path, monkeypatch, capsys):
    def save_slowly(*arguments):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            send(number)
            time.sleep(0.02)
        checkpoint.write_checkpoint(*arguments)

    before_step(monkeypatch, lambda state, batch: state.iteration == 2 and send())
    monkeypatch.setattr(state, "write_checkpoint", save_slowly)
    assert main(run_command(tiny_run, tmp_path / "run", steps=3)) == 0
    assert "stopped" not in capsys.readouterr().err
    assert saved_steps(tmp_path / "run") == [3] and len(run_lines(tmp_path / "run")) == 3


@pytest.mark.parametrize("at", [0, 3])
def test_a_run_that_waits_for_data_saves_and_ends(at, tiny_run, tmp_path, monkeypatch):
    """Also before its first batch: no average can be put together from a snapshot of step 0."""
    flags = {"steps": 4, "keep_every": 10, "posthoc_ema.sigma_rel": "[0.05,0.1]", "posthoc_ema.every": 2}
    whole, stopped, hangs = tmp_path / "whole", tmp_path / "stopped", threading.Event()
    stalled = loop._Run._stalled

    def ask_to_end(run, seconds):
        if run.state.iteration == at:
            send()
        stalled(run, seconds)

    with monkeypatch.context() as patched:
        hang(patched, at, lambda: hangs.wait(60))
        patched.setattr(prefetch, "_GRACE", 0.1)
        patched.setattr(loop._Run, "_stalled", ask_to_end)
        assert main(run_command(tiny_run, stopped, **flags)) == 0
    hangs.set()
    assert saved_steps(stopped) == [at] and not list(stopped.glob("kept/*"))
    assert len(list(stopped.glob("posthoc_ema/*"))) == at // 2
    assert main(run_command(tiny_run, whole, **flags)) == 0
    assert main(run_command(tiny_run, stopped, **flags)) == 0
    assert_same_run(stopped, whole)


KEPT = "kept/step_{:09d}.safetensors"


def test_a_run_that_dies_between_weights_and_checkpoint_is_not_complete(tiny_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    command = run_command(tiny_run, run, steps=4, checkpoint_every=2, keep_every=2)
    weights = state.save_weights

    def die_at_4(path, tensors, metadata):
        if metadata["step"] == 4 and path.name == "model.safetensors":
            raise OSError("no room")
        weights(path, tensors, metadata)

    with monkeypatch.context() as patched:
        patched.setattr(state, "save_weights", die_at_4)
        assert main(command) == 1
    assert saved_steps(run) == [2]
    (run / "checkpoints/.step_000000004.tmp").mkdir()
    (run / "previews").mkdir()
    left = ["checkpoints/.step_000000004.tmp", ".model.safetensors.tmp7", "previews/.step_000000004.png.7.tmp"]
    for name in left[1:]:
        (run / name).write_bytes(b"left behind by a killed run")
    assert main(command) == 0
    assert saved_steps(run) == [4, 2] and not any((run / name).exists() for name in left)
    assert load_weights(run)[1]["step"] == 4
    two, four, newest = (load_file(run / name) for name in (KEPT.format(2), KEPT.format(4), "model.safetensors"))
    assert all(torch.equal(four[name], newest[name]) for name in newest)
    assert not all(torch.equal(two[name], newest[name]) for name in newest)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_a_line(tiny_run, tmp_path, monkeypatch, capsys):
    run, weights = tmp_path / "run", checkpoint.save_weights

    def full_at_6(path, *arguments):
        if "step_000000006" in str(path):
            raise OSError(f"could not write {path}: No space left on device")
        weights(path, *arguments)

    monkeypatch.setattr(checkpoint, "save_weights", full_at_6)
    assert main(run_command(tiny_run, run, steps=100000, checkpoint_every=3)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "No space left" in line and "step_000000003 is intact" in line and "the same command goes on" in line
    assert saved_steps(run) == [3] and len(run_lines(run)) < 1000
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000000003"]


def test_a_preview_in_which_the_run_was_killed_is_drawn_by_the_next(tiny_run, tmp_path):
    """Also that of the last step, after which nothing is left to train."""
    flags = {"steps": 4, "checkpoint_every": 2, "preview.every": 2, "preview.num": 1, "preview.steps": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(run_command(tiny_run, whole, **flags)) == 0
    for step in (2, 4):
        crashes_after_save(run_command(tiny_run, killed, **flags), step)
        assert saved_steps(killed)[0] == step and len(list(killed.glob("previews/*"))) == (step - 2) // 2
    assert main(run_command(tiny_run, killed, **flags)) == 0
    assert len(list((whole / "previews").iterdir())) == 2
    assert_same_run(killed, whole)


def test_a_run_that_diverges_ends_at_a_line_of_metrics(tiny_run, tmp_path, monkeypatch, capsys):
    before_step(monkeypatch, lambda state, batch: spoil(batch))
    monkeypatch.setattr(state, "_MAX_SKIPPED_IN_A_ROW", 5)
    assert main(run_command(tiny_run, tmp_path / "run", steps=20, log_every=4)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "not finite for 8 batches in a row at step 8; training diverged: lower --optimizer.lr" in lines[-1]
    assert sum("not finite for 4 more of the batches" in line for line in lines) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_a_run_outlives_its_ranks(tiny_run, tmp_path, capsys):
    """`kill -9` of one of two, then on with a single one; EMA in host memory. SIGTERM of one: test_distributed."""
    run = tmp_path / "run"
    options = {"offload_ema": "true", "posthoc_ema.sigma_rel": "[0.1]", "checkpoint_every": 5}
    command = run_command(tiny_run, run, steps=40, **options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "epg_fast"]
    process = subprocess.Popen([*torchrun, *command], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not saved_steps(run):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(max(map(int, ranks)), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0, said
    assert main(command) == 0
    assert f"resuming {run} at step " in capsys.readouterr().err
    assert [line["step"] for line in run_lines(run)] == list(range(1, 41))
