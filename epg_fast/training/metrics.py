"""Metrics of a run: means over log intervals in metrics.jsonl, TensorBoard and (optionally) Weights & Biases.

A line has `step` (batches drawn), `lr`, `grad_norm` (before clipping), `loss` and its terms, one term by noise level
(`squared_error_by_level/0` is that of the noisiest eighth of the grid, `/7` of the cleanest; eighths without samples
are left out), `images_per_second`, `data_wait` (share of the time), and on a GPU `peak_memory_gib` and `mfu`. The file
of a run with a plan begins with a line of step 0, which has the `plan`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import torch

from epg_fast.training.hardware import Utilization

log = logging.getLogger("epg_fast")


class Metrics:
    """Accumulates values between two lines of metrics.jsonl; only the main rank (`enabled`) writes.

    step: batches drawn before. utilization: figures of the GPU to add to each line, if any.
    """

    def __init__(
        self,
        outdir: Path,
        enabled: bool,
        step: int,
        tensorboard: bool,
        wandb: str | None,
        config: dict,
        utilization: Utilization | None = None,
    ):
        self.enabled = enabled
        # Names of the values of an update -> their sums and counts [2, n]; another part of a run has another group.
        self._groups: dict[tuple[str, ...], torch.Tensor] = {}
        self._utilization, self._written = utilization, step
        self._since, self._waited, self._images = time.perf_counter(), 0.0, 0
        self._tensorboard = self._wandb = None
        if not enabled:
            return
        self._path = outdir / "metrics.jsonl"
        _truncate(self._path, step)
        if tensorboard:
            self._tensorboard = _tensorboard_writer(outdir / "tensorboard", step)
        if wandb:
            self._wandb = _wandb_run(wandb, outdir, config)

    def add(self, names: tuple[str, ...], sums: torch.Tensor, counts: torch.Tensor, made: torch.Tensor) -> None:
        """Add an update's sums and counts, [len(names)] each, to the means of the line, if it was `made` (bool []).

        Nothing is read from the device before a line is written.
        """
        both = torch.where(made, torch.stack([sums, counts]).double(), 0.0)
        self._groups[names] = self._groups[names] + both if names in self._groups else both

    def begin_with(self, header: dict) -> None:
        """Let the file of a new run begin with a line of step 0 that has the header's entries."""
        if self.enabled and not (self._path.exists() and self._path.stat().st_size):
            self._append({"step": 0} | header)

    def count(self, images: int, waited: float) -> None:
        """Count images consumed and seconds spent waiting for data, for the rates of the next line."""
        self._images += images
        self._waited += waited

    def write(self, step: int, **extra: float) -> dict:
        """Write the means since the last line under `step` and start anew; returns the line."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        line = {"step": step} | self._means() | extra
        line |= {"images_per_second": self._images / elapsed, "data_wait": self._waited / elapsed}
        if self._utilization:
            line |= self._utilization.figures(self._written, step, line["images_per_second"])
        self._groups, self._written = {}, step
        self._since, self._waited, self._images = time.perf_counter(), 0.0, 0
        if self.enabled:
            self._append(line)
            for name, value in line.items():
                if self._tensorboard and name != "step":
                    self._tensorboard.add_scalar(name, value, step)
            if self._wandb:
                self._wandb.log(line, step=step)
        return line

    def _append(self, line: dict) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as error:
            remedy = "if the disk is full, free some space; the same command goes on"
            raise OSError(f"could not write {self._path} ({error}); {remedy}") from None

    def add_image(self, name: str, image, step: int) -> None:
        """Show an image, uint8 [H, W, 3], in TensorBoard."""
        if self._tensorboard and image is not None:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def state_dict(self) -> dict:
        """The unfinished interval, JSON-able, so that a resumed run writes the same means."""
        return {"groups": [[list(names), both.tolist()] for names, both in self._groups.items()]}

    def load_state_dict(self, state: dict, device: torch.device | str = "cpu") -> None:
        """Continue an interval, on `device`."""
        groups = state.get("groups", [])
        self._groups = {tuple(names): torch.tensor(both, dtype=torch.float64, device=device) for names, both in groups}

    def _means(self) -> dict[str, float]:
        totals: dict[str, list[float]] = {}
        for names, both in self._groups.items():
            for name, value, count in zip(names, *both.tolist(), strict=True):
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += value
                total[1] += count
        return {name: value / count for name, (value, count) in totals.items() if count}

    def close(self) -> None:
        """Flush and close the writers."""
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _truncate(path: Path, step: int) -> None:
    """Drop the lines after `step`, which the resumed run will write again (and a line cut off by a crash)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _tensorboard_writer(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("tensorboard is not installed: metrics go to metrics.jsonl only (pip install tensorboard)")
        return None
    try:
        return SummaryWriter(str(folder), purge_step=step + 1)
    except UnicodeEncodeError:
        log.warning(
            "tensorboard takes no path that the locale cannot write, as %s: metrics go to metrics.jsonl only", folder
        )
        return None


def require_wandb(project: str | None) -> None:
    """Raise ValueError when a `project` is asked for and wandb is not installed."""
    try:
        if project:
            import wandb  # noqa: F401
    except ImportError:
        raise ValueError(
            f"wandb project {project!r} asked for, but wandb is not installed: pip install wandb"
        ) from None


def _wandb_run(project: str, outdir: Path, config: dict):
    import wandb

    return wandb.init(project=project, name=outdir.name, id=outdir.name, resume="allow", config=config)
