"""The run folder: whose it is, what configuration it holds, who is at work in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import yaml

from epg_fast.config import RunConfig
from epg_fast.distributed import Ranks
from epg_fast.files import OutputFolder, write_atomically
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
    "trackio",
    "outdir",
    "preview",
    "evaluate",
    "probe",
    "collapse",
)


class RunFolder(OutputFolder):
    """A folder in which one process at a time trains; config.yaml holds its configuration."""

    def __init__(self, outdir: str | Path):
        super().__init__(outdir, "training", "config.yaml")

    @property
    def begun(self) -> bool:
        """Whether it holds a checkpoint."""
        return bool(list_checkpoints(self.path / "checkpoints"))

    def require(self, config: RunConfig) -> None:
        """Raise ValueError for a folder of other things, or of another configuration once it holds a checkpoint."""
        if not self.check() or not self.begun:
            return
        try:
            saved = yaml.safe_load(self.marker.read_bytes())
            if not isinstance(saved, dict):
                raise ValueError("no mapping")
        except (yaml.YAMLError, ValueError) as error:
            raise self.unreadable(str(error).splitlines()[0]) from None
        self.require_same(saved, _plain(config), _FREE)

    def wait_for_writer(self, ranks: Ranks) -> None:
        """Lock a folder that is a run's already: a process that is just ending may still write its state.

        One that is not there is left alone until `claim`, and so is one that can only be read: of a complete run, or
        to be claimed in vain. Raises ValueError when another process is training there.
        """
        if ranks.main and self.marker.exists():
            with contextlib.suppress(OSError):
                self.lock()
        ranks.barrier()

    def claim(self, stage: str, config: RunConfig, ranks: Ranks) -> None:
        """Create the folder, and its config.yaml, which `--config` reads again.

        Raises ValueError when another process is training there, or has been since the folder was looked at.
        """
        ranks.barrier()  # all ranks have checked the folder
        if ranks.main:
            if self.lock() and self.begun:
                raise ValueError(f"another process has trained in {self.path} meanwhile; give the same command again")
            text = yaml.safe_dump(_plain(config), sort_keys=False)
            write_atomically(self.marker, f"# epg-fast {stage}\n{text}")
        ranks.barrier()


def _plain(config: RunConfig) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))  # lists in the place of tuples, as YAML has them
