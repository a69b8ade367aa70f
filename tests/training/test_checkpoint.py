"""Checkpoints survive crashes, full disks and damage."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from epg_fast.training.checkpoint import list_checkpoints, load_newest, save_checkpoint


def test_the_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, step, {"step": step, "x": torch.ones(step)}, keep=2)
    assert [f.name for f in list_checkpoints(tmp_path)] == ["step_000000030.pt", "step_000000002.pt"]
    assert load_newest(tmp_path)["step"] == 30
    assert load_newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, damage, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "x": torch.randn(1000)}, keep=2)
    newest = tmp_path / "step_000000002.pt"
    content = newest.read_bytes()
    newest.write_bytes({"truncate": content[: len(content) // 2], "empty": b"", "garbage": b"x" * 999}[damage])
    with caplog.at_level("WARNING", logger="epg_fast"):
        import logging

        logging.getLogger("epg_fast").propagate = True
        assert load_newest(tmp_path)["step"] == 1
    assert newest.name in caplog.text
    (tmp_path / "step_000000001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        load_newest(tmp_path)


def test_a_pickle_with_code_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    (tmp_path / "step_000000001.pt").write_bytes(pickle.dumps({"step": Evil()}))
    with pytest.raises(ValueError, match="none of the 1"):
        load_newest(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """The limit on the file size makes write(2) fail half-way, as a full disk does."""
    save_checkpoint(tmp_path, 1, {"step": 1, "x": torch.randn(1000)}, keep=1)
    code = (
        "import resource, sys, torch; from pathlib import Path;"
        "from epg_fast.training.checkpoint import save_checkpoint, CheckpointError;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try: save_checkpoint(Path(sys.argv[1]), 2, {'step': 2, 'x': torch.randn(100000)}, keep=1)\n"
        "except CheckpointError as error: print(error); sys.exit(7)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "step_000000001.pt is intact" in done.stdout
    assert [f.name for f in tmp_path.iterdir()] == ["step_000000001.pt"]
    assert load_newest(tmp_path)["step"] == 1


def test_a_full_disk_leaves_the_previous_weights(tmp_path):
    from epg_fast.models import load_weights, save_weights

    save_weights(tmp_path / "model.safetensors", {"x": torch.ones(3)}, {"step": 1})
    code = (
        "import resource, sys, torch; from epg_fast.models import save_weights;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try: save_weights(sys.argv[1], {'x': torch.randn(100000)}, {'step': 2})\n"
        "except OSError as error: print(error); sys.exit(7)"
    )
    path = tmp_path / "model.safetensors"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "could not write" in done.stdout
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_weights(path)[1] == {"step": 1}
