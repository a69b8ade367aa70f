"""The run folder: whose it is, what configuration it holds, who is at work in it."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
from pathlib import Path
from typing import IO

import yaml

from epg_fast.config import RunConfig
from epg_fast.training import distributed
from epg_fast.training.checkpoint import list_checkpoints

log = logging.getLogger("epg_fast")

# Fields that may change between the parts of a run without changing its numbers.
_FREE = (
    "device",
    "compile",
    "cuda_graphs",
    "activation_checkpointing",
    "ops",
    "optimizer.backend",
    "data.backend",
    "data.workers",
    "data.readers",
    "data.max_bad_fraction",
    "data.path",
    "posthoc_ema.every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "tensorboard",
    "wandb",
    "outdir",
)
# What a start that was cut short leaves behind.
_OWN = (".lock", "config.tmp")


def check_run_folder(outdir: Path, config: RunConfig) -> None:
    """Raise ValueError for a folder of other things, or of another configuration once it holds a checkpoint."""
    path = outdir / "config.yaml"
    if path.exists():
        if not list_checkpoints(outdir / "checkpoints"):
            return
        try:
            saved = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            saved = None
        if not isinstance(saved, dict):
            raise ValueError(f"{path} cannot be read; restore it, or choose another --outdir")
        old, new = _flatten(saved), _flatten(_plain(dataclasses.asdict(config)))
        differing = [
            k
            for k in sorted(old.keys() | new.keys())
            if old.get(k) != new.get(k) and k not in _FREE and not k.startswith("preview.")
        ]
        if differing:
            shown = "; ".join(f"{k} was {old.get(k)!r}, now {new.get(k)!r}" for k in differing[:4])
            raise ValueError(f"{outdir} holds a run of another configuration ({shown}); choose another --outdir")
    elif outdir.exists() and (not outdir.is_dir() or any(f.name not in _OWN for f in outdir.iterdir())):
        raise ValueError(f"{outdir} is not empty and not a run folder (no config.yaml); choose another --outdir")


def claim_run_folder(outdir: Path, stage: str, config: RunConfig, ranks: distributed.Ranks) -> IO | None:
    """Create the run folder with its config.yaml, which `--config` reads again, and lock it until the result is closed.

    Raises ValueError when another process is training there.
    """
    ranks.barrier()  # all ranks have checked the folder
    lock = None
    if ranks.main:
        outdir.mkdir(parents=True, exist_ok=True)
        lock = open(outdir / ".lock", "w")  # noqa: SIM115 (held for the whole run)
        try:
            # lockf, not flock: decoding processes would inherit the latter and hold it when this one has been killed.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another process is training in {outdir}; stop it or choose another --outdir") from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): do not start this run twice", outdir, error)
        temporary = outdir / "config.tmp"
        with open(temporary, "w") as f:
            f.write(f"# epg-fast {stage}\n{yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)}")
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, outdir / "config.yaml")
    ranks.barrier()
    return lock


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
