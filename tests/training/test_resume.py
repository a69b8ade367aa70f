"""A killed run, started again, continues with the same numbers as if it had never stopped."""

import functools
import signal
import subprocess
import sys
import time

import pytest

from epg_fast.__main__ import main
from epg_fast.data.loading.dali import dali_status
from epg_fast.ops import extension_status
from tests.training.runs import (
    assert_same_run,
    before_step,
    crashes_after_save,
    run_command,
    run_lines,
    saved_steps,
    send,
)
from tests.training.stages import spoil

POSTHOC = {"posthoc_ema.sigma_rel": "[0.05,0.1]", "posthoc_ema.every": 3}
RUNS = {
    "GradCache, loss scale": ("pretrain", {"gradient_accumulation": 2, "precision": "fp16"}),
    "EMA in host memory": (
        "finetune-diffusion",
        POSTHOC | {"offload_ema": "true", "optimizer.backend": "torch"},
    ),
    "micro-batches": (
        "finetune-consistency",
        POSTHOC | {"gradient_accumulation": 2, "precision": "bf16"},
    ),
}


def bad_batches(state, batch):
    """Gradients that are not finite before, at and after the checkpoint of 4."""
    if state.iteration in (1, 3, 6):
        spoil(batch)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_crashed_and_stopped_runs_go_on_bit_for_bit(run, tiny_run, tmp_path, monkeypatch):
    """Over skipped batches, with an unfinished interval of metrics; then once more after a signal."""
    job, flags = RUNS[run]
    command = functools.partial(run_command, tiny_run, job=job, steps=9, checkpoint_every=4, log_every=3, **flags)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    before_step(monkeypatch, bad_batches)
    assert main(command(whole)) == 0
    crashes_after_save(command(cut), 4)
    assert saved_steps(cut) == [4]
    with monkeypatch.context() as patched:
        before_step(patched, lambda state, batch: state.iteration == 6 and send())
        assert main(command(cut)) == 0
    assert saved_steps(cut) == [7, 4]
    assert main(command(cut)) == 0
    assert [line["step"] for line in run_lines(cut)] == [3, 6, 9]
    assert_same_run(cut, whole)


@pytest.mark.slow
def test_kill_9_and_resume_is_bit_identical(tiny_run, tmp_path, capsys):
    job, dali = "pretrain", dali_status()[0] and extension_status()[0]
    tiny_run = [*tiny_run, "--data.backend", "dali" if dali else "pillow"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(run_command(tiny_run, whole, job, steps=24)) == 0
    # Workers on in the killed run only: they must not matter either.
    workers = {"data.workers": 1, "data.readers": 2}
    command = run_command(tiny_run, killed, job, steps=24, **workers)
    process = subprocess.Popen([sys.executable, "-m", "epg_fast", *command], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(run_lines(killed)) < 12 and time.time() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 12 <= len(run_lines(killed)) < 24
    assert main(run_command(tiny_run, killed, job, steps=24)) == 0
    assert "resuming" in capsys.readouterr().err
    assert_same_run(killed, whole)


def test_a_finished_run_is_left_alone(tiny_run, tmp_path, capsys):
    command, run = run_command(tiny_run, tmp_path / "run", steps=3), tmp_path / "run"
    assert main(command) == 0
    before = {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.is_file()}
    assert main(command) == 0
    assert {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.is_file()} == before
    assert "complete" in capsys.readouterr().err
