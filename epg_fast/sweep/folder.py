"""The files of a sweep.

sweep.json                               settings, grid, all rounds that are decided, the result
weights/sigma_rel_<width>.safetensors    the EMA of each width, made once
reference/                               what the judges have seen of the reference
rows/<setting>/<start>_<stop>.safetensors   what the judges have seen of a finished batch, until its round is decided
sweep.md, *.png                          made of sweep.json
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import statistics
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
from safetensors import SafetensorError, safe_open

from epg_fast.evaluation.rows import Rows, join_rows, take_rows
from epg_fast.files import OutputFolder, write_atomically
from epg_fast.sampling.outputs import cut_at_batches, runs

log = logging.getLogger("epg_fast")

_PART = re.compile(r"(\d{8})_(\d{8})\.safetensors")
# Known by the checksum of its weights, wherever it is.
_NOT_COMPARED = ("checkpoint",)


class SweepFolder(OutputFolder):
    """A folder that one `sweep` at a time fills, by all its ranks.

    `parts`: of each setting, by its number in the grid, the images whose rows are there.
    """

    def __init__(self, outdir: str | Path):
        super().__init__(outdir, "sweep", "sweep.json")
        self.parts: dict[int, list[range]] = {}

    @property
    def begun(self) -> bool:
        """Whether anything has been drawn; before, it is of no settings yet."""
        return bool(self.read().get("rounds")) or any(self.path.glob("rows/*/*.safetensors"))

    def require(self, settings: dict) -> None:
        """Raise ValueError unless the folder is new, empty, or of these settings, which may be a part of them."""
        if self.check() and self.begun:
            before = self.read().get("settings", {})
            self.require_same({name: before.get(name) for name in settings}, settings, _NOT_COMPARED)

    def weights(self, sigma_rel: float) -> Path:
        """The file of the weights of this width."""
        return self.path / "weights" / f"sigma_rel_{sigma_rel}.safetensors"

    def forget(self) -> None:
        """Remove what a command of other settings has left, which has drawn nothing."""
        for name in ("weights", "rows"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def scan(self, settings: Collection[int]) -> None:
        """Find the rows of these settings, and remove those of others, what is damaged, and what a kill has left."""
        for name in ("", "rows/*/", "weights/", "reference/"):
            for left in self.path.glob(f"{name}.*.tmp"):
                left.unlink()
        self.parts = {number: [] for number in settings}
        for folder in self.path.glob("rows/*"):
            if folder.name.isdecimal() and int(folder.name) not in self.parts:
                shutil.rmtree(folder)
                continue
            for path in sorted(folder.glob("*.safetensors")):
                match = _PART.fullmatch(path.name)
                if match and not self.add(int(folder.name), range(int(match[1]), int(match[2]))):
                    log.warning("%s is damaged: its images are drawn again", path)
                    path.unlink()

    def missing(self, number: int, stop: int, batch_size: int) -> list[range]:
        """The images 0..stop-1 of a setting of which there are no rows; see `cut_at_batches`."""
        lacking = np.ones(stop, bool)
        for images in self.parts[number]:
            lacking[images.start : images.stop] = False
        return cut_at_batches(lacking, batch_size)

    def save_runs(self, number: int, indices: np.ndarray, rows: Rows, seconds: float) -> Iterator[range]:
        """Keep the rows of the images of these numbers [n], which took so many seconds; yields them part by part."""
        done = 0
        for images in runs(indices):
            part = slice(done, done + len(images))
            self.save(number, images, take_rows(rows, part), seconds * len(images) / len(indices))
            yield images
            done = part.stop

    def save(self, number: int, images: range, rows: Rows, seconds: float) -> None:
        """Keep the rows of these images, one behind the other."""
        rows = {name: values.contiguous() for name, values in rows.items()}
        content = safetensors.torch.save(rows, {"seconds": repr(seconds)})
        write_atomically(self._path(number, images), content)

    def add(self, number: int, images: range) -> bool:
        """Count a part, which another rank may have written; False when it is not there as a whole."""
        try:
            with safe_open(self._path(number, images), "pt") as file:
                whole = all(file.get_slice(name).get_shape()[0] == len(images) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            return False
        if whole:
            self.parts[number].append(images)
        return whole

    def load(self, number: int, parts: Iterable[range], stop: int) -> tuple[Rows, float]:
        """(rows of the images 0..stop-1 of a setting, median of the seconds an image took to draw)."""
        found, seconds, done = [], [], 0
        for images in sorted(parts, key=lambda images: (images.start, images.stop)):
            if images.stop <= done or images.start >= stop:
                continue
            path = self._path(number, images)
            with safe_open(path, "pt") as file:
                seconds.append(float(file.metadata()["seconds"]) / len(images))
                rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert images.start <= done, f"the rows before {path} are missing"
            found.append(take_rows(rows, slice(done - images.start, stop - images.start)))
            done = images.stop
        return join_rows(found), statistics.median(seconds)

    def drop(self, numbers: Iterable[int]) -> None:
        """Remove the rows of these settings."""
        for number in numbers:
            shutil.rmtree(self._path(number, range(0)).parent, ignore_errors=True)
            self.parts.pop(number, None)
        with contextlib.suppress(OSError):  # not there, or of others still
            (self.path / "rows").rmdir()

    def _path(self, number: int, images: range) -> Path:
        return self.path / "rows" / f"{number:04d}" / f"{images.start:08d}_{images.stop:08d}.safetensors"


def plain(value):
    """`value` as JSON reads it back."""
    return json.loads(json.dumps(value))
