"""Checkpoints survive crashes, full disks and damage, and serve any number of ranks."""

import contextlib
import functools
import itertools
import os
import resource
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from epg_fast.distributed import Ranks
from epg_fast.models import load_weights, save_weights
from epg_fast.training.checkpoint import (
    Background,
    by_step,
    load_newest,
    remove_old,
    tidy,
    write_checkpoint,
)
from epg_fast.training.parallel import rows_of
from tests.training.runs import Killed, kill
from tests.training.stages import ALONE, CPU


class Team(Ranks):
    """Ranks that are threads."""

    def __init__(self, rank, barrier, values):
        super().__init__(rank, len(values), CPU)
        self._barrier, self._values = barrier, values

    def gather(self, value):
        self._values[self.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


def write(folder, iteration, tensors, state=None, split=(), ranks=1):
    """Write a checkpoint as so many ranks would, of which each has a part of the tensors named in `split`."""
    barrier, values = threading.Barrier(ranks), [None] * ranks

    def write_one(rank):
        parts = {name: t[slice(*rows_of(len(t), rank, ranks))] for name, t in tensors.items() if name in split}
        whole = {name: t for name, t in tensors.items() if name not in split} if rank == 0 else {}
        write_checkpoint(folder, iteration, parts | whole, state or {}, Team(rank, barrier, values))

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(write_one, range(ranks)))
    return folder / f"step_{iteration:09d}"


class Part:
    """What of a DTensor is used: the rows of one rank."""

    def __init__(self, shape, rank, ranks):
        self.shape = torch.Size(shape)
        self.device_mesh = SimpleNamespace(get_local_rank=lambda: rank, size=lambda: ranks)
        first, end = rows_of(shape[0], rank, ranks)
        self.rows = torch.zeros(end - first, *shape[1:])

    def __len__(self):
        return self.shape[0]

    def to_local(self):
        return self.rows


@contextlib.contextmanager
def full_disk(size=20_000):
    """A limit on the size of files makes write(2) fail half-way, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("written", [1, 3])
@pytest.mark.parametrize("read", [1, 2, 5])
def test_any_number_of_ranks_reads_what_any_other_has_written(written, read, tmp_path):
    """Split tensors of a row less than ranks, of uneven parts, and tensors that are whole, one without a dimension."""
    tensors = {"a": torch.randn(11, 3), "b": torch.randn(2, 4), "c": torch.randn(4), "step": torch.tensor(7.0)}
    write(tmp_path, 3, tensors, {"iteration": 3}, split=("a", "b") if written > 1 else (), ranks=written)
    for rank in range(read):
        split = {} if read == 1 else {name: Part(tensors[name].shape, rank, read) for name in "ab"}
        own = {name: torch.zeros_like(t) for name, t in tensors.items()} | split
        state, damaged = load_newest(tmp_path, own, ALONE)
        assert state["iteration"] == 3 and not damaged
        for name, t in tensors.items():
            rows = slice(*rows_of(len(t), rank, read)) if name in split else ...
            assert torch.equal(own[name].to_local() if name in split else own[name], t[rows])


def test_the_newest_stay_and_those_that_are_kept(tmp_path):
    for iteration, value in ((10, 1), (20, 2), (30, 3), (40, 4), (50, 5), (50, 6)):  # the last takes 5's place
        write(tmp_path, iteration, {"x": torch.full((2,), float(value))})
        remove_old(tmp_path, 1, 20)
    assert [*by_step(tmp_path)] == [50, 40, 20]
    x = torch.zeros(2)
    load_newest(tmp_path, {"x": x}, ALONE)
    assert x.tolist() == [6, 6]
    assert load_newest(tmp_path / "nowhere", {"x": x}, ALONE) == (None, [])


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: b"x" * len(content),
    "null": lambda content: b"null",
    "a bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "missing": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["rank_00001.safetensors", "state.json", "checksums.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(name, damage, tmp_path, log):
    x = torch.zeros(100)
    for iteration in (1, 2):
        tensors = {"x": torch.full((100,), float(iteration)), "y": torch.ones(9)}
        path = write(tmp_path, iteration, tensors, {"iteration": iteration}, split=("x",), ranks=2)
    change, content = DAMAGES[damage], (path / name).read_bytes()
    (path / name).unlink()
    if change:
        (path / name).write_bytes(change(content))
    state, damaged = load_newest(tmp_path, {"x": x}, ALONE)
    assert state["iteration"] == 1 and x.tolist() == [1] * 100 and damaged == [path]
    assert f"{path} cannot be read" in log.messages[0]
    tidy(tmp_path, 1, damaged)
    assert [*by_step(tmp_path)] == [1]


def test_what_comes_after_the_step_to_go_on_from_or_was_being_written_is_removed(tmp_path):
    names = {"posthoc_ema": ".safetensors", "evaluation": ".json", "kept": ".safetensors", "previews": ".png"}
    for folder, ending in names.items():
        (tmp_path / folder).mkdir()
        for name in (f"step_000000004{ending}", f"step_000000006{ending}", f".step_000000006{ending}.tmp7", "other"):
            (tmp_path / folder / name).write_bytes(b"")
    tidy(tmp_path, 4)
    left = {folder: sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in names}
    for folder, ending in names.items():
        later = [f"step_000000006{ending}"] * (folder in ("kept", "previews"))  # made again with these names
        assert left[folder] == ["other", f"step_000000004{ending}", *later]


class Others(Ranks):
    """The first of two ranks; the other reads nothing."""

    def gather(self, value):
        return [value, "the checksum of rank_00001.safetensors does not match" if value is None else value]


@pytest.mark.parametrize(
    "wanted, ranks",
    [({"z": torch.zeros(3)}, ALONE), ({"x": torch.zeros(4)}, ALONE), ({"x": torch.zeros(3)}, Others(0, 2, CPU))],
    ids=["name", "shape", "damaged for another rank"],
)
def test_checkpoints_of_other_tensors_or_that_one_rank_cannot_read_are_not_read(wanted, ranks, tmp_path):
    write(tmp_path, 1, {"x": torch.ones(3)})
    with pytest.raises(ValueError, match="none of the 1 checkpoints in .* can be read; remove the folder"):
        load_newest(tmp_path, wanted, ranks)


def test_a_full_disk_leaves_the_checkpoint_and_the_weights_before(tmp_path):
    write(tmp_path, 1, {"x": torch.ones(1000)})
    save_weights(tmp_path / "model.safetensors", {"patch_embed.proj.weight": torch.ones(3)}, {"step": 1})
    with full_disk(), pytest.raises(OSError, match="could not save .*step_000000001 is intact; if the disk is full"):
        write(tmp_path, 2, {"x": torch.ones(100_000)})
    with full_disk(), pytest.raises(OSError, match="cannot write .*model.safetensors"):
        save_weights(tmp_path / "model.safetensors", {"x": torch.ones(100_000)}, {"step": 2})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.safetensors", "step_000000001"]
    assert load_newest(tmp_path, {"x": torch.zeros(1000)}, ALONE)[0] is not None
    assert load_weights(tmp_path / "model.safetensors")[1] == {"step": 1}


class Lost(Ranks):
    def together(self, act):
        raise RuntimeError("Connection closed by peer")


def test_a_rank_that_is_lost_during_a_save_is_no_fault_of_the_disk(tmp_path):
    """`joined` says what it is."""
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        write_checkpoint(tmp_path, 1, {}, {}, Lost(0, 2, CPU))


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Before every call that changes a folder, until one goes through."""
    acts = [(os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree")]
    for moment in itertools.count():
        folder, calls = tmp_path / str(moment) / "checkpoints", itertools.count()
        write(folder, 1, {"x": torch.ones(5)})

        def act_unless_killed(act, *arguments, moment=moment, calls=calls, **options):
            if next(calls) == moment:
                kill()
            return act(*arguments, **options)

        killed = True
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            for module, name in acts:
                patched.setattr(module, name, functools.partial(act_unless_killed, getattr(module, name)))
            write(folder, 2, {"x": torch.full((5,), 2.0)})
            remove_old(folder, 1, 0)
            killed = False
        x = torch.zeros(5)
        _, damaged = load_newest(folder, {"x": x}, ALONE)
        assert x.tolist() in ([1.0] * 5, [2.0] * 5) and not damaged
        tidy(folder.parent, 2)
        assert all(path.name.startswith("step_") for path in folder.iterdir())
        if not killed:
            break
    assert moment > 8 and [path.name for path in folder.iterdir()] == ["step_000000002"]


def test_the_writer_hands_back_what_its_job_raised_once():
    writer, done, go_on = Background("test"), [], threading.Event()
    writer.submit(lambda: (go_on.wait(60), done.append(1)))
    assert not writer.failed
    go_on.set()
    writer.submit(lambda: 1 / 0)  # after the first
    assert done == [1]
    while not writer.failed:
        time.sleep(0.001)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.wait()
    assert not writer.failed
