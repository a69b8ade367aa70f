"""The files of a sweep.

sweep.json                               settings, grid, all rounds that are decided, the result
weights/sigma_rel_<width>.safetensors    the EMA of each width, made once
reference/                               what the judges have seen of the reference
rows/<setting>/<start>_<stop>.safetensors   what the judges have seen of a finished batch, until its round is decided
sweep.md, *.png                          made of sweep.json
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
from safetensors import SafetensorError, safe_open

from epg_fast.evaluation.judge import Rows, join_rows, take_rows
from epg_fast.files import OutputFolder, write_atomically
from epg_fast.sampling.outputs import Parts, runs

# Known by the checksum of its weights, wherever it is.
_NOT_COMPARED = ("checkpoint",)


class SweepFolder(OutputFolder):
    """A folder that one `sweep` at a time fills, by all its ranks.

    `parts`: of each setting that is still drawn, by its number in the grid, the rows that are there.
    """

    def __init__(self, outdir: str | Path):
        super().__init__(outdir, "sweep", "sweep.json")
        self.parts: dict[int, Parts] = {}

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
        for name in ("", "weights/", "reference/"):
            for left in self.path.glob(f"{name}.*.tmp"):
                left.unlink()
        for folder in self.path.glob("rows/*"):
            if folder.name.isdecimal() and int(folder.name) not in settings:
                shutil.rmtree(folder)
        self.parts = {number: self._parts(number) for number in settings}
        for parts in self.parts.values():
            parts.scan()

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
        write_atomically(self._parts(number).path(images), content)

    def load(self, number: int, ranges: Sequence[range], stop: int) -> tuple[Rows, float]:
        """(rows of the images 0..stop-1 of a setting in these parts, median of the seconds an image took to draw)."""
        parts, found, seconds = self._parts(number), [], []
        parts.ranges = list(ranges)
        for images, new in parts.in_order(stop):
            with safe_open(parts.path(images), "pt") as file:
                seconds.append(float(file.metadata()["seconds"]) / len(images))
                found.append({name: file.get_tensor(name)[new] for name in file.keys()})  # noqa: SIM118
        return join_rows(found), statistics.median(seconds)

    def drop(self, numbers: Iterable[int]) -> None:
        """Remove the rows of these settings."""
        for number in numbers:
            shutil.rmtree(self._parts(number).folder, ignore_errors=True)
            self.parts.pop(number, None)
        with contextlib.suppress(OSError):  # not there, or of others still
            (self.path / "rows").rmdir()

    def _parts(self, number: int) -> Parts:
        return Parts(self.path / "rows" / f"{number:04d}", ".safetensors", _check_rows)


def _check_rows(path: Path, images: range) -> None:
    """Raise ValueError unless the file is whole."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from error
