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
import logging
import warnings
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from epg_fast.config import RunConfig
from epg_fast.data import (
    DataError,
    ImageSource,
    Prefetcher,
    make_loader,
    open_images,
    resolve_backend,
)
from epg_fast.distributed import Ranks, StopSignals, joined
from epg_fast.models.fp8 import require_fp8, use_fp8
from epg_fast.runtime import suitable_threads
from epg_fast.training.accumulation import check_parts
from epg_fast.training.bad_files import BadFiles
from epg_fast.training.batch_norm import synchronize_batch_norm
from epg_fast.training.checkpoint import remove_temporaries, set_aside
from epg_fast.training.classes import note_classes
from epg_fast.training.compilation import begin_step, check_compilation, compile_stage
from epg_fast.training.hardware import Utilization
from epg_fast.training.metrics import Metrics, require_wandb
from epg_fast.training.planning import kept_choice, note_choice
from epg_fast.training.preview import preview_is_due, preview_path, write_preview
from epg_fast.training.progress import Progress
from epg_fast.training.run_folder import RunFolder
from epg_fast.training.stages import Stage
from epg_fast.training.state import RunState

log = logging.getLogger("epg_fast")

_PIXELS = "their pixels differ slightly, so that the numbers are no longer those of an uninterrupted run"


def train(config: RunConfig, stage_class: type[Stage]) -> None:
    """Train until `config.steps`, resuming from the newest checkpoint of `config.outdir`.

    Raises ValueError for what the user can mend (data, configuration, checkpoints), CheckpointError when the disk is
    full, RuntimeError when the gradient stays non-finite.
    """
    remedy = "the same command resumes from the last checkpoint"
    with joined(config.device, group_for_one=config.parallelism == "fsdp", remedy=remedy) as ranks:
        _train(config, stage_class, ranks)


def check_command(config: RunConfig) -> ImageSource:
    """The images to train on. Raises ValueError for what is wrong with a command before anything takes long."""
    if not config.outdir:
        raise ValueError("outdir is missing; name a run folder with --outdir")
    RunFolder(config.outdir).require(config)
    require_wandb(config.wandb)
    return open_images(config.data.path)


def _train(config: RunConfig, stage_class: type[Stage], ranks: Ranks) -> None:
    source, outdir, folder = check_command(config), Path(config.outdir), RunFolder(config.outdir)
    check_compilation(config, ranks)
    if config.fp8:
        require_fp8(ranks.device)

    torch.manual_seed(config.seed)
    check_parts(config, ranks.world_size)
    stage = stage_class(config, ranks, kept_choice(outdir) if folder.begun else None)
    note_classes(stage, source)
    with suitable_threads(stage.network, stage.chosen.threads), folder:
        folder.wait_for_writer(ranks)
        folder.require(config)
        state = RunState(stage.config, stage, source, ranks)
        if config.fp8:
            log.info(use_fp8(stage.network))  # after the averages were made of it, which stay in 16 bits
        state.resume(outdir / "checkpoints")
        if state.step >= config.steps:
            _draw_missing_preview(state, outdir)
            log.info("%s is complete: %d steps", outdir, state.step)
        else:
            _go_on(config, state, folder)


def _go_on(asked: RunConfig, state: RunState, folder: RunFolder) -> None:
    """asked: the configuration as it was given, without what a plan has put in the place of `auto`."""
    config, ranks, stage, source = state.config, state.ranks, state.stage, state.source
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
        _Run(asked, state, loader, folder).train()


class _Run:
    """A run from the step it has reached: the loop, and what the loop writes to."""

    def __init__(self, asked: RunConfig, state: RunState, loader, folder: RunFolder):
        config, ranks, stage, source, outdir = state.config, state.ranks, state.stage, state.source, folder.path
        self.config, self.state, self.outdir = config, state, outdir
        self.bad_files = BadFiles(state.bad_files, loader, source, config.data.max_bad_fraction, outdir, ranks)
        decoder = _decoder(state.data_backend, config.data.workers)
        log.info("images are decoded by %s", decoder)
        # Nothing is written before this line, so that a command that fails above can be corrected and given again.
        folder.claim(stage.name, asked, ranks)
        if ranks.main:
            set_aside(state.unreadable)
            remove_temporaries(outdir)
            note_choice(outdir, state.choice)
        state.posthoc_ema.discard_after(state.made)
        writers = (config.tensorboard, config.wandb, dataclasses.asdict(config))
        self.metrics = Metrics(outdir, ranks.main, state.made, *writers, Utilization(stage))
        if stage.chosen.plan:
            self.metrics.begin_with({"plan": state.choice})
        self.metrics.load_state_dict(state.unfinished_metrics, ranks.device)
        self.step_module = make_step_module(stage)
        compile_stage(stage)
        self.metrics.add_image("samples", _draw_missing_preview(state, outdir), state.made)
        images = f"images of {source.root}, decoded by {decoder}"
        self.progress = Progress(stage.name, config.steps, state.step, images, ranks)
        self.signals = StopSignals()
        self.batches = Prefetcher(loader, ranks.device, on_stall=self._stalled)

    def train(self) -> None:
        """Train to the last step, or until a signal asks to end, and write what is to be written."""
        state = self.state
        with self.signals:  # until everything is written
            try:
                with self.progress, self.batches:
                    self._loop()
            except DataError as error:
                raise self.bad_files.listed(error) from error
            finally:
                state.writer.wait()
            state.ranks.barrier()
            self.metrics.close()
        if state.step < self.config.steps:
            who = self.signals.asked or "another rank"
            log.warning("%s: stopped at step %d; the same command goes on", who, state.made)

    def _stalled(self, seconds: float) -> None:
        self.progress.stalled(seconds)
        if self.signals.asked and self.state.ranks.world_size == 1:
            raise _StopWaiting

    def _loop(self) -> None:
        config, state, batches = self.config, self.state, self.batches
        done = state.made  # a step that is reached again, because the update after it was skipped, is written once
        stop = False
        while state.step < config.steps and not stop:
            waited = batches.waited
            try:
                batch = next(batches)
            except _StopWaiting:
                state.save(self.outdir, self.metrics)
                break
            self.metrics.count(config.batch_size, batches.waited - waited)
            self.progress.data_came()
            begin_step(config)
            stop = state.update(self.step_module, batch, self.metrics, bool(self.signals.asked))
            if state.step % config.log_every == 0 or state.step == config.steps:
                stop = state.settle() or stop
            self.progress.reach(state.step)
            state.check_saved()
            if stop or self._something_is_due():
                # `step` can be one too high still: then nothing is due but what a signal asks for
                new = done < state.made == state.step
                self._write_what_is_due(new, stop)
                done = max(done, state.made)

    def _something_is_due(self) -> bool:
        config, step, preview = self.config, self.state.step, self.state.stage.preview
        every = [config.log_every, config.checkpoint_every, preview.every if preview else 0]
        every.append(config.posthoc_ema.every if config.posthoc_ema.sigma_rel else 0)
        return step == config.steps or any(n and step % n == 0 for n in every)

    def _write_what_is_due(self, new: bool, stop: bool) -> None:
        """At a step that is `new`, or where the run is to `stop`."""
        config, state, step = self.config, self.state, self.state.step
        last = step == config.steps
        logs = new and (step % config.log_every == 0 or last)
        saves = new and (step % config.checkpoint_every == 0 or last) or stop
        if logs or saves:
            self.bad_files.exchange()
            state.check_saved(together=True)
        if logs:
            self.progress.show(self.metrics.write(step, lr=state.optimizer.lr))
        # Before the checkpoint, or with it: a run that goes on from it does not come by this step again.
        if saves:
            state.save(self.outdir, self.metrics)
        elif new and state.posthoc_ema.is_due(step):
            state.save_snapshot()
        if new and preview_is_due(state.stage, step):
            state.host_averages.wait()
            self.metrics.add_image("samples", write_preview(state.stage, self.outdir, step), step)


def _draw_missing_preview(state: RunState, outdir: Path):
    """The preview of the step to go on from, if one was due and the run was killed before it was written."""
    if state.made and preview_is_due(state.stage, state.made):
        missing = not preview_path(outdir, state.made).exists()
        if state.ranks.gather(missing)[0] if state.stage.sharding else missing:
            return write_preview(state.stage, outdir, state.made)
    return None


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


def check_one_backend(backend: str, ranks: Ranks) -> None:
    """Raise ValueError, on every rank, when the machines of a run would decode differently."""
    chosen = ranks.gather(backend)
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


def make_step_module(stage: Stage) -> torch.nn.Module:
    """Module that calls the stage's method it is given; it averages gradients and BatchNorm statistics over ranks."""
    module = _StepModule(stage)
    if stage.sharding:
        return stage.sharding.running(module)
    if stage.ranks.world_size == 1:
        return module
    synchronize_batch_norm(stage.network)
    # The argument's new name is not known to older versions, and means that buffers are still sent at first.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    return DistributedDataParallel(
        module,
        device_ids=[stage.ranks.device] if stage.ranks.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,  # without a second copy of the gradients
    )


class _StepModule(torch.nn.Module):
    """The stage's computations as a forward pass, so that DistributedDataParallel sees one forward per backward."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.network = stage.network

    def forward(self, compute, *arguments):
        return compute(*arguments)
