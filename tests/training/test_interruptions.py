"""Runs that are asked to end, wait for a disk, lose a rank, skip an update or cannot save."""

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
from epg_fast.models import load_weights
from epg_fast.training import checkpoint, loop, preview, state
from epg_fast.training.checkpoint import CheckpointError, list_checkpoints
from epg_fast.training.state import RunState
from tests.training.runs import assert_same_run, crash_after_save, run_command, run_lines


@pytest.fixture
def before_update(monkeypatch):
    """Return a function that has `act(state, batch)` called before every update."""
    update = RunState.update

    def have_called(act):
        def act_and_update(self, step_module, batch, *arguments):
            act(self, batch)
            return update(self, step_module, batch, *arguments)

        monkeypatch.setattr(RunState, "update", act_and_update)

    return have_called


def saved_steps(run):
    return [int(path.stem.removeprefix("step_")) for path in list_checkpoints(run / "checkpoints")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_and_the_run_goes_on_bit_for_bit(number, tiny_run, tmp_path, before_update, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(run_command("pretrain", tiny_run, whole, steps=20, log_every=7)) == 0
    handler = signal.getsignal(number)
    # the ranks agree in the update after, and learn of it one later: at step 14, which is logged too
    before_update(lambda state, batch: state.iteration == 11 and os.kill(os.getpid(), number))
    assert main(run_command("pretrain", tiny_run, stopped, steps=20, log_every=7)) == 0
    assert signal.getsignal(number) == handler
    assert f"{number.name}: stopped at step 14" in capsys.readouterr().err
    assert saved_steps(stopped) == [14, 10]
    before_update(lambda state, batch: None)
    assert main(run_command("pretrain", tiny_run, stopped, steps=20, log_every=7)) == 0
    assert_same_run(stopped, whole)


def test_a_signal_in_the_last_step_changes_nothing(tiny_run, tmp_path, before_update, capsys):
    before_update(lambda state, batch: state.iteration == 3 and os.kill(os.getpid(), signal.SIGTERM))
    assert main(run_command("diffusion", tiny_run, tmp_path / "run", steps=4)) == 0
    assert "stopped" not in capsys.readouterr().err
    assert saved_steps(tmp_path / "run") == [4] and len(run_lines(tmp_path / "run")) == 4


@pytest.mark.parametrize("steps", [20, 10])
def test_more_signals_while_it_saves_change_nothing(steps, tiny_run, tmp_path, before_update, monkeypatch, capsys):
    """Of a run that is stopped at step 7, and of one that is just ending."""
    before_update(lambda state, batch: state.iteration == 5 and steps == 20 and os.kill(os.getpid(), signal.SIGTERM))

    def save_slowly(*arguments):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        return checkpoint.save_checkpoint(*arguments)

    monkeypatch.setattr(state, "save_checkpoint", save_slowly)
    assert main(run_command("diffusion", tiny_run, tmp_path / "run", steps=steps, checkpoint_every=100)) == 0
    assert saved_steps(tmp_path / "run") == [7 if steps == 20 else 10]


def test_a_run_that_dies_between_weights_and_checkpoint_is_not_complete(tiny_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    command = run_command("diffusion", tiny_run, run, steps=20, keep_every=10)
    weights, left = state.save_weights, []

    def die_at_20(path, state, metadata):
        if metadata["step"] == 20 and path.name == "model.safetensors":
            raise OSError("no room")
        weights(path, state, metadata)

    with monkeypatch.context() as patched:
        patched.setattr(state, "save_weights", die_at_20)
        assert main(command) == 1
    assert saved_steps(run) == [10]
    (run / "previews").mkdir()
    for name in ("checkpoints/.step_20.pt.tmp7", ".model.safetensors.tmp7", "previews/.step_20.png.7.tmp"):
        path = run / name
        path.write_bytes(b"left behind by a killed run")
        left.append(path)
    assert main(command) == 0
    assert saved_steps(run) == [20, 10] and not any(path.exists() for path in left)
    assert load_weights(run)[1]["step"] == 20


def test_damaged_checkpoints_take_no_place_among_the_newest(tiny_run, tmp_path, before_update):
    run = tmp_path / "run"
    command = run_command("diffusion", tiny_run, run, steps=40, keep_checkpoints=2)
    before_update(lambda state, batch: state.iteration == 31 and os.kill(os.getpid(), signal.SIGTERM))
    assert main(command) == 0
    assert saved_steps(run) == [33, 30]
    (run / "checkpoints" / "step_000000033.pt").write_bytes(b"damaged")
    before_update(lambda state, batch: state.iteration == 30 and os.kill(os.getpid(), signal.SIGTERM))
    assert main(command) == 0
    assert saved_steps(run) == [32, 30]
    assert (run / "checkpoints" / "step_000000033.pt.damaged").exists()


def test_a_run_that_waits_for_data_saves_and_ends(tiny_run, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(run_command("diffusion", tiny_run, whole, steps=8)) == 0
    make, hangs = loop.make_loader, threading.Event()

    class Hanging:
        def __init__(self, loader):
            self.loader = loader

        def __iter__(self):
            return self

        def __next__(self):
            if self.loader.iteration == 5:
                hangs.wait(60)
            return next(self.loader)

        def __getattr__(self, name):
            return getattr(self.loader, name)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "make_loader", lambda *a, **k: Hanging(make(*a, **k)))
        patched.setattr(loop, "Prefetcher", functools.partial(loop.Prefetcher, patience=0.1))
        timer = threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        assert main(run_command("diffusion", tiny_run, stopped, steps=8)) == 0
    hangs.set()
    assert saved_steps(stopped) == [5]
    assert main(run_command("diffusion", tiny_run, stopped, steps=8)) == 0
    assert_same_run(stopped, whole)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_skipped_update_at_a_checkpoint_is_resumed_as_such(precision, tiny_run, tmp_path, before_update, monkeypatch):
    """After iteration 10 the host does not know yet that its update was skipped: what it saves has ten updates."""

    def spoil(state, batch):
        if state.iteration in (3, 10, 20):
            batch["x"] = batch["x"].float() / 255
            batch["x"][0, 0, 0, 0] = float("nan")

    before_update(spoil)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = {"steps": 20, "precision": precision, "log_every": 4}
    assert main(run_command("pretrain", tiny_run, whole, **flags)) == 0
    assert [line["step"] for line in run_lines(whole)] == [4, 8, 12, 16, 20]
    with monkeypatch.context() as patched:
        crash_after_save(patched, 10)
        assert main(run_command("pretrain", tiny_run, killed, **flags)) == 1
    assert saved_steps(killed) == [10]
    saved = torch.load(list_checkpoints(killed / "checkpoints")[0], weights_only=True)
    assert saved["iteration"] == 12 and saved["optimizer"]["step"].eq(10).all()
    assert main(run_command("pretrain", tiny_run, killed, **flags)) == 0
    assert_same_run(killed, whole)


def test_a_stop_right_after_a_skipped_update_is_named_after_the_updates_made(tiny_run, tmp_path, before_update):
    def spoil(stop, state, batch):
        if state.iteration == 13:
            batch["x"] = torch.full(batch["x"].shape, float("nan"))
        if stop and state.iteration == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    before_update(functools.partial(spoil, False))
    assert main(run_command("diffusion", tiny_run, whole, steps=20, log_every=6)) == 0
    before_update(functools.partial(spoil, True))
    assert main(run_command("diffusion", tiny_run, stopped, steps=20, log_every=6)) == 0
    assert saved_steps(stopped) == [13, 10] and load_weights(stopped)[1]["step"] == 13
    # as the host of the run that was not stopped has it at this point
    assert torch.load(list_checkpoints(stopped / "checkpoints")[0], weights_only=True)["step"] == 14
    before_update(lambda state, batch: None)
    assert main(run_command("diffusion", tiny_run, stopped, steps=20, log_every=6)) == 0
    assert_same_run(stopped, whole)


def test_a_run_that_is_stopped_before_its_first_update_leaves_no_snapshot_or_milestone(
    tiny_run, tmp_path, before_update
):
    """No average can be put together from a snapshot of step 0."""

    def spoil(state, batch):
        batch["x"] = torch.full(batch["x"].shape, float("nan"))
        os.kill(os.getpid(), signal.SIGTERM)

    run, flags = tmp_path / "run", {"keep_every": 10, "posthoc_ema.sigma_rel": "[0.05,0.1]", "posthoc_ema.every": 4}
    before_update(spoil)
    assert main(run_command("diffusion", tiny_run, run, steps=8, **flags)) == 0
    assert saved_steps(run) == [0] and not list(run.glob("milestones/*")) and not list(run.glob("posthoc_ema/*"))
    before_update(lambda state, batch: None)
    assert main(run_command("diffusion", tiny_run, run, steps=8, keep_checkpoints=1, **flags)) == 0
    assert saved_steps(run) == [8]
    assert {f.stem for f in (run / "posthoc_ema").iterdir()} == {"step_000000004", "step_000000008"}


def test_training_goes_on_while_a_checkpoint_is_written(tiny_run, tmp_path, before_update, monkeypatch):
    reached, saw = threading.Event(), []
    before_update(lambda state, batch: state.iteration == 15 and reached.set())

    def save_slowly(folder, step, *arguments):
        if step == 10:
            saw.append(reached.wait(60))
        return checkpoint.save_checkpoint(folder, step, *arguments)

    monkeypatch.setattr(state, "save_checkpoint", save_slowly)
    assert main(run_command("diffusion", tiny_run, tmp_path / "run", steps=20)) == 0
    assert saw == [True] and saved_steps(tmp_path / "run") == [20, 10]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_the_one_before(tiny_run, tmp_path, monkeypatch, capsys):
    def fail_at_10(folder, step, *arguments):
        if step == 10:
            raise CheckpointError("could not write it: disk full; the previous checkpoint is intact")
        return checkpoint.save_checkpoint(folder, step, *arguments)

    monkeypatch.setattr(state, "save_checkpoint", fail_at_10)
    run = tmp_path / "run"
    assert main(run_command("diffusion", tiny_run, run, steps=100000, checkpoint_every=5)) == 1
    assert "disk full" in capsys.readouterr().err
    assert saved_steps(run) == [5] and len(run_lines(run)) < 1000


def test_milestones_keep_their_weights(tiny_run, tmp_path):
    run = tmp_path / "run"
    flags = {"steps": 8, "checkpoint_every": 2, "keep_checkpoints": 1, "keep_every": 4}
    assert main(run_command("diffusion", tiny_run, run, **flags)) == 0
    assert saved_steps(run) == [8, 4]
    kept = [load_file(run / "milestones" / f"step_00000000{step}.safetensors") for step in (4, 8)]
    newest = load_file(run / "model.safetensors")
    assert all(torch.equal(kept[1][name], newest[name]) for name in newest)
    assert not all(torch.equal(kept[0][name], newest[name]) for name in newest)


def test_a_preview_in_which_the_run_was_killed_is_drawn_by_the_next(tiny_run, tmp_path, monkeypatch):
    """Also that of the last step, after which nothing is left to train."""
    flags = {"steps": 4, "checkpoint_every": 2, "preview.every": 2, "preview.num": 1, "preview.steps": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(run_command("diffusion", tiny_run, whole, **flags)) == 0
    for step in (2, 4):

        def die(stage, outdir, at, step=step):
            if at == step:
                raise RuntimeError("killed")
            return preview.write_preview(stage, outdir, at)

        with monkeypatch.context() as patched:
            patched.setattr(loop, "write_preview", die)
            assert main(run_command("diffusion", tiny_run, killed, **flags)) == 1
        assert saved_steps(killed)[0] == step
    assert main(run_command("diffusion", tiny_run, killed, **flags)) == 0
    for name in ("step_000000002.png", "step_000000004.png"):
        assert (killed / "previews" / name).read_bytes() == (whole / "previews" / name).read_bytes()


def start_ranks(command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "epg_fast"]
    return subprocess.Popen([*launch, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def one_rank_of(process, run, lines):
    """Pid of the second rank once there are `lines` lines of metrics."""
    deadline = time.time() + 120
    while len(run_lines(run)) < lines:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return max(int(pid) for pid in ranks)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_ranks_stop_together_and_a_run_outlives_them(tiny_run, tmp_path):
    """SIGTERM to one of two ranks, kill -9 of one of two, then on with a single one; averages in host memory."""
    run = tmp_path / "run"
    options = {"offload_ema": "true", "posthoc_ema.sigma_rel": "[0.1]"}
    command = run_command("diffusion", tiny_run, run, steps=300, **options)
    process = start_ranks(command)
    os.kill(one_rank_of(process, run, 12), signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    stopped = saved_steps(run)[0]
    assert stopped % 10 and stopped == len(run_lines(run)) and f"stopped at step {stopped}" in said

    process = start_ranks(command)
    os.kill(one_rank_of(process, run, stopped + 15), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and f"resuming {run} at step {stopped}" in said

    assert main([*command[:-2], "--steps", "300", *command[-2:]]) == 0
    assert [line["step"] for line in run_lines(run)] == list(range(1, 301))
