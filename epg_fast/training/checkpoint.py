"""Checkpoints: one file per step, written atomically, newest readable one resumed."""

from __future__ import annotations

import logging
import os
import pickle
import re
from pathlib import Path

import torch

log = logging.getLogger("epg_fast")
_NAME = re.compile(r"step_(\d+)\.pt")


class CheckpointError(OSError):
    """A checkpoint could not be written; the earlier ones are untouched."""


def save_checkpoint(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Write folder/step_<step>.pt through a temporary name, fsync and rename, then remove all but the newest `keep`.

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
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        earlier = list_checkpoints(folder)
        left = f"the previous checkpoint {earlier[0].name} is intact" if earlier else "there is no earlier checkpoint"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"could not write {path}: {reason}; {left}. If the disk is full, free some space; the same command goes on"
        ) from None
    for old in list_checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files of a folder, newest first."""
    found = [f for f in folder.iterdir() if _NAME.fullmatch(f.name)] if folder.is_dir() else []
    return sorted(found, key=lambda f: f.name, reverse=True)


def load_newest(folder: Path, wanted: tuple[str, ...] = ()) -> dict | None:
    """State of the newest checkpoint that can be read, or None when there is none.

    A file that is unreadable or lacks one of the `wanted` entries is reported and the one before it is used; raises
    ValueError when there are files and none will do.
    Nothing in a file is executed: only tensors and plain values are accepted.
    """
    files = list_checkpoints(folder)
    for path in files:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or any(name not in state for name in wanted):
                raise ValueError("not a checkpoint of a training run")
            return state
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning("checkpoint %s cannot be read (%s); trying the one before it", path, reason[:160])
    if files:
        raise ValueError(
            f"none of the {len(files)} checkpoints in {folder} can be read; remove the folder to start anew"
        )
    return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
