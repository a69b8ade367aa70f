"""What a run keeps on disk: its folder, which holds the configuration and the plan, and the state in checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from epg_fast.config import RunConfig
from epg_fast.data import ImageSource
from epg_fast.distributed import Ranks
from epg_fast.files import OutputFolder, write_atomically
from epg_fast.models import save_weights
from epg_fast.plans import Chosen, Machine
from epg_fast.runtime import AUTOCAST
from epg_fast.training.checkpoint import (
    Background,
    by_step,
    is_kept,
    load_newest,
    remove_old,
    step_path,
    write_checkpoint,
)
from epg_fast.training.dataset import still_bad
from epg_fast.training.ema import HostEma, PosthocEma
from epg_fast.training.gradients import LossScale
from epg_fast.training.metrics import Metrics
from epg_fast.training.optimizer import WeightCopies, make_optimizer
from epg_fast.training.parallel import Tensors, parallelize
from epg_fast.training.stages import Stage

log = logging.getLogger("epg_fast")
_MAX_SKIPPED_IN_A_ROW = 100
# Fields that may change between the parts of a run without changing its numbers.
_FREE = {
    *("device", "compile", "parallelism", "cuda_graphs", "ops", "optimizer.backend", "offload_ema"),
    *("activation_checkpointing", "gradient_accumulation"),
    *("data.path", "data.backend", "data.workers", "data.readers", "data.max_bad_fraction"),
    *("outdir", "checkpoint_every", "keep_checkpoints", "keep_every", "posthoc_ema.every"),
    *("tensorboard", "wandb", "trackio", "preview", "evaluate", "probe", "collapse"),
}


class RunFolder(OutputFolder):
    """A folder in which one process at a time trains; config.yaml holds its configuration."""

    def __init__(self, outdir: str | Path):
        super().__init__(outdir, "training", "config.yaml")

    @property
    def begun(self) -> bool:
        """Whether it holds a checkpoint."""
        return bool(by_step(self.path / "checkpoints"))

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

    def claim(self, stage: str, config: RunConfig, choice: dict, ranks: Ranks) -> None:
        """Create the folder, its config.yaml, which `--config` reads again, and plan.json.

        config: as it was given. choice: see `choice_record`.

        Raises ValueError when another process is training there, or has been since the folder was looked at.
        """
        ranks.barrier()  # all ranks have checked the folder
        if ranks.main:
            if self.lock() and self.begun:
                raise ValueError(f"another process has trained in {self.path} meanwhile; give the same command again")
            text = yaml.safe_dump(_plain(config), sort_keys=False)
            write_atomically(self.marker, f"# epg-fast {stage}\n{text}")
            self.write("plan.json", choice)
        ranks.barrier()

    @property
    def choice(self) -> dict | None:
        """The record of what the run has computed with so far, see `choice_record`; None for a new run."""
        path = self.path / "plan.json"
        if not self.begun:
            return None
        try:
            record = json.loads(path.read_bytes())
            Chosen.from_record(record), Machine(**record["machine"])  # raise for what is none
            return record
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is damaged; delete it, and the run goes on with another plan") from None


def _plain(config: RunConfig) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))  # lists in the place of tuples, as YAML has them


def choice_record(chosen: Chosen, device: torch.device) -> dict:
    """What plan.json and checkpoints say of what computes."""
    return chosen.record() | {"machine": dataclasses.asdict(Machine.here(device))}


class RunState:
    """Everything that a checkpoint holds, after `iteration` batches."""

    def __init__(self, stage: Stage, source: ImageSource):
        config, ranks = stage.config, stage.ranks
        self.config, self.stage, self.source, self.ranks = config, stage, source, ranks
        self.iteration, self.outdir = 0, Path(config.outdir)
        self.skipped = torch.zeros(2, dtype=torch.int64, device=ranks.device)
        """Batches whose gradient was not finite: in all, and in a row up to now."""
        self.posthoc_ema = PosthocEma(stage)
        self.parallel = parallelize(stage, self.posthoc_ema.networks)
        emas = [ema for ema in (stage.ema, *self.posthoc_ema.networks) if ema is not None]
        self.emas_on_device = int(stage.calls_ema) if config.offload_ema else len(emas)
        """How many of the EMA are updated with the weights, on their device; the others are in host memory."""
        called = [stage.network, stage.ema if stage.calls_ema else None, stage.perceptual]
        self.copies = WeightCopies(filter(None, called), AUTOCAST.get(config.precision))
        planned = stage.chosen.ops["optimizer"]
        if planned == "plain" and not stage.chosen.plan:
            planned = None  # nobody has chosen it
        on_device, in_host_memory = emas[: self.emas_on_device], emas[self.emas_on_device :]
        self.optimizer = make_optimizer(stage.network, config.optimizer, on_device, self.copies, planned)
        self.host_ema = HostEma(stage.network, in_host_memory)
        self.loss_scale = LossScale(ranks.device, enabled=config.precision == "fp16")
        self.choice = choice_record(stage.chosen, ranks.device)
        """What computes."""
        self.data_fingerprint = source.fingerprint()
        self.data_backend: str | None = None
        self.bad_files: dict[str, str] = {}
        self.unfinished_metrics: dict = {}
        self.damaged: list[Path] = []
        """Checkpoints that `resume` could not read."""
        self.writer = Background("epg-checkpoint")
        self._saved: int | None = None
        self._known_skipped = 0

    def tensors(self) -> Tensors:
        """Every tensor of a checkpoint by name. They are the live ones; a rank may lack the EMA in host memory."""
        groups = {
            "network": self.stage.network.state_dict(),
            "ema": self.stage.ema.state_dict() if self.stage.ema is not None else {},
            "posthoc_ema": self.posthoc_ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss": self.loss_scale.state_dict(),
            "counters": {"skipped": self.skipped},
        }
        return {f"{group}/{name}": tensor for group, own in groups.items() for name, tensor in own.items()}

    def save(self, metrics: Metrics) -> None:
        """Checkpoint and model.safetensors of this very moment, written while training goes on.

        A snapshot of the post-hoc EMA, if one is due, is written before them. What fails is raised by the next
        call that writes, or by `writer.wait`.
        """
        if not self.parallel.saves or self.iteration == self._saved:
            return
        iteration, config, parallel, outdir = self.iteration, self.config, self.parallel, self.outdir
        self._saved, tensors = iteration, self.tensors()
        state = {
            "iteration": iteration,
            "metrics": metrics.state_dict(),
            "data": self.data_fingerprint,
            "data_backend": self.data_backend,
            "bad_files": dict(self.bad_files),
            "plan": self.choice,
        }
        self.host_ema.wait()
        self.writer.wait()  # before the copy: one at a time in memory
        copies: dict = {}
        parts = parallel.parts(tensors, copies)
        weights = parallel.whole(self.stage.exported.state_dict(), copies)
        write_snapshot = self._snapshot(copies) if self.posthoc_ema.is_due(iteration) else lambda: None
        metadata = self.stage.metadata() | {"step": iteration, "ema_decay": self.stage.ema_decay(iteration)}

        def write_others():
            write_snapshot()
            if is_kept(iteration, config.keep_every):
                (outdir / "kept").mkdir(exist_ok=True)
                save_weights(step_path(outdir / "kept", iteration, ".safetensors"), weights, metadata)
            save_weights(outdir / "model.safetensors", weights, metadata)

        def write():
            # The checkpoint last: a run that goes on from it does not come by this iteration again.
            write_checkpoint(outdir / "checkpoints", iteration, parts, state, parallel.savers, write_others)
            if self.ranks.main:
                remove_old(outdir / "checkpoints", config.keep_checkpoints, config.keep_every)

        self.writer.submit(write)

    def save_snapshot(self) -> None:
        """Snapshot of the post-hoc EMA of this very moment, written while training goes on."""
        self.host_ema.wait()
        self.writer.wait()
        write = self._snapshot({})
        self.writer.submit(lambda: self.parallel.savers.decide(write))

    def _snapshot(self, copies: dict) -> Callable[[], None]:
        """Copy what is to be in a snapshot to host memory; returns what writes it, on the main rank."""
        snapshot = self.parallel.whole(self.posthoc_ema.snapshot(), copies)
        return functools.partial(self.posthoc_ema.write, self.iteration, snapshot)

    def resume(self) -> None:
        """Load the newest checkpoint that all ranks can read, if there is one."""
        state, self.damaged = load_newest(self.outdir / "checkpoints", self.tensors(), self.ranks)
        if state is None:
            return
        if state["data"] != self.data_fingerprint:
            raise ValueError(
                f"{self.config.data.path} is not the dataset that {self.outdir} was trained on (files or labels "
                "differ); restore it, or choose another --outdir"
            )
        self.iteration = self._saved = state["iteration"]
        self.unfinished_metrics, self.data_backend = state["metrics"], state["data_backend"]
        self.bad_files = still_bad(state["bad_files"], self.source)
        self._known_skipped = int(self.skipped[0])
        log.info("resuming %s at step %d", self.outdir, self.iteration)

    def count_skipped(self, found_inf: torch.Tensor) -> None:
        """Count a batch that was skipped, if found_inf, [], is 1; on the device."""
        found = (found_inf > 0).to(self.skipped.dtype)
        self.skipped.copy_(torch.stack([self.skipped[0] + found, (self.skipped[1] + 1) * found]))

    def check_skipped(self) -> None:
        """Warn of the batches skipped since the last call, which waits for the device.

        Raises RuntimeError when the newest 100 or more all were.
        """
        total, in_a_row = self.skipped.tolist()
        if total > self._known_skipped:
            log.warning(
                "up to step %d: the gradient was not finite for %d more of the batches, which are skipped (%d in all)",
                *(self.iteration, total - self._known_skipped, total),
            )
        self._known_skipped = total
        if in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"the gradient was not finite for {in_a_row} batches in a row at step {self.iteration}; "
                "training diverged: lower --optimizer.lr or change --precision"
            )
