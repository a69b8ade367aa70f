"""The state of a run: the update that changes it, and the checkpoints that hold it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from epg_fast.config import RunConfig
from epg_fast.data import ImageSource, PixelNormalization
from epg_fast.distributed import Ranks
from epg_fast.models import save_weights
from epg_fast.objectives import Loss
from epg_fast.runtime import AUTOCAST
from epg_fast.training.accumulation import Gradients
from epg_fast.training.bad_files import still_bad
from epg_fast.training.checkpoint import BackgroundWriter, copy_to_host, is_milestone, load_newest, save_checkpoint
from epg_fast.training.draws import Draws
from epg_fast.training.ema import HostEma, PosthocEma
from epg_fast.training.loss_scale import LossScale
from epg_fast.training.metrics import Metrics, names_by_level, sums_by_level
from epg_fast.training.optimizer import lr_factor, make_optimizer
from epg_fast.training.planning import choice_record
from epg_fast.training.sharded_checkpoint import read_any, save_sharded, together
from epg_fast.training.sharding import load_parts, local, shard
from epg_fast.training.stages import Stage
from epg_fast.training.weight_copies import WeightCopies

log = logging.getLogger("epg_fast")

_STATE = ("step", "iteration", "network", "average", "optimizer", "scaler", "metrics", "data")
_MAX_SKIPPED_IN_A_ROW = 100


class RunState:
    """Everything a checkpoint holds, and the update that changes it."""

    def __init__(self, config: RunConfig, stage: Stage, source: ImageSource, ranks: Ranks):
        self.config, self.stage, self.source, self.ranks = config, stage, source, ranks
        self.step = self.iteration = 0
        self.posthoc_ema = PosthocEma(config, stage)
        if config.parallelism == "fsdp":
            stage.sharding = shard(stage.network, stage.average, self.posthoc_ema.networks, ranks)
        averages = [average for average in (stage.average, *self.posthoc_ema.networks) if average is not None]
        # The first so many are updated with the weights, on their device.
        self._on_device = int(stage.calls_average) if config.offload_ema else len(averages)
        called = [stage.network, stage.average if stage.calls_average else None, getattr(stage, "perceptual", None)]
        self.copies = WeightCopies(filter(None, called), AUTOCAST.get(config.precision))
        planned = stage.chosen.ops["optimizer"]
        if planned == "plain" and not stage.chosen.plan:
            planned = None  # nobody has chosen it
        updated = averages[: self._on_device]
        self.optimizer = make_optimizer(stage.network, config.optimizer, updated, self.copies, planned)
        self.choice = choice_record(stage.chosen, ranks.device)
        """What computes, as checkpoints record it."""
        self.host_averages = HostEma(stage.network, averages[self._on_device :])
        self.loss_scale = LossScale(ranks.device, enabled=config.precision == "fp16")
        self.normalization = PixelNormalization(config.data.normalization)
        self.data_fingerprint = source.fingerprint()
        self.data_backend: str | None = None
        self.bad_files: dict[str, str] = {}
        self.unfinished_metrics: dict = {}
        self.unreadable: list[Path] = []
        self.writer = BackgroundWriter()
        self._pending: _Outcome | None = None
        self._skipped = 0

    def update(
        self, step_module: torch.nn.Module, batch: dict[str, torch.Tensor], metrics: Metrics, stop: bool = False
    ) -> bool:
        """Forward, backward, update; then `settle` the update before this one. Returns whether to end.

        Where the gradient is not finite, nothing changes but `iteration`. `stop`: this rank has been asked to end;
        all ranks learn of it at the same step.
        """
        config, count, before = self.config, batch["x"].shape[0], self._pending
        draws = Draws(config.seed, self.iteration, self.ranks.rank * count, count, self.ranks.device)
        # The running statistics of BatchNorm change in the forward pass already.
        buffers = [b.clone() for b in self.stage.network.buffers()]
        gradients = Gradients(self.stage, step_module, self.normalization, self.loss_scale)
        with self.copies.in_use():
            result = gradients(batch, draws, self.step)
        o, decays = config.optimizer, [self.stage.average_decay(self.step), *self.posthoc_ema.decays(self.step)]
        self.optimizer.schedule(
            lr_factor(self.step, o.schedule, o.warmup_steps, config.steps, o.min_scale, tuple(o.milestones)),
            o.clip_norm if self.step >= o.clip_after else None,
            decays[: self._on_device],
        )
        self.host_averages.before_update()
        norm, found_inf = self.optimizer.step(self.loss_scale.value)
        self.host_averages.after_update(decays[self._on_device :], found_inf)
        self.optimizer.zero_grad()
        self.loss_scale.update(found_inf)
        for buffer, old in zip(self.stage.network.buffers(), buffers, strict=True):
            buffer.copy_(torch.where(found_inf > 0, old, buffer))
        stop = self._report(result, norm, found_inf, stop, metrics)
        self._pending = _Outcome(self.iteration, torch.stack([found_inf.float(), stop]))
        self.iteration += 1
        self.step += 1
        return before is not None and self._settle(before)

    @property
    def made(self) -> int:
        """Updates made: `step`, less one if the newest update was skipped; waits for the device to know."""
        return self.step - (self._pending is not None and self._pending.read()[0])

    def settle(self) -> bool:
        """Correct `step` if the newest update turns out to have been skipped. Returns whether to end.

        Raises RuntimeError when too many in a row were.
        """
        outcome, self._pending = self._pending, None
        return outcome is not None and self._settle(outcome)

    def _settle(self, outcome: _Outcome) -> bool:
        skipped, stop = outcome.read()
        self._skipped = self._skipped + 1 if skipped else 0
        if skipped:
            self.step -= 1
            log.warning("step %d: the gradient is not finite, batch %d is skipped", self.step, outcome.iteration)
        if self._skipped >= _MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"the gradient was not finite for {self._skipped} batches in a row at step {self.step}; "
                "training diverged: lower --optimizer.lr or change --precision"
            )
        return stop

    def save(self, outdir: Path, metrics: Metrics) -> None:
        """Checkpoint and model.safetensors of this very moment, written while training goes on.

        The main rank writes, or all ranks where the networks are sharded. A snapshot of the post-hoc averages, if one
        is due, is written before them. What fails is raised by the next `save`, `check_saved` or `writer.wait`.
        """
        sharding = self.stage.sharding
        if not (self.ranks.main or sharding):
            return
        step = self.made
        state = {
            "step": self.step,  # as the host has it, which follows from "pending"
            "iteration": self.iteration,
            "pending": self._pending and self._pending.state(),
            "network": self.stage.network.state_dict(),
            "average": self.stage.average.state_dict(),
            "posthoc_ema": self.posthoc_ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.loss_scale.state_dict(),
            "metrics": metrics.state_dict(),
            "data": self.data_fingerprint,
            "data_backend": self.data_backend,
            "bad_files": dict(self.bad_files),
            "plan": self.choice,
        }
        snapshot = self.posthoc_ema.snapshot() if self.posthoc_ema.is_due(step) else None
        self.host_averages.wait()
        self.writer.wait()  # before the copy: one at a time in memory
        state, weights, snapshot = copy_to_host([state, self.stage.exported.state_dict(), snapshot])
        metadata = self.stage.metadata() | {"step": step}
        folder, kept = outdir / "checkpoints", (self.config.keep_checkpoints, self.config.keep_every)

        # The checkpoint last: a run that goes on from it does not come by this step again.
        def write():
            write_others(snapshot, weights)
            save_checkpoint(folder, step, state, *kept)

        def write_with_all_ranks():
            gathered = [sharding.gather(parts, likes) for parts in (snapshot, weights)]
            save_sharded(folder, step, state, sharding, likes, *kept, lambda: write_others(*gathered))

        def write_others(snapshot, weights):
            if snapshot is not None:
                self.posthoc_ema.write(step, snapshot)
            if is_milestone(step, self.config.keep_every):
                (outdir / "milestones").mkdir(exist_ok=True)
                save_weights(outdir / "milestones" / f"step_{step:09d}.safetensors", weights, metadata)
            save_weights(outdir / "model.safetensors", weights, metadata)

        likes = self.stage.network.state_dict()
        self.writer.submit(write_with_all_ranks if sharding else write)

    def check_saved(self, together: bool = False) -> None:
        """Raise what the last `save` or `save_snapshot` failed with, if it has ended.

        together: whether all ranks are at this point at the same step, where ranks that all write raise it together.
        """
        if not self.stage.sharding:
            self.writer.check()
        elif together and any(self.ranks.gather(self.writer.failed)):
            self.writer.wait()

    def save_snapshot(self) -> None:
        """Snapshot of the post-hoc averages of this very moment, written while training goes on."""
        self.host_averages.wait()
        self.writer.wait()
        step, snapshot = self.made, copy_to_host(self.posthoc_ema.snapshot())
        sharding, likes = self.stage.sharding, self.stage.network.state_dict()

        def write_with_all_ranks():
            gathered = sharding.gather(snapshot, likes)
            together(sharding, (lambda: self.posthoc_ema.write(step, gathered)) if self.ranks.main else None)

        self.writer.submit(write_with_all_ranks if sharding else lambda: self.posthoc_ema.write(step, snapshot))

    def resume(self, folder: Path) -> None:
        """Load the newest checkpoint of `folder` that all ranks can read, if there is one."""
        stage, share = self.stage, (self.ranks.rank, self.ranks.world_size)
        likes = stage.network.state_dict()

        def read(path):
            return read_any(path, stage.sharding, likes, share)

        state = load_newest(folder, _STATE, self.unreadable, read, self.ranks.gather)
        if state is None:
            return
        if state["data"] != self.data_fingerprint:
            raise ValueError(
                f"{self.config.data.path} is not the dataset that {folder.parent} was trained on (files or labels "
                "differ); restore it, or choose another --outdir"
            )
        load_parts(stage.network, state["network"])
        if stage.average is not None:
            load_parts(stage.average, state["average"])
        for part, saved in (
            (self.posthoc_ema, state["posthoc_ema"]),
            (self.optimizer, state["optimizer"]),
            (self.loss_scale, state["scaler"]),
        ):
            for name, tensor in part.state_dict().items():
                local(tensor).detach().copy_(saved[name])
        self.step, self.iteration, self.unfinished_metrics = state["step"], state["iteration"], state["metrics"]
        if state.get("pending"):
            self._pending = _Outcome(*state["pending"])
        # Runs from before there was a choice have neither entry.
        self.data_backend = state.get("data_backend", "pillow")
        self.bad_files = still_bad(state.get("bad_files", {}), self.source)
        log.info("resuming %s at step %d", folder.parent, self.made)

    def _report(self, result: Loss, norm, found_inf, stop: bool, metrics: Metrics) -> torch.Tensor:
        """Add an update to the metrics, as means over all ranks; returns whether any rank is to end, []."""
        terms = {k: v for k, v in ({"loss": result.loss} | result.terms).items() if v.is_floating_point()}
        means = torch.stack([v.detach().float().mean() for v in terms.values()])
        levels = sums_by_level(result.terms[self.stage.by_level], result.level)
        stop = torch.full_like(means[:1], float(stop))
        if self.ranks.world_size > 1:
            everything = torch.cat([means, levels.flatten(), stop])
            torch.distributed.all_reduce(everything)
            means, levels, stop = everything.split([len(means), levels.numel(), 1])
            means, levels = means / self.ranks.world_size, levels.view(2, -1)
        names = ("grad_norm", *terms, *names_by_level(self.stage.by_level))
        means = torch.cat([norm.float().reshape(1), means])
        counts = torch.cat([torch.ones_like(means), levels[1]])
        metrics.add(names, torch.cat([means, levels[0]]), counts, found_inf <= 0)
        return stop[0]


class _Outcome:
    """What the device has decided about one update, on its way to the host."""

    def __init__(self, iteration: int, flags: torch.Tensor):
        """flags: [2], whether the gradient was not finite and whether to end."""
        self.iteration = iteration
        self._copied = None
        if flags.is_cuda:
            flags = torch.empty(flags.shape, pin_memory=True).copy_(flags, non_blocking=True)
            self._copied = torch.cuda.current_stream().record_event()
        self._flags = flags

    def read(self) -> tuple[bool, bool]:
        """Wait for the device if need be: (the update was skipped, the run is to end)."""
        if self._copied is not None:
            self._copied.synchronize()
        skipped, stop = self._flags.tolist()
        return skipped > 0, stop > 0

    def state(self) -> list:
        """For a checkpoint: what the constructor takes; a wish to end is not kept."""
        return [self.iteration, torch.tensor([float(self.read()[0]), 0.0])]
