"""The training loop of all stages: batch -> loss -> gradient -> update -> EMA -> what is due.

Every random draw, the order of the data included, is a function of (seed, iteration), so a run that was killed and
started again continues with the same numbers as if it had never stopped. `iteration` counts batches, which users call
steps; file names, schedules and EMA go by it.

The host never waits for the device between two lines of metrics. Whether a gradient is finite is decided on the device:
where it is not, the batch is skipped, and counts as a step that changes nothing.
"""

from __future__ import annotations

import contextlib
import logging

import torch
import torch.distributed as dist

from epg_fast.config import RunConfig
from epg_fast.data import DataError, ImageSource, Prefetcher, make_loader, open_images
from epg_fast.distributed import StopSignals, joined
from epg_fast.models.fp8 import require_fp8, use_fp8
from epg_fast.objectives import Loss
from epg_fast.runtime import suitable_threads
from epg_fast.training.checkpoint import tidy
from epg_fast.training.dataset import BadFiles, choose_backend, decoder, note_classes
from epg_fast.training.draws import Draws
from epg_fast.training.evaluation import Evaluation, Preview, check_evaluation
from epg_fast.training.flops import Utilization
from epg_fast.training.gradients import add_gradients, check_batch_size, check_compilation, compile_stage
from epg_fast.training.measuring import Collapse, Measurement, Probe, check_probe, measure
from epg_fast.training.metrics import (
    Metrics,
    Progress,
    names_by_level,
    open_loggers,
    open_tensorboard,
    require_loggers,
    sums_by_level,
)
from epg_fast.training.optimizer import lr_factor
from epg_fast.training.parallel import Agreement
from epg_fast.training.stages import Stage
from epg_fast.training.state import RunFolder, RunState

log = logging.getLogger("epg_fast")
_MEASUREMENTS = (Preview, Collapse, Probe, Evaluation)
"""In the order in which they are made."""


def train(config: RunConfig, stage_class: type[Stage]) -> None:
    """Train until `config.steps`, resuming from the newest checkpoint of `config.outdir`.

    Raises ValueError for what the user can mend (data, configuration, checkpoints), OSError when the disk is full,
    RuntimeError when the gradient stays non-finite.
    """
    remedy = "the same command resumes from the last checkpoint"
    with joined(config.device, group_for_one=config.parallelism == "fsdp", remedy=remedy) as ranks:
        source, folder = check_command(config), RunFolder(config.outdir)
        check_compilation(config, ranks)
        if config.fp8:
            require_fp8(ranks.device)
        torch.manual_seed(config.seed)
        check_batch_size(config, ranks.world_size)
        stage = stage_class(config, ranks, folder.choice)
        millions = sum(p.numel() for p in stage.network.parameters()) / 1e6
        log.info("network: %s, %.2f M parameters", config.model.preset, millions)
        note_classes(stage, source)
        with suitable_threads(stage.network, stage.chosen.threads), folder:
            folder.wait_for_writer(ranks)
            folder.require(config)
            state = RunState(stage, source)
            if config.fp8:
                log.info(use_fp8(stage.network))  # after the EMA were copied from it, which stay in 16 bits
            state.resume()
            missing = _missing(state)
            if state.iteration >= config.steps and not missing:
                log.info("%s is complete: %d steps", folder.path, state.iteration)
                return
            with contextlib.closing(_loader(state)) as loader:
                _Run(config, state, loader, folder).train(missing)


def check_command(config: RunConfig) -> ImageSource:
    """The images to train on. Raises ValueError for what is wrong with a command before anything takes long."""
    if not config.outdir:
        raise ValueError("outdir is missing; name a run folder with --outdir")
    RunFolder(config.outdir).require(config)
    check_evaluation(config)
    require_loggers(config)
    source = open_images(config.data.path)
    if Probe.every(config):
        check_probe(config, source)
    return source


def _missing(state: RunState) -> list[type[Measurement]]:
    """The measurements that an earlier process has not come to, the same on all ranks."""
    step, outdir = state.iteration, state.outdir
    due = [kind for kind in _MEASUREMENTS if kind.is_due(state.config, step)]
    return state.ranks.decide(lambda: [kind for kind in due if kind.is_missing(outdir, step)]) if due else []


def _loader(state: RunState):
    config, ranks, stage = state.config, state.ranks, state.stage
    state.data_backend = choose_backend(config.data.backend, state.data_backend, ranks)
    return make_loader(
        state.source,
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


class _StopWaiting(Exception):
    """The run is to end, and no batch comes that it could end after."""


class _Run:
    """A run from the iteration it has reached: the loop, and what the loop writes to."""

    def __init__(self, asked: RunConfig, state: RunState, loader, folder: RunFolder):
        """asked: the configuration as it was given, without what a plan has put in the place of `auto`."""
        config, ranks, stage, outdir = state.config, state.ranks, state.stage, state.outdir
        self.config, self.state = config, state
        made: dict[type[Measurement], Measurement] = {}
        for kind in (Collapse, Probe):  # which read images of their own
            if kind.every(config):
                ranks.together(lambda: made.update({kind: kind(state)}))  # noqa: B023 (called at once)
        self.bad_files = BadFiles(state.bad_files, loader, state.source, config.data.max_bad_fraction, outdir, ranks)
        decoded = decoder(state.data_backend, config.data.workers)
        log.info("images are decoded by %s", decoded)
        loggers: list = []
        ranks.decide(lambda: loggers.extend(open_loggers(config, outdir, state.iteration)))
        # Nothing is written before this line, so that a command that fails above can be corrected and given again.
        folder.claim(stage.name, asked, state.choice, ranks)
        if ranks.main:
            tidy(outdir, state.iteration, state.damaged)
            if config.tensorboard:
                loggers += open_tensorboard(outdir, state.iteration)
        self.metrics = Metrics(outdir if ranks.main else None, state.iteration, loggers, Utilization(stage))
        if stage.chosen.plan:
            self.metrics.begin_with({"plan": state.choice})
        self.metrics.load_state_dict(state.unfinished_metrics, ranks.device)
        self.signals, self.stop = StopSignals(), Agreement(ranks)
        if Preview.every(config):
            made[Preview] = Preview(state, self.metrics)
        if Evaluation.every(config):
            made[Evaluation] = Evaluation(state, self._is_to_end)
        self.measurements = [made[kind] for kind in _MEASUREMENTS if kind in made]
        compile_stage(stage)
        images = f"images of {state.source.root}, decoded by {decoded}"
        self.progress = Progress(stage.name, config.steps, state.iteration, images, ranks)
        self.batches = Prefetcher(loader, ranks.device, on_stall=self._stalled)

    def train(self, missing: list[type[Measurement]]) -> None:
        """Train to the last step, or until a signal asks to end, and write what is to be written.

        missing: measurements to make before all else.
        """
        state = self.state
        with self.signals:  # until everything is written
            try:
                with self.progress, self.batches:
                    first = [m for m in self.measurements if type(m) in missing]
                    self._loop(stop=not measure(first, self.metrics, state.iteration))
            except DataError as error:
                raise self.bad_files.listed(error) from error
            finally:
                state.writer.wait()
            state.ranks.barrier()
            self.metrics.close()
        if state.iteration < self.config.steps:
            who = self.signals.asked or "another rank"
            log.warning("%s: stopped at step %d; the same command goes on", who, state.iteration)

    def _is_to_end(self) -> bool:
        return self.stop(bool(self.signals.asked) or self.state.writer.failed)

    def _stalled(self, seconds: float) -> None:
        self.progress.stalled(seconds)
        if self.signals.asked and self.state.ranks.world_size == 1:
            raise _StopWaiting

    def _loop(self, stop: bool) -> None:
        config, state, batches = self.config, self.state, self.batches
        while state.iteration < config.steps and not stop:
            waited = batches.waited
            try:
                batch = next(batches)
            except _StopWaiting:
                state.save(self.metrics)
                break
            self.metrics.count(config.batch_size, batches.waited - waited)
            self.progress.data_came()
            train_step(state, batch, self.metrics)
            self.progress.update()
            stop = self._do_what_is_due(self._is_to_end())
        self.stop.settle()

    def _do_what_is_due(self, stop: bool) -> bool:
        """Returns whether the run is to end."""
        config, state, iteration = self.config, self.state, self.state.iteration
        logs = config.is_due(iteration, config.log_every)
        saves = config.is_due(iteration, config.checkpoint_every) or stop
        if logs or saves:
            self.bad_files.exchange()
        if logs:
            state.check_skipped()
            self.progress.show(self.metrics.write(iteration, lr=state.optimizer.lr))
        # Before the checkpoint, or with it: a run that goes on from it does not come by this iteration again.
        if saves:
            state.save(self.metrics)
        elif state.posthoc_ema.is_due(iteration):
            state.save_snapshot()
        due = [measurement for measurement in self.measurements if measurement.is_due(config, iteration)]
        if measure(due, self.metrics, iteration, stop):
            return stop
        self.bad_files.exchange()
        state.save(self.metrics)
        return True


def train_step(state: RunState, batch: dict[str, torch.Tensor], metrics: Metrics) -> None:
    """One iteration: forward, backward, update, EMA.

    Where the gradient is not finite, only counters change: `iteration`, `skipped` and the loss scale.
    """
    config, stage, iteration, o = state.config, state.stage, state.iteration, state.config.optimizer
    if config.cuda_graphs:  # what networks returned in the step before is no longer needed
        torch.compiler.cudagraph_mark_step_begin()
    count = batch["x"].shape[0]
    draws = Draws(config.seed, iteration, state.ranks.rank * count, count, state.ranks.device)
    buffers = [b.clone() for b in stage.network.buffers()]  # BatchNorm's change in the forward pass already
    with state.copies.in_use():
        loss = add_gradients(stage, state.parallel, batch, draws, iteration, state.loss_scale)

    decays = [stage.ema_decay(iteration), *state.posthoc_ema.decays(iteration)]
    state.optimizer.schedule(
        lr_factor(iteration, o.schedule, o.warmup_steps, config.steps, o.min_scale, tuple(o.milestones)),
        o.clip_norm if iteration >= o.clip_after else None,
        decays[: state.emas_on_device],
    )
    state.host_ema.before_update()
    norm, found_inf = state.optimizer.step(state.loss_scale.value)
    state.host_ema.after_update(decays[state.emas_on_device :], found_inf)
    state.optimizer.zero_grad()

    state.loss_scale.update(found_inf)
    state.count_skipped(found_inf)
    for buffer, old in zip(stage.network.buffers(), buffers, strict=True):
        buffer.copy_(torch.where(found_inf > 0, old, buffer))
    _report(state, loss, norm, found_inf, metrics)
    state.iteration += 1


def _report(state: RunState, loss: Loss, norm: torch.Tensor, found_inf: torch.Tensor, metrics: Metrics) -> None:
    """Add an update to the metrics, as means over all ranks."""
    by_level = state.stage.by_level
    terms = {k: v for k, v in ({"loss": loss.loss} | loss.terms).items() if v.is_floating_point()}
    means = torch.stack([v.detach().float().mean() for v in terms.values()])
    levels = sums_by_level(loss.terms[by_level], loss.level)
    if state.ranks.world_size > 1:
        both = torch.cat([means / state.ranks.world_size, levels.flatten()])
        dist.all_reduce(both)
        means, levels = both[: len(means)], both[len(means) :].view(2, -1)
    means = torch.cat([norm.float().reshape(1), means])
    counts = torch.cat([torch.ones_like(means), levels[1]])
    names = ("grad_norm", *terms, *names_by_level(by_level))
    metrics.add(names, torch.cat([means, levels[0]]), counts, found_inf <= 0)
