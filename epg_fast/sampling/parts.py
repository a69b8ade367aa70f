"""Finished batches on disk: whatever a command has made of images, until all are there."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

log = logging.getLogger("epg_fast")


class Parts:
    """The files <start>_<stop><suffix> of a folder, each with what was made of the images start to stop - 1.

    check: raises OSError or ValueError unless the file at this path holds what it should of these images. `ranges`: the
    images of the parts that are known. Parts of several batch sizes may overlap.
    """

    def __init__(self, folder: Path, suffix: str, check: Callable[[Path, range], object]):
        self.folder, self.ranges = folder, []
        self._suffix, self._check = suffix, check

    def path(self, images: range) -> Path:
        """The file of a part."""
        return self.folder / f"{images.start:08d}_{images.stop:08d}{self._suffix}"

    def scan(self) -> None:
        """Find what is there. Parts that are damaged are named and removed, as is what a killed command began."""
        self.ranges = []
        for left in self.folder.glob(".*.tmp"):
            left.unlink()
        for path in sorted(self.folder.glob(f"*{self._suffix}")):
            match = re.fullmatch(r"(\d{8})_(\d{8})", path.name.removesuffix(self._suffix))
            if match and not self.add(range(int(match[1]), int(match[2]))):
                log.warning("%s is damaged: its images are drawn again", path)
                path.unlink()

    def add(self, images: range) -> bool:
        """Count a part, which another rank may have written; False when it is not there as a whole."""
        try:
            self._check(self.path(images), images)
        except (OSError, ValueError, EOFError):
            return False
        self.ranges.append(images)
        return True

    def lacking(self, number: int) -> np.ndarray:
        """Which of the first `number` images are in no part: bool [number]."""
        lacking = np.ones(number, bool)
        for images in self.ranges:
            lacking[images.start : images.stop] = False
        return lacking

    def in_order(self, stop: int) -> Iterator[tuple[range, slice]]:
        """Parts of the images before `stop`, and what of each is to be taken: every image once, in ascending order."""
        done = 0
        for images in sorted(self.ranges, key=lambda images: (images.start, images.stop)):
            if images.stop > done and images.start < stop:
                yield images, slice(max(0, done - images.start), stop - images.start)
                done = images.stop


def cut_at_batches(lacking: np.ndarray, batch_size: int) -> list[range]:
    """The images that are lacking, bool [N], none across a multiple of `batch_size`, whole batches first.

    A batch is the same however many ranks share the work, and so are its last bits on one kind of machine: any share of
    them, cut every `batch_size` images, falls into the same batches as long as whole ones are missing.
    """
    gaps = np.flatnonzero(lacking)
    batches = np.split(gaps, np.flatnonzero(np.diff(gaps // batch_size)) + 1)
    return sorted((run for batch in batches for run in runs(batch)), key=len, reverse=True)


def runs(values: np.ndarray) -> Iterator[range]:
    """Integers [n] as ranges, of which each goes on as long as they rise by one."""
    if len(values):
        for run in np.split(values, np.flatnonzero(np.diff(values) != 1) + 1):
            yield range(int(run[0]), int(run[-1]) + 1)
