"""Batches decoded and augmented by Pillow."""

from __future__ import annotations

import numpy as np

from epg_fast.data.loading.loader import Batches, Loader
from epg_fast.data.loading.views import training_views
from epg_fast.data.sources.decoding import decode_image
from epg_fast.data.sources.source import ImageSource


class PillowLoader(Loader):
    """A `Loader` that decodes and augments with Pillow, in `workers` processes, 0: in this one; batches on the CPU.

    Args:
        source, options: see `Batches`.
        start, workers: see `Loader`.
    """

    def __init__(self, source: ImageSource, *, start: int = 0, workers: int = 2, **options):
        super().__init__(PillowBatches(source, **options), start, workers)


class PillowBatches(Batches):
    """Batches of views made with Pillow."""

    def make(self, content: bytes, rng: np.random.Generator) -> list[np.ndarray]:
        return training_views(decode_image(content), self.image_size, rng, self.flip_probability, self.augment)

    def collate(self, samples: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
        columns = zip(*samples, strict=True)
        return {
            name: np.ascontiguousarray(np.stack(column).transpose(0, 3, 1, 2))
            for name, column in zip(self.views, columns, strict=True)
        }
