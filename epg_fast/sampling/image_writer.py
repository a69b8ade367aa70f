"""From drawn images to files, while the next ones are drawn."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from epg_fast import distributed
from epg_fast.sampling.images import Images, runs


class ImageWriter:
    """Puts drawn images on disk, the PNG files with threads while the next ones are drawn.

    part, png: what to write. A part, or the note that there is none, is written after the PNG files of its images and
    stands for them. Leaving the `with` block, also by an error, waits for what was added, unless the disk has failed.
    """

    def __init__(self, images: Images, part: bool, png: bool):
        self.images, self.part, self.png = images, part, png
        self.written: list[range] = []
        """What is on disk."""
        self._pending: deque[tuple[int, np.ndarray, list[Future]]] = deque()
        self._pool = ThreadPoolExecutor(png_threads(), thread_name_prefix="png") if png else None

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, kind, *exception) -> None:
        try:
            if kind is None or not issubclass(kind, OSError):
                self._commit(leave=0)
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)

    def add(self, indices: np.ndarray, pixels: np.ndarray) -> None:
        """Take uint8 images [n, H, W, 3] with ascending indices [n]; waits for those of the call before."""
        for images in runs(indices):
            some = pixels[: len(images)]
            pixels = pixels[len(images) :]
            futures = []
            if self._pool is not None:
                futures = [self._pool.submit(self.images.save_png, i, p) for i, p in zip(images, some, strict=True)]
            self._pending.append((images.start, some, futures))
        self._commit(leave=1 if self.png else 0)

    def _commit(self, leave: int) -> None:
        while len(self._pending) > leave:
            start, pixels, futures = self._pending[0]
            for future in futures:
                future.result()
            if self.part:
                self.images.save_part(start, pixels)
            else:
                self.images.save_done(range(start, start + len(pixels)))
            self._pending.popleft()  # not before: a signal may have come
            self.written.append(range(start, start + len(pixels)))


def png_threads() -> int:
    """Threads that compress PNG files: this process's share of the CPUs, at most 8."""
    here = len(os.sched_getaffinity(0)) // max(1, distributed.number("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, here))
