"""Checkpoints survive crashes, full disks and damage."""

import os
import pickle
import subprocess
import sys
import time

import pytest
import torch

from epg_fast.training.checkpoint import (
    BackgroundWriter,
    copy_to_host,
    list_checkpoints,
    load_newest,
    save_checkpoint,
)
from epg_fast.training.sharded_checkpoint import read_any


def test_the_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, step, {"step": step, "x": torch.ones(step)}, keep=2)
    assert [f.name for f in list_checkpoints(tmp_path)] == ["step_000000030.pt", "step_000000002.pt"]
    assert load_newest(tmp_path)["step"] == 30
    assert load_newest(tmp_path / "nowhere") is None


def test_milestones_stay(tmp_path):
    for step in range(10, 60, 10):
        save_checkpoint(tmp_path, step, {"step": step}, keep=1, keep_every=20)
    assert [f.name for f in list_checkpoints(tmp_path)] == [f"step_{step:09d}.pt" for step in (50, 40, 20)]


def test_the_writer_hands_back_what_its_job_raised_once():
    writer, done = BackgroundWriter(), []
    writer.submit(lambda: (time.sleep(0.2), done.append(1)))
    writer.check()
    writer.submit(lambda: 1 / 0)  # after the first
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.wait()
    writer.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        while True:
            writer.check()
            time.sleep(0.01)


def test_the_copy_is_apart_from_what_it_was_made_of_and_tied_within():
    x = torch.ones(3)
    copy = copy_to_host({"x": x, "again": [x[:], {"part": x[1:]}], "step": 3})
    x += 1
    assert copy["x"].tolist() == [1, 1, 1] and copy["again"][0] is copy["x"] and copy["step"] == 3
    assert copy["again"][1]["part"].tolist() == [1, 1]


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage", "one bit"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, damage, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "x": torch.full((1000,), 12345.0)}, keep=2)
    newest = tmp_path / "step_000000002.pt"
    content = newest.read_bytes()
    flipped = bytearray(content)
    flipped[content.index(marker := torch.full((8,), 12345.0).numpy().tobytes()) + len(marker) // 2] ^= 1
    damaged = {"truncate": content[: len(content) // 2], "empty": b"", "garbage": b"x" * 999, "one bit": flipped}
    newest.write_bytes(damaged[damage])
    with caplog.at_level("WARNING", logger="epg_fast"):
        import logging

        logging.getLogger("epg_fast").propagate = True
        assert load_newest(tmp_path)["step"] == 1
    assert newest.name in caplog.text
    (tmp_path / "step_000000001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        load_newest(tmp_path)


def test_checkpoints_that_hold_something_else_give_way_to_the_one_before(tmp_path):
    """A folder whose checksums are no table, and files of other values, that ranks would split."""
    (tmp_path / "step_000000004").mkdir()
    (tmp_path / "step_000000004/checksums.json").write_text("null")
    for step, state in (
        (3, [1, 2]),
        (2, {"network": 3}),
        (1, {"network": {}, "average": {}, "posthoc_ema": {}, "optimizer": {"step": 0}}),
    ):
        save_checkpoint(tmp_path, step, state, keep=9)

    def read(path):
        return read_any(path, object(), {}, (0, 1))

    unreadable = []
    assert load_newest(tmp_path, ("network",), unreadable, read)["network"] == {}
    assert [path.stem for path in unreadable] == [f"step_00000000{step}" for step in (4, 3, 2)]


def test_no_bit_of_the_table_of_contents_can_change(tmp_path):
    """Some make torch.load return memory that was never written, and zlib fail."""
    path = save_checkpoint(tmp_path, 1, {"step": 1, "x": torch.arange(64.0)}, keep=1)
    content = path.read_bytes()
    entry = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)
    for start, length in ((10, 2), (38, 4)):  # compression method, external attributes
        for bit in range(8 * length):
            changed = bytearray(content)
            changed[entry + start + bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(ValueError, match="none of the 1"):
                load_newest(tmp_path)
    path.write_bytes(content)
    assert load_newest(tmp_path)["x"][63] == 63


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

    save_weights(tmp_path / "model.safetensors", {"patch_embed.proj.weight": torch.ones(3)}, {"step": 1})
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
