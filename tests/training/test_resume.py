"""A killed run, started again, continues with the same numbers as if it had never stopped."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from epg_fast.__main__ import main
from epg_fast.data.loading.dali import dali_status
from epg_fast.ops import extension_status
from epg_fast.training import loop
from epg_fast.training.checkpoint import list_checkpoints
from tests.training.runs import assert_same_run, crash_after_save, run_command, run_lines


@pytest.mark.parametrize("job, decoder", [("pretrain", "dali"), ("diffusion", "pillow"), ("consistency", "pillow")])
def test_kill_9_and_resume_is_bit_identical(job, decoder, tiny_run, tmp_path, capsys):
    if decoder == "dali" and not (dali_status()[0] and extension_status()[0]):
        pytest.skip("needs NVIDIA DALI and the extension")
    tiny_run = [*tiny_run, "--data.backend", decoder]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Workers on in the killed run only: they must not matter either.
    program = [sys.executable, "-m", "epg_fast"]
    assert main(run_command(job, tiny_run, whole, steps=34)) == 0
    workers = {"data.workers": 1, "data.readers": 2}
    process = subprocess.Popen(
        [*program, *run_command(job, tiny_run, killed, steps=34, **workers)], stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while len(run_lines(killed)) < 16 and time.time() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = len(run_lines(killed))
    assert 16 <= reached < 34, f"the run was at step {reached} when it was killed"
    assert main(run_command(job, tiny_run, killed, steps=34)) == 0
    assert "resuming" in capsys.readouterr().err
    assert_same_run(killed, whole)


def test_a_log_interval_cut_by_a_checkpoint_gives_the_same_means(tiny_run, tmp_path, monkeypatch):
    """Checkpoints every 10 steps, lines every 7: the unfinished interval is part of the checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(run_command("diffusion", tiny_run, whole, steps=28, log_every=7)) == 0
    crash_after_save(monkeypatch, 10)
    assert main(run_command("diffusion", tiny_run, cut, steps=28, log_every=7)) == 1
    monkeypatch.undo()
    assert main(run_command("diffusion", tiny_run, cut, steps=28, log_every=7)) == 0
    assert_same_run(cut, whole)


def test_a_finished_run_is_left_alone(tiny_run, tmp_path, capsys):
    command = run_command("diffusion", tiny_run, tmp_path / "run", steps=3)
    assert main(command) == 0
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*.pt")}
    assert main(command) == 0
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*.pt")} == before
    assert "complete" in capsys.readouterr().err


@pytest.fixture
def interrupted_run(tiny_run, tmp_path):
    """Return (command, function that changes the checkpoint) of a run that stands at step 2 of 4, made with Pillow."""
    run = tmp_path / "run"
    command = run_command("diffusion", tiny_run, run, steps=4, checkpoint_every=2)
    assert main(command) == 0
    command[command.index("--data.backend") + 1] = "auto"
    newest, path = list_checkpoints(run / "checkpoints")
    newest.unlink()

    def change(**entries):
        state = torch.load(path, weights_only=True) | entries
        torch.save({name: value for name, value in state.items() if value is not None}, path)

    return command, change


def _saved(command):
    return torch.load(list_checkpoints(Path(command[-1]) / "checkpoints")[0], weights_only=True)


def test_a_checkpoint_names_the_decoder_and_an_old_one_means_pillow(interrupted_run, monkeypatch, capsys):
    command, change = interrupted_run
    assert _saved(command)["data_backend"] == "pillow"
    change(data_backend=None, bad_files=None)  # as written before these entries existed
    assert {"data_backend", "bad_files"}.isdisjoint(_saved(command))
    # `auto` would mean DALI in a new run here
    monkeypatch.setattr(loop, "resolve_backend", lambda name, device: {"auto": "dali"}.get(name, name))
    capsys.readouterr()
    assert main(command) == 0
    saved = _saved(command)
    assert (saved["step"], saved["data_backend"], saved["bad_files"]) == (4, "pillow", {})
    assert capsys.readouterr().err.count("images are decoded by Pillow (in the training process)") == 1


def _without_dali(name, device):
    if name == "dali":
        raise ValueError("DALI cannot be imported")
    return "pillow"


def test_a_run_does_not_change_its_decoder_unless_told_to(interrupted_run, monkeypatch, capsys):
    command, change = interrupted_run
    change(data_backend="dali")
    monkeypatch.setattr(loop, "resolve_backend", _without_dali)
    before = run_lines(command[-1])
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "DALI cannot be imported" in error and "pip install nvidia-dali" in error
    assert "--data.backend pillow" in error and "no longer those of an uninterrupted run" in error
    assert run_lines(command[-1]) == before
    assert main([*command[:-2], "--data.backend", "pillow", *command[-2:]]) == 0
    assert capsys.readouterr().err.count("decoded by dali so far, now by pillow as asked") == 1
    assert _saved(command)["data_backend"] == "pillow"


def test_the_decoder_of_a_run_is_kept_where_it_is_installed(monkeypatch):
    said = []
    monkeypatch.setattr(loop.log, "warning", lambda *message: said.append(message))
    monkeypatch.setattr(loop, "resolve_backend", lambda name, device: "dali" if name == "auto" else name)
    assert [loop.choose_backend(wanted, None) for wanted in ("auto", "pillow", "dali")] == ["dali", "pillow", "dali"]
    assert [loop.choose_backend("auto", used) for used in ("pillow", "dali")] == ["pillow", "dali"]
    assert loop.choose_backend("dali", "dali") == "dali" and not said
    assert loop.choose_backend("dali", "pillow") == "dali" and len(said) == 1
