"""The run folder: whose it is, what configuration it holds, who is at work in it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import IO

import yaml

from epg_fast.config import RunConfig
from epg_fast.data.files import lock_file, write_atomically
from epg_fast.data.names import is_junk
from epg_fast.outputs import check_writable
from epg_fast.training import distributed
from epg_fast.training.checkpoint import list_checkpoints

# Fields that may change between the parts of a run without changing its numbers.
_FREE = (
    "device",
    "compile",
    "parallelism",
    "cuda_graphs",
    "activation_checkpointing",
    "gradient_accumulation",
    "offload_ema",
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


def check_run_folder(outdir: Path, config: RunConfig) -> None:
    """Raise ValueError for a folder of other things, or of another configuration once it holds a checkpoint."""
    path = outdir / "config.yaml"
    if path.exists():
        if not list_checkpoints(outdir / "checkpoints"):
            return
        try:
            saved = yaml.safe_load(path.read_bytes())
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
    elif outdir.exists() and not outdir.is_dir():
        raise ValueError(f"{outdir} is a file, wanted a folder; choose another --outdir")
    elif outdir.exists() and not all(is_junk(f.name) for f in outdir.iterdir()):
        raise ValueError(f"{outdir} is not empty and not a run folder (no config.yaml); choose another --outdir")
    else:
        check_writable(outdir, "outdir")


class RunLock:
    """Lets one process at a time train in a run folder, until the `with` block ends; the main rank holds it for all.

    A folder that is a run's already is locked at once: a process that is just ending may still write its state, which
    is to be read afterwards. One that is not there is left alone until `claim_run_folder`.

    Raises ValueError when another process is training there.
    """

    def __init__(self, outdir: Path, ranks: distributed.Ranks):
        self.outdir, self.ranks = outdir, ranks
        self._file: IO | None = None
        if ranks.main and (outdir / "config.yaml").exists():
            # A folder that one can only read is that of a complete run, or will be claimed in vain.
            with contextlib.suppress(OSError):
                self.take()
        ranks.barrier()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception) -> None:
        if self._file is not None:
            self._file.close()

    def take(self) -> bool:
        """Lock the folder; returns whether it was not yet."""
        if self._file is not None:
            return False
        busy = f"another process is training in {self.outdir}; stop it or choose another --outdir"
        self._file = lock_file(self.outdir / ".lock", busy)
        return True


def claim_run_folder(stage: str, config: RunConfig, lock: RunLock) -> None:
    """Create the run folder of `lock`, and its config.yaml, which `--config` reads again.

    Raises ValueError when another process is training there, or has been since the folder was looked at.
    """
    lock.ranks.barrier()  # all ranks have checked the folder
    if lock.ranks.main:
        lock.outdir.mkdir(parents=True, exist_ok=True)
        if lock.take() and list_checkpoints(lock.outdir / "checkpoints"):
            raise ValueError(f"another process has trained in {lock.outdir} meanwhile; give the same command again")
        text = f"# epg-fast {stage}\n{yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)}"
        write_atomically(lock.outdir / "config.yaml", text.encode())
    lock.ranks.barrier()


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
