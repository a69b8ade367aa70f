"""Metrics of a run: means over log intervals in metrics.jsonl, TensorBoard, Weights & Biases and Trackio.

A line has `step` (batches drawn), `lr`, `grad_norm` (before clipping), `loss` and its terms, one term by noise level
(`squared_error_by_level/0` is that of the noisiest eighth of the grid, `/7` of the cleanest; eighths without samples
are left out), `images_per_second`, `data_wait` (share of the time), and on a GPU `peak_memory_gib` and `mfu`. The file
of a run with a plan begins with a line of step 0, which has the `plan`. Figures that are measured beside training
(`write_figures`) have lines of their own, after that of their step; the time they take counts in no rate (`paused`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from epg_fast.config import RunConfig
from epg_fast.distributed import Ranks
from epg_fast.files import write_atomically
from epg_fast.training.flops import Utilization

log = logging.getLogger("epg_fast")

LEVELS = 8
# Seconds without a batch after which the log says so.
_LONG_STALL = 30.0


def sums_by_level(values: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Sums and counts of `values` [B] in LEVELS equal ranges of the grid: [2, LEVELS], float32.

    level: [B], or [] for all, in 0..1: 0 is sigma_max and range 0, 1 is sigma_min and range LEVELS - 1. Nothing is read
    on the host, and there are no atomic additions: the same values give the same bits.
    """
    values = values.detach().float()
    place = (level * LEVELS).long().clamp(0, LEVELS - 1).expand_as(values)
    hit = place[:, None] == torch.arange(LEVELS, device=values.device)
    return torch.stack([torch.where(hit, values[:, None], 0.0).sum(0), hit.sum(0)])


def names_by_level(name: str) -> tuple[str, ...]:
    """("name_by_level/0", ...): what metrics call the ranges."""
    return tuple(f"{name}_by_level/{i}" for i in range(LEVELS))


class Metrics:
    """Accumulates values between two lines of metrics.jsonl.

    outdir: None on the ranks that write nothing. step: batches drawn before; later lines of an earlier process are
    dropped. loggers: see `open_loggers`. utilization: figures of the GPU to add to each line, if any.
    """

    def __init__(
        self,
        outdir: Path | None,
        step: int = 0,
        loggers: Sequence = (),
        utilization: Utilization | None = None,
    ):
        self._path = outdir and outdir / "metrics.jsonl"
        self._loggers, self._utilization = loggers, utilization
        self._begin(step)
        if self._path and self._path.exists():  # what comes after `step` will be written again
            kept = [line + b"\n" for found, line in _lines(self._path) if found <= step]
            write_atomically(self._path, b"".join(kept))

    def _begin(self, step: int) -> None:
        """A line, after that of `step`."""
        # Names of the values of an update -> their sums and counts, float64 [2, n]; they may change within an interval.
        self._groups: dict[tuple[str, ...], torch.Tensor] = {}
        self._written = step
        self._since, self._waited, self._images = time.perf_counter(), 0.0, 0

    def begin_with(self, header: dict) -> None:
        """Let the file of a new run begin with a line of step 0 that has the header's entries."""
        if self._path and not (self._path.exists() and self._path.stat().st_size):
            self._append({"step": 0} | header)

    def add(self, names: tuple[str, ...], sums: torch.Tensor, counts: torch.Tensor, made: torch.Tensor) -> None:
        """Add an update's sums and counts, [len(names)] each, to the means of the line, if it was `made` (bool []).

        Nothing is read from the device before a line is written.
        """
        both = torch.where(made, torch.stack([sums, counts]).double(), 0.0)
        self._groups[names] = self._groups[names] + both if names in self._groups else both

    def count(self, images: int, waited: float) -> None:
        """Count images consumed and seconds spent waiting for data, for the rates of the next line."""
        self._images += images
        self._waited += waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside, on the host and on the GPU, out of the rates of the next line."""
        _wait_for_gpu()  # what it has yet to do of training is no part of the pause
        begin = time.perf_counter()
        try:
            yield
        finally:
            _wait_for_gpu()
            self._since += time.perf_counter() - begin

    def write(self, step: int, **extra: float) -> dict:
        """Write the means since the last line under `step` and start anew; returns the line."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        line = self._means() | extra
        line |= {"images_per_second": self._images / elapsed, "data_wait": self._waited / elapsed}
        if self._utilization:
            line |= self._utilization.figures(self._written, step, line["images_per_second"])
        self._begin(step)
        self.write_figures(step, line)
        return {"step": step} | line

    def write_figures(self, step: int, figures: dict[str, float]) -> None:
        """Write figures as a line of their own; see `figures_at`."""
        if self._path:
            self._append({"step": step} | figures)
        for logger in self._loggers:
            logger.log(figures, step=step)

    def _append(self, line: dict) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as error:
            remedy = "if the disk is full, free some space; the same command goes on"
            raise OSError(f"could not write {self._path} ({error}); {remedy}") from None

    def _means(self) -> dict[str, float]:
        totals: dict[str, list[float]] = {}
        for names, both in self._groups.items():
            for name, value, count in zip(names, *both.tolist(), strict=True):
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += value
                total[1] += count
        return {name: value / count for name, (value, count) in totals.items() if count}

    def add_image(self, name: str, image, step: int) -> None:
        """Show an image, uint8 [H, W, 3], in TensorBoard."""
        for logger in self._loggers:
            if isinstance(logger, _TensorBoard):
                logger.writer.add_image(name, image, step, dataformats="HWC")

    def state_dict(self) -> dict[str, list[list[float]]]:
        """The unfinished interval, so that a resumed run writes the same means: names -> sums and counts, for JSON."""
        return {" ".join(names): both.tolist() for names, both in self._groups.items()}

    def load_state_dict(self, state: dict[str, list[list[float]]], device: torch.device | str = "cpu") -> None:
        """Continue an interval, on `device`."""
        groups = {tuple(names.split(" ")): both for names, both in state.items()}
        self._groups = {names: torch.tensor(both, dtype=torch.float64, device=device) for names, both in groups.items()}

    def close(self) -> None:
        """End the loggers."""
        for logger in self._loggers:
            logger.finish()


def figures_at(outdir: Path, step: int) -> set[str]:
    """Names of all values that the run's lines of `step` have: a run that goes on from there measures what is missing.

    A checkpoint comes before the figures of its step, which may take long, so that a kill can fall between them.
    """
    return {name for found, line in _lines(outdir / "metrics.jsonl") if found == step for name in json.loads(line)}


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(step, line) of all whole lines; none of a file that is not there."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, LookupError, TypeError):
            yield json.loads(line)["step"] + 0, line


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class _TensorBoard:
    """TensorBoard's events in a folder, with the interface of the other loggers."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)
        self.finish = self.writer.close

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


def open_tensorboard(outdir: Path, step: int) -> list:
    """TensorBoard's logger of a run, where it can be; the log says why not."""
    folder = outdir / "tensorboard"
    try:
        return [_TensorBoard(folder, step)]
    except ImportError:
        why = "it is not installed: pip install tensorboard"
    except UnicodeEncodeError:
        why = f"it takes no path that the locale cannot write, as {folder}"
    log.warning("metrics go to metrics.jsonl, not to TensorBoard (%s)", why)
    return []


# Weights & Biases and Trackio have one interface.
_REMEDIES = {
    "wandb": "`wandb login`, or WANDB_MODE=offline, which logs to files alone",
    "trackio": "choose another name, or unset TRACKIO_SPACE_ID, without which it logs to this machine alone",
}


def require_loggers(config: RunConfig) -> None:
    """Raise ValueError for a library that is asked for by its project, and not installed."""
    for library, project in _projects(config).items():
        try:
            importlib.import_module(library)
        except ImportError:
            raise ValueError(
                f"{library} project {project!r} asked for, but {library} is not installed: pip install {library}"
            ) from None


def open_loggers(config: RunConfig, outdir: Path, step: int) -> list:
    """The runs of all libraries asked for, each with `log(values, step=step)` and `finish()`.

    A run that goes on from `step` is the same one there: `.wandb` and `.trackio` in `outdir` have its id, because names
    of run folders repeat. Raises ValueError where a library refuses.
    """
    runs = []
    for library, project in _projects(config).items():
        path = outdir / f".{library}"
        own = path.read_text(encoding="utf-8") if step and path.exists() else uuid.uuid4().hex[:8]
        # a run of Trackio is known by its name
        names = {"name": outdir.name, "id": own} if library == "wandb" else {"name": f"{outdir.name}-{own}"}
        try:
            init = importlib.import_module(library).init
            runs.append(init(project=project, **names, resume="allow", config=dataclasses.asdict(config)))
        except Exception as error:  # which the libraries have of their own
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{library}: cannot log to project {project!r} ({why}); {_REMEDIES[library]}") from error
        write_atomically(path, own)
    return runs


def _projects(config: RunConfig) -> dict[str, str]:
    projects = {"wandb": config.wandb, "trackio": config.trackio}
    return {library: project for library, project in projects.items() if project}


# Value of a line of metrics.jsonl, its name in the progress line, and its form there.
_SHOWN = (
    ("loss", "loss", "{:.4g}"),
    ("images_per_second", "img/s", "{:.0f}"),
    ("data_wait", "data wait", "{:.0%}"),
    ("mfu", "MFU", "{:.1%}"),
    ("peak_memory_gib", "peak", "{:.1f} GiB"),
)


class Progress(tqdm):
    """Steps done and the newest figures in one line on the main rank's terminal; while no data comes, the wait instead.

    name, steps, done: stage, updates to make and made before. data: what a long wait is for, to be logged.
    """

    def __init__(self, name: str, steps: int, done: int, data: str, ranks: Ranks):
        self._data, self._ranks = data, ranks
        self._figures: dict[str, str] = {}
        self._stalled = self._said = False
        often = 0.5 if os.isatty(2) else 20
        super().__init__(
            total=steps, initial=done, desc=name, disable=not ranks.main, dynamic_ncols=True, mininterval=often
        )

    def show(self, metrics: dict) -> None:
        """Show a line of metrics.jsonl."""
        self._figures = {shown: form.format(metrics[name]) for name, shown, form in _SHOWN if name in metrics}
        self.set_postfix(self._figures)

    def stalled(self, seconds: float) -> None:
        """Show how long the next batch has been waited for, and log a long wait once."""
        self._stalled = True
        self.set_postfix(self._figures | {"data wait": f"{seconds:.0f} s"})
        if seconds >= _LONG_STALL and not self._said:
            self._said = True
            # the other ranks' warnings are not shown, but only the rank that waits knows what all are waiting for
            level = logging.WARNING if self._ranks.main else logging.ERROR
            log.log(level, "rank %d has been waiting for data for %.0f s: %s", self._ranks.rank, seconds, self._data)

    def data_came(self) -> None:
        """Show the figures again after a stall."""
        if self._stalled:
            self._stalled = self._said = False
            self.set_postfix(self._figures)
