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
from epg_fast.training import checkpoint, dataset, state
from tests.training.runs import (
    assert_same_run,
    before_step,
    crash_after_save,
    fails,
    run_command,
    run_lines,
    saved_state,
    saved_steps,
    send,
)
from tests.training.stages import CPU, spoil

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
    with monkeypatch.context() as patched:
        crash_after_save(patched, 4)
        assert main(command(cut)) == 1
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


def resolved(there):
    """`resolve_backend` of a machine where these decoders are installed; `auto` takes the first."""

    def resolve(name, device):
        if name not in ("auto", *there):
            raise ValueError(f"{name} cannot be imported")
        return there[0] if name == "auto" else name

    return resolve


@pytest.mark.parametrize(
    "wanted, used, chosen, warnings",
    [
        *(("auto", None, "dali", 0), ("pillow", None, "pillow", 0), ("dali", None, "dali", 0)),
        *(("auto", "pillow", "pillow", 0), ("auto", "dali", "dali", 0), ("dali", "dali", "dali", 0)),
        ("dali", "pillow", "dali", 1),
    ],
)
def test_a_run_keeps_its_decoder_unless_another_is_named(wanted, used, chosen, warnings, monkeypatch, log):
    monkeypatch.setattr(dataset, "resolve_backend", resolved(["dali", "pillow"]))
    assert dataset.choose_backend(wanted, used, CPU) == chosen
    assert sum("so far, now by" in message for message in log.messages) == warnings


def test_a_run_whose_decoder_is_gone_says_what_to_do(tiny_run, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    command = run_command(tiny_run, run, steps=2, checkpoint_every=1)

    def write_as_by_dali(folder, step, parts, saved, *rest):
        checkpoint.write_checkpoint(folder, step, parts, saved | {"data_backend": "dali"}, *rest)

    with monkeypatch.context() as patched:
        crash_after_save(patched, 1)
        patched.setattr(state, "write_checkpoint", write_as_by_dali)
        assert main(command) == 1
    monkeypatch.setattr(dataset, "resolve_backend", resolved(["pillow"]))
    before = run_lines(run)
    wanted = ("dali cannot be imported", "pip install nvidia-dali", "--data.backend pillow")
    fails(capsys, [*command, "--data.backend", "auto"], *wanted)
    assert run_lines(run) == before
    assert main(command) == 0 and saved_state(run)["data_backend"] == "pillow"
    assert "decoded by dali so far, now by pillow as asked" in capsys.readouterr().err
