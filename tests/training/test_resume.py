"""Runs that are cut short, wait for a disk, lose a rank or cannot save, and go on as if they had never stopped."""

import contextlib
import functools
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
from epg_fast.distributed import TIMEOUT, torchrun_store
from epg_fast.evaluation.judge import Judges
from epg_fast.models import load_weights
from epg_fast.training import checkpoint, loop, state
from epg_fast.training.ema import HostEma
from tests.training.runs import (
    Killed,
    assert_same_run,
    before_step,
    crash_after_save,
    few_digits,
    hang,
    kill,
    run_command,
    run_lines,
    saved_steps,
    send,
)
from tests.training.stages import spoil

POSTHOC = {"posthoc_ema.sigma_rel": "[0.05,0.1]", "posthoc_ema.every": 3, "optimizer.backend": "torch"}


# ---- ways to cut a run short; each installs itself


def crash(step):
    """Between the checkpoint of a step and what is measured of it."""
    return lambda patched: crash_after_save(patched, step)


def stop(step):
    """A signal, before a step that is still made."""
    return lambda patched: before_step(patched, lambda state, batch: state.iteration == step and send())


def in_evaluation(step, act):
    """When the evaluation of a step has judged two batches."""

    def install(patched):
        figures, judge, seen = loop.Evaluation.figures, Judges.rows, []

        def noted(self):
            seen[:] = [self._state.iteration, 0]
            return figures(self)

        def judged(self, *arguments):
            found = judge(self, *arguments)
            if seen:
                seen[1] += 1
            if seen == [step, 2]:
                act()
            return found

        patched.setattr(loop.Evaluation, "figures", noted)
        patched.setattr(Judges, "rows", judged)

    return install


def before_its_line(patched):
    """Between the files of an evaluation and its line of metrics."""
    write = loop.Metrics.write_figures
    killed = lambda self, step, figures: kill() if "accuracy" in figures else write(self, step, figures)  # noqa: E731
    patched.setattr(loop.Metrics, "write_figures", killed)


RUNS = {
    "GradCache, loss scale, collapse and probe": (
        "pretrain",
        {"gradient_accumulation": 2, "precision": "fp16", "collapse.every": 2, "probe.every": 3},
        [(crash(4), [4]), (stop(6), [7, 4]), (stop(7), [8, 7]), (crash(9), [9, 8])],
    ),
    "EMA in host memory or not, previews and evaluations": (
        "finetune-diffusion",
        POSTHOC | {"preview.every": 4, "evaluate.every": 2, "evaluate.sigma_rel": "[0.1]"},
        [
            (in_evaluation(2, kill), []),
            (crash(4), [4]),
            (in_evaluation(4, kill), [4]),
            (stop(4), [5, 4]),
            (in_evaluation(6, send), [6, 5]),
            (before_its_line, [6, 5]),
            (in_evaluation(8, kill), [8, 6]),
            (crash(9), [9, 8]),
            (in_evaluation(9, send), [9, 8]),
        ],
    ),
    "micro-batches": (
        "finetune-consistency",
        POSTHOC | {"gradient_accumulation": 2, "precision": "bf16"},
        [(crash(4), [4]), (stop(6), [7, 4])],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_run_that_was_cut_short_goes_on_bit_for_bit(run, tiny_run, digits, tmp_path, monkeypatch, capsys):
    """Over skipped batches, in an interval of metrics; no figure, picture or snapshot is lost or of other weights."""
    job, flags, cuts = RUNS[run]
    few = few_digits(digits, tmp_path / "few")
    if job == "pretrain":
        flags = flags | {"probe.test": few / "test", "probe.num": "[60,30]"}
    elif "evaluate.every" in flags:
        judged = {"num": 20, "batch_size": 8, "components": 5, "train": few / "train", "test": few / "test"}
        flags = flags | {f"evaluate.{name}": value for name, value in judged.items()}
        flags |= {"preview.num": 1, "preview.steps": 2}
    command = functools.partial(run_command, tiny_run, job=job, steps=9, checkpoint_every=4, log_every=3, **flags)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # gradients that are not finite before, at and after the checkpoint of 4
    before_step(monkeypatch, lambda state, batch: state.iteration in (2, 3, 4) and spoil(batch))
    average = HostEma._average  # slow, so that whoever does not wait for it is seen
    monkeypatch.setattr(HostEma, "_average", lambda *arguments: (time.sleep(0.03), average(*arguments)))
    moved = [{"offload_ema": where} if job == "finetune-diffusion" else {} for where in ("true", "false")]
    assert main(command(whole, **moved[0])) == 0
    for i, (install, saved) in enumerate([*cuts, (lambda patched: None, None)]):
        with pytest.MonkeyPatch.context() as patched, contextlib.suppress(Killed):
            install(patched)
            main(command(cut, **moved[i % 2]))
        assert saved is None or saved_steps(cut)[:2] == saved
    assert_same_run(cut, whole)
    said = capsys.readouterr().err
    assert ("step 6: no result of evaluate yet; the same command begins with it" in said) == ("evaluate.every" in flags)


def test_a_finished_run_is_left_alone(tiny_run, tmp_path, capsys):
    command, run = run_command(tiny_run, tmp_path / "run", steps=3), tmp_path / "run"
    assert main(command) == 0
    before = {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.is_file()}
    assert main(command) == 0
    assert {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.is_file()} == before
    assert "complete" in capsys.readouterr().err


# ---- runs that are asked to end, wait for a disk, lose a rank or cannot save


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends(number, tiny_run, tmp_path, monkeypatch, capsys):
    """That the run goes on bit for bit is tested above."""
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


@pytest.mark.parametrize("nodes, seen", [(1, False), (2, True)])
def test_a_restart_does_not_see_the_addresses_of_before(nodes, seen, monkeypatch):
    """torchrun keeps its store over restarts, whose count several nodes may not agree on."""
    kept = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *args, **kwargs: iter([(kept, 0, 2)]))
    for name, value in {"WORLD_SIZE": 2 * nodes, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RESTART_COUNT": 0}.items():
        monkeypatch.setenv(name, str(value))
    torchrun_store(TIMEOUT).set("address", "of a rank that is gone")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert torchrun_store(TIMEOUT).check(["address"]) == seen
