"""The training loop of all stages: draw, call the objective, update, average, log, save.

Every random draw, the order of the data included, is a function of (seed, iteration), so a run that was killed and
started again continues with the same numbers as if it had never stopped. `iteration` counts batches; `step` counts
updates, which lag behind by the batches whose gradient was not finite.

The host never waits for the device between two lines of metrics: whether an update is made is decided there, and the
host, which takes it for made, learns of it one iteration later; on every device alike, so that the numbers are too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
from pathlib import Path
from typing import IO

import torch
import yaml
from torch.nn.parallel import DistributedDataParallel

from epg_fast.config import RunConfig
from epg_fast.data import (
    DataError,
    ImageSource,
    PixelNormalization,
    Prefetcher,
    make_loader,
    open_images,
    resolve_backend,
)
from epg_fast.models import save_weights
from epg_fast.objectives import Loss
from epg_fast.runtime import autocast
from epg_fast.training import distributed
from epg_fast.training.bad_files import BadFiles, still_bad
from epg_fast.training.checkpoint import (
    BackgroundWriter,
    copy_to_host,
    is_milestone,
    list_checkpoints,
    load_newest,
    remove_temporaries,
    save_checkpoint,
    set_aside,
)
from epg_fast.training.draws import Draws
from epg_fast.training.hardware import Utilization
from epg_fast.training.levels import names_by_level, sums_by_level
from epg_fast.training.loss_scale import LossScale
from epg_fast.training.metrics import Metrics
from epg_fast.training.optimizer import lr_factor, make_optimizer
from epg_fast.training.posthoc_ema import PosthocEma
from epg_fast.training.preview import write_preview
from epg_fast.training.progress import Progress
from epg_fast.training.signals import StopSignals
from epg_fast.training.stages import Stage

log = logging.getLogger("epg_fast")

# Fields that may change between the parts of a run without changing its numbers.
_FREE = (
    "device",
    "compile",
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
_STATE = ("step", "iteration", "network", "average", "optimizer", "scaler", "metrics", "data")
_MAX_SKIPPED_IN_A_ROW = 100
_PIXELS = "their pixels differ slightly, so that the numbers are no longer those of an uninterrupted run"


def train(config: RunConfig, stage_class: type[Stage]) -> None:
    """Train until `config.steps`, resuming from the newest checkpoint of `config.outdir`.

    Raises ValueError for what the user can mend (data, configuration, checkpoints), CheckpointError when the disk is
    full, RuntimeError when the gradient stays non-finite.
    """
    ranks = distributed.start(config.device)
    try:
        _train(config, stage_class, ranks)
    except RuntimeError as error:
        raise distributed.explained(error, ranks) from error
    distributed.stop()


def _train(config: RunConfig, stage_class: type[Stage], ranks: distributed.Ranks) -> None:
    if not config.outdir:
        raise ValueError("outdir is missing; name a run folder with --outdir")
    outdir = Path(config.outdir)
    source = open_images(config.data.path)

    torch.manual_seed(config.seed)
    stage = stage_class(config, ranks)
    classes = getattr(stage.network, "num_classes", 0)
    if classes and len(source.classes) > classes:
        raise ValueError(
            f"{source.root} has {len(source.classes)} classes, but the model has {classes}; "
            f"pass --model.num_classes {len(source.classes)}"
        )
    check_run_folder(outdir, config)
    state = RunState(config, stage, source, ranks)
    state.resume(outdir / "checkpoints")
    if state.step >= config.steps:
        log.info("%s is complete: %d steps", outdir, state.step)
        return
    state.data_backend = choose_backend(config.data.backend, state.data_backend, ranks.device)
    check_one_backend(state.data_backend, ranks)
    loader = make_loader(
        source,
        config.data,
        backend=state.data_backend,
        image_size=stage.network.image_size,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start=state.iteration,
        three_views=stage.three_views,
        device=ranks.device,
    )
    with contextlib.closing(loader):
        _run(config, state, loader, source, outdir)


def _run(config: RunConfig, state: RunState, loader, source: ImageSource, outdir: Path) -> None:
    ranks, stage = state.ranks, state.stage
    bad_files = BadFiles(state.bad_files, loader, source, config.data.max_bad_fraction, outdir, ranks)
    decoder = _decoder(state.data_backend, config.data.workers)
    log.info("images are decoded by %s", decoder)
    # Nothing is written before this line, so that a command that fails above can be corrected and given again.
    lock = claim_run_folder(outdir, stage.name, config, ranks)
    if ranks.main:
        set_aside(state.unreadable)
        remove_temporaries(outdir)
    state.posthoc_ema.discard_after(state.step)
    writers = (config.tensorboard, config.wandb, dataclasses.asdict(config))
    metrics = Metrics(outdir, ranks.main, state.step, *writers, Utilization(stage))
    metrics.load_state_dict(state.unfinished_metrics, ranks.device)
    step_module = make_step_module(stage)
    if config.compile == "on" or (config.compile == "auto" and ranks.device.type == "cuda"):
        compile_blocks(stage)
    progress = Progress(stage.name, config.steps, state.step, f"images of {source.root}, decoded by {decoder}", ranks)
    signals = StopSignals()

    def stalled(seconds: float) -> None:
        progress.stalled(seconds)
        if signals.asked and ranks.world_size == 1:
            raise _StopWaiting

    batches = Prefetcher(loader, ranks.device, on_stall=stalled)
    with signals:  # until everything is written
        try:
            with progress, batches:
                _loop(config, state, step_module, batches, metrics, progress, bad_files, outdir, signals)
        except DataError as error:
            raise bad_files.listed(error) from error
        finally:
            state.writer.wait()
        ranks.barrier()
        metrics.close()
    if state.step < config.steps:
        log.warning("%s: stopped at step %d; the same command goes on", signals.asked or "another rank", state.step)
    if lock:
        lock.close()


def _loop(config, state, step_module, batches, metrics, progress, bad_files, outdir, signals) -> None:
    done = state.step  # a step that is reached again, because its update was skipped, is saved once
    stop = False
    while state.step < config.steps and not stop:
        waited = batches.waited
        try:
            batch = next(batches)
        except _StopWaiting:
            state.save(outdir, metrics)
            break
        metrics.count(config.batch_size, batches.waited - waited)
        progress.data_came()
        stop = state.update(step_module, batch, metrics, bool(signals.asked))
        if state.step % config.log_every == 0 or state.step == config.steps:
            stop = state.settle() or stop
        progress.reach(state.step)
        last, new = state.step == config.steps, state.step > done
        done = max(done, state.step)
        logs = new and (state.step % config.log_every == 0 or last)
        saves = new and (state.step % config.checkpoint_every == 0 or last) or stop
        if new:
            # Before the checkpoint: a run that goes on from it does not come by this step again.
            state.posthoc_ema.write_if_due(state.step)
        if logs or saves:
            bad_files.exchange()
        if logs:
            progress.show(metrics.write(state.step, lr=state.optimizer.lr))
        if saves:
            state.save(outdir, metrics)
        state.writer.check()
        preview = state.stage.preview
        if new and preview and preview.every and state.ranks.main and (state.step % preview.every == 0 or last):
            metrics.add_image("samples", write_preview(state.stage, outdir, state.step), state.step)


class _StopWaiting(Exception):
    """The run is to end, and no batch comes that it could end after."""


def choose_backend(wanted: str, used: str | None, device: torch.device | str = "cpu") -> str:
    """Return the loader, "dali" or "pillow", for `data.backend` = `wanted` in a run that has `used` so far (None: new).

    `auto` keeps to what the run has used, because the pixels of the two differ slightly; another one by name is obeyed
    with a warning. Raises ValueError if the one to keep to does not work here.
    """
    if used is None:
        return resolve_backend(wanted, device)
    if wanted not in ("auto", used):
        wanted = resolve_backend(wanted, device)
        log.warning("the images of this run were decoded by %s so far, now by %s as asked: %s", used, wanted, _PIXELS)
        return wanted
    try:
        found, reason = resolve_backend(used, device), "it is not installed"
    except (ValueError, ImportError) as error:
        found, reason = None, str(error)
    if found != used:
        raise ValueError(
            f"the images of this run were decoded by {used} so far, which does not work here: {reason}. Install it "
            f"(pip install nvidia-dali-cuda130, or -cuda120), or go on with --data.backend pillow: {_PIXELS}"
        )
    return used


def check_one_backend(backend: str, ranks: distributed.Ranks) -> None:
    """Raise ValueError, on every rank, when the machines of a run would decode differently."""
    chosen = ranks.gather_objects(backend)
    for rank, other in enumerate(chosen):
        if other != chosen[0]:
            raise ValueError(
                f"rank {rank} decodes images with {other}, rank 0 with {chosen[0]}: `epg-fast env` on both machines "
                "says what is missing; install it, or pass --data.backend pillow"
            )


def _decoder(backend: str, workers: int) -> str:
    if backend == "dali":
        return f"DALI ({max(workers, 1)} thread{'s' * (workers > 1)})"
    return f"Pillow ({workers} process{'es' * (workers != 1)})" if workers else "Pillow (in the training process)"


class RunState:
    """Everything a checkpoint holds, and the update that changes it."""

    def __init__(self, config: RunConfig, stage: Stage, source: ImageSource, ranks: distributed.Ranks):
        self.config, self.stage, self.source, self.ranks = config, stage, source, ranks
        self.step = self.iteration = 0
        self.posthoc_ema = PosthocEma(config, stage)
        averages = [stage.average, *self.posthoc_ema.averages]
        self.optimizer = make_optimizer(stage.network, config.optimizer, averages)
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
        with autocast(self.ranks.device, config.precision):
            result = step_module(self._normalized(batch), draws, self.step)
        self.loss_scale(result.loss).backward()
        o = config.optimizer
        self.optimizer.schedule(
            lr_factor(self.step, o.schedule, o.warmup_steps, config.steps, o.min_scale, tuple(o.milestones)),
            o.clip_norm if self.step >= o.clip_after else None,
            [self.stage.average_decay(self.step), *self.posthoc_ema.decays(self.step)],
        )
        norm, found_inf = self.optimizer.step(self.loss_scale.value)
        self.optimizer.zero_grad()
        self.loss_scale.update(found_inf)
        for buffer, old in zip(self.stage.network.buffers(), buffers, strict=True):
            buffer.copy_(torch.where(found_inf > 0, old, buffer))
        stop = self._report(result, norm, found_inf, stop, metrics)
        self._pending = _Outcome(self.iteration, torch.stack([found_inf.float(), stop]))
        self.iteration += 1
        self.step += 1
        return before is not None and self._settle(before)

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
        """Checkpoint and model.safetensors of this very moment, written by the main rank while training goes on."""
        if not self.ranks.main:
            return
        step = self.step
        state = {
            "step": step,
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
        }
        self.writer.wait()  # before the copy: one at a time in memory
        state, weights = copy_to_host([state, self.stage.exported.state_dict()])
        metadata = self.stage.metadata() | {"step": step}

        def write():
            # The checkpoint last: a run that goes on from it does not come by this step again.
            if is_milestone(step, self.config.keep_every):
                (outdir / "milestones").mkdir(exist_ok=True)
                save_weights(outdir / "milestones" / f"step_{step:09d}.safetensors", weights, metadata)
            save_weights(outdir / "model.safetensors", weights, metadata)
            save_checkpoint(outdir / "checkpoints", step, state, self.config.keep_checkpoints, self.config.keep_every)

        self.writer.submit(write)

    def resume(self, folder: Path) -> None:
        """Load the newest readable checkpoint of `folder`, if there is one."""
        state = load_newest(folder, _STATE, self.unreadable)
        if state is None:
            return
        if state["data"] != self.data_fingerprint:
            raise ValueError(
                f"{self.config.data.path} is not the dataset that {folder.parent} was trained on (files or labels "
                "differ); restore it, or choose another --outdir"
            )
        self.stage.network.load_state_dict(state["network"])
        self.stage.average.load_state_dict(state["average"])
        self.posthoc_ema.load_state_dict(state.get("posthoc_ema", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss_scale.load_state_dict(state["scaler"])
        self.step, self.iteration, self.unfinished_metrics = state["step"], state["iteration"], state["metrics"]
        if state.get("pending"):
            self._pending = _Outcome(*state["pending"])
        # Runs from before there was a choice have neither entry.
        self.data_backend = state.get("data_backend", "pillow")
        self.bad_files = still_bad(state.get("bad_files", {}), self.source)
        log.info("resuming %s at step %d", folder.parent, self.step)

    def _normalized(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: self.normalization.normalize(v) if v.dtype == torch.uint8 else v for k, v in batch.items()}

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


def make_step_module(stage: Stage) -> torch.nn.Module:
    """Module whose forward pass is the stage's loss; it averages gradients and BatchNorm statistics over the ranks."""
    module = _StepModule(stage)
    if stage.ranks.world_size == 1:
        return module
    distributed.synchronize_batch_norm(stage.network)
    return DistributedDataParallel(
        module,
        device_ids=[stage.ranks.device] if stage.ranks.device.type == "cuda" else None,
        broadcast_buffers=False,
    )


class _StepModule(torch.nn.Module):
    """The stage's loss as a forward pass, so that DistributedDataParallel sees one forward per backward."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.network = stage.network
        self._loss = stage.loss

    def forward(self, batch, draws, step):
        return self._loss(batch, draws, step)


def compile_blocks(stage: Stage, **options) -> None:
    """torch.compile every transformer block in place: fast to compile, since all blocks of a kind share the graph.

    The shapes are static: a stage has a handful of them (pre-training three), and code for any batch size is slower.
    options: further arguments of torch.compile.
    """
    networks = [stage.network, stage.average, getattr(stage, "perceptual", None)]
    for network in filter(None, networks):
        for block in [*network.blocks, *getattr(network, "decoder_blocks", ())]:
            block.compile(dynamic=False, **options)


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
