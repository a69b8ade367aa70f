"""Metrics of a run: means over log intervals in metrics.jsonl, TensorBoard and (optionally) Weights & Biases.

A line has `step` (updates made), `lr`, `grad_norm` (before clipping), `loss` and its terms, one term by noise level
(`squared_error_by_level/0` is that of the noisiest eighth of the grid, `/7` of the cleanest; eighths without samples
are left out), `images_per_second`, `data_wait` (share of the time), and on a GPU `peak_memory_gib` and `mfu`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import torch

from epg_fast.training.hardware import Utilization
from epg_fast.training.levels import means_by_level

log = logging.getLogger("epg_fast")


class Metrics:
    """Accumulates values between two lines of metrics.jsonl; only the main rank (`enabled`) writes.

    step: updates made before. utilization: figures of the GPU to add to each line, if any.
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
        self.enabled, self._sums, self._counts, self._levels = enabled, {}, {}, {}
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

    def add(self, **values: torch.Tensor) -> None:
        """Add one update's scalars, and sums and counts by noise level [2, LEVELS], to the running means.

        They are read only when a line is written.
        """
        for name, value in values.items():
            if value.ndim:
                self._levels[name] = value.double() + self._levels.get(name, 0.0)
                continue
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def count(self, images: int, waited: float) -> None:
        """Count images consumed and seconds spent waiting for data, for the rates of the next line."""
        self._images += images
        self._waited += waited

    def write(self, step: int, **extra: float) -> dict:
        """Write the means since the last line under `step` and start anew; returns the line."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        line = {"step": step} | {k: float(v) / self._counts[k] for k, v in self._sums.items()} | extra
        for name, sums in self._levels.items():
            line |= means_by_level(name, sums)
        line |= {"images_per_second": self._images / elapsed, "data_wait": self._waited / elapsed}
        if self._utilization:
            line |= self._utilization.figures(self._written, step, line["images_per_second"])
        self._sums, self._counts, self._levels, self._written = {}, {}, {}, step
        self._since, self._waited, self._images = time.perf_counter(), 0.0, 0
        if self.enabled:
            with open(self._path, "a") as f:
                f.write(json.dumps(line) + "\n")
            for name, value in line.items():
                if self._tensorboard and name != "step":
                    self._tensorboard.add_scalar(name, value, step)
            if self._wandb:
                self._wandb.log(line, step=step)
        return line

    def add_image(self, name: str, image, step: int) -> None:
        """Show an image, uint8 [H, W, 3], in TensorBoard."""
        if self._tensorboard and image is not None:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def state_dict(self) -> dict:
        """The unfinished interval, so that a resumed run writes the same means."""
        return {
            "sums": {k: torch.as_tensor(v, dtype=torch.float64) for k, v in self._sums.items()},
            "counts": dict(self._counts),
            "levels": {k: v.cpu() for k, v in self._levels.items()},
        }

    def load_state_dict(self, state: dict, device: torch.device | str = "cpu") -> None:
        """Continue an interval, on `device`."""
        self._sums, self._counts = {k: v.item() for k, v in state["sums"].items()}, dict(state["counts"])
        # Runs from before levels were counted have none.
        self._levels = {k: v.to(device) for k, v in state.get("levels", {}).items()}

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
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)


def _tensorboard_writer(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("tensorboard is not installed: metrics go to metrics.jsonl only (pip install tensorboard)")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _wandb_run(project: str, outdir: Path, config: dict):
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"wandb project {project!r} asked for, but wandb is not installed: pip install wandb"
        ) from None
    return wandb.init(project=project, name=outdir.name, id=outdir.name, resume="allow", config=config)
