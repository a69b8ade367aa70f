"""Checkpoints: one file per step, written atomically, newest readable one resumed.

`sharded_checkpoint` writes folders of the same names; here they are listed, removed and set aside as files are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from epg_fast.training.sharding import local

log = logging.getLogger("epg_fast")
_NAME = re.compile(r"step_(\d+)(\.pt)?")


class CheckpointError(OSError):
    """A checkpoint could not be written; the earlier ones are untouched."""


class BackgroundWriter:
    """Runs one writing job at a time in a thread, so that training goes on meanwhile."""

    def __init__(self):
        # Not a daemon: a process that ends, by an exception too, first finishes what it writes.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="epg-checkpoint")
        self._job: Future | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Wait for the job before, raise what it raised, and start this one."""
        self.wait()
        self._job = self._executor.submit(job)

    def check(self) -> None:
        """Raise what the last job raised, if it has ended."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last job and raise what it raised, once."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    @property
    def failed(self) -> bool:
        """Whether the last job has ended with an exception that `wait` will raise."""
        return self._job is not None and self._job.done() and self._job.exception() is not None


def copy_to_host(state):
    """A nested state with a copy of every tensor in host memory; tensors that share memory share the copy.

    Of a sharded tensor the copy holds this rank's part.
    """
    copies: dict[tuple, torch.Tensor] = {}

    def copy(value):
        if isinstance(value, torch.Tensor):
            value = local(value)
            key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if key not in copies:
                copies[key] = value.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(value, dict):
            return {name: copy(part) for name, part in value.items()}
        return [copy(part) for part in value] if isinstance(value, list) else value

    return copy(state)


def save_checkpoint(folder: Path, step: int, state: dict, keep: int, keep_every: int = 0) -> Path:
    """Write folder/step_<step>.pt through a temporary name, fsync and rename, then remove old ones.

    The newest `keep` stay, and those of every `keep_every`-th step (0: none).

    Raises CheckpointError when the disk does not take it; what was there before stays usable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:09d}.pt"
    temporary = folder / f".{path.name}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise explained(folder, path, reason) from None
    remove_old(folder, keep, keep_every)
    return path


def explained(folder: Path, path: Path, reason: str) -> CheckpointError:
    """The error that says what is left when `path` could not be written to `folder`."""
    earlier = list_checkpoints(folder)
    left = f"the previous checkpoint {earlier[0].name} is intact" if earlier else "there is no earlier checkpoint"
    return CheckpointError(
        f"could not write {path}: {reason}; {left}. If the disk is full, free some space; the same command goes on"
    )


def remove_old(folder: Path, keep: int, keep_every: int) -> None:
    """Remove all checkpoints but the newest `keep` and the milestones."""
    for old in list_checkpoints(folder)[keep:]:
        if not is_milestone(_step(old), keep_every):
            remove_checkpoint(old)


def remove_checkpoint(path: Path) -> None:
    """Remove a file or a folder; what a kill leaves of a folder does not count as a checkpoint."""
    if path.is_dir():
        path = path.rename(path.with_name(f".{path.name}.tmp-old"))
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_milestone(step: int, keep_every: int) -> bool:
    """Whether the checkpoint of `step` stays for good; that of step 0, where a run may be stopped, does not."""
    return step > 0 and keep_every > 0 and step % keep_every == 0


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, files and folders, newest first."""
    found = [f for f in folder.iterdir() if _NAME.fullmatch(f.name)] if folder.is_dir() else []
    return sorted(found, key=lambda f: (_step(f), f.name), reverse=True)


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def set_aside(paths: list[Path]) -> None:
    """Rename checkpoints that cannot be read, so that they take no place among the newest: to <name>.damaged."""
    for path in paths:
        with contextlib.suppress(OSError):
            aside = path.with_name(f"{path.name}.damaged")
            if aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def remove_temporaries(outdir: Path) -> None:
    """Remove what a killed run was writing."""
    weights = (("milestones", "step_*.safetensors"), ("", "model.safetensors"))
    for folder, name in (("checkpoints", "step_*"), ("previews", "step_*.png.*"), *weights):
        for path in (outdir / folder).glob(f".{name}.tmp*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict:
    """State in a file, verified by its checksums. Only tensors and plain values are accepted; nothing is executed."""
    _verify(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_newest(
    folder: Path,
    wanted: tuple[str, ...] = (),
    unreadable: list[Path] | None = None,
    read: Callable[[Path], dict] = read_checkpoint,
    everyone: Callable[[object], list] = lambda value: [value],
) -> dict | None:
    """State of the newest checkpoint that can be read, or None when there is none.

    One that is unreadable or lacks one of the `wanted` entries is reported, appended to `unreadable`, and the one
    before it is used; raises ValueError when there are checkpoints and none will do.
    read: makes the state of a checkpoint, or raises. everyone: value of this rank -> values of all ranks, which use
    what all of them can read.
    """
    files = everyone(list_checkpoints(folder))[0]
    for path in files:
        state, reason = _tried(path, wanted, read)
        reason = next(filter(None, everyone(reason)), None)
        if reason is None:
            return state
        log.warning("checkpoint %s cannot be read (%s); trying the one before it", path, reason)
        if unreadable is not None:
            unreadable.append(path)
    if files:
        raise ValueError(
            f"none of the {len(files)} checkpoints in {folder} can be read; remove the folder to start anew"
        )
    return None


def _tried(path: Path, wanted: tuple[str, ...], read: Callable[[Path], dict]) -> tuple[dict | None, str | None]:
    """(state, None), or (None, why it cannot be read)."""
    try:
        state = read(path)
        if not isinstance(state, dict) or any(name not in state for name in wanted):
            raise ValueError("not a checkpoint of a training run")
        return state, None
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        return None, (str(error).splitlines()[0] if str(error) else type(error).__name__)[:160]


def _verify(path: Path) -> None:
    """Raise ValueError if an entry is not what was written, or not stored as torch.save does; torch.load would not."""
    with zipfile.ZipFile(path) as archive:
        # torch.save sets neither; an entry that looks like a folder would be read as memory never written
        odd = [entry for entry in archive.infolist() if entry.compress_type or entry.external_attr]
        damaged = odd[0].filename if odd else archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} does not match")


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
