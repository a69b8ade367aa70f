"""Batches of training views: the function of the iteration that every loader shares, and what it does around it."""

from __future__ import annotations

import abc
import contextlib
import functools
import itertools
import logging
import mmap
from collections.abc import Iterator

import numpy as np
import torch

from epg_fast.config import AugmentConfig
from epg_fast.data.loading.views import training_views
from epg_fast.data.loading.workers import WorkerStream
from epg_fast.data.sources.decoding import decode_image
from epg_fast.data.sources.faults import printable, too_many_bad_files
from epg_fast.data.sources.source import ImageSource

logger = logging.getLogger("epg_fast")

# The two kinds of random streams of a seed, as the first element of numpy's spawn key.
_ORDER, _SAMPLE = 0, 1


class Batches(abc.ABC):
    """Maps a global iteration to (this rank's batch, files that could not be read); a copy lives in every worker.

    An epoch is `len(source) // batch_size` iterations over a fresh permutation; the rest of it is dropped. The
    permutation follows from (seed, epoch) and a sample's views from (seed, epoch, index). Rank r has positions
    [r*b, (r+1)*b) of the global batch, b = batch_size / world_size.

    Args:
        source: the images.
        image_size: side of the views in pixels.
        batch_size: global batch size.
        seed: non-negative; every random draw follows from it.
        rank, world_size: this process and how many there are.
        flip_probability: of `x`.
        augment: the augmented views of pre-training; None for `x` alone.
        max_bad_fraction: share of the source that may be bad files.

    Raises ValueError for arguments that cannot work, e.g. a batch larger than the source or no multiple of world_size.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        flip_probability: float = 0.5,
        augment: AugmentConfig | None = None,
        max_bad_fraction: float = 0.01,
    ):
        for name, value, wanted, good in (
            ("rank", f"{rank} of {world_size}", "0 <= rank < world_size", 0 <= rank < world_size),
            ("image_size", image_size, "at least 1", image_size >= 1),
            ("batch_size", batch_size, "at least 1", batch_size >= 1),
            ("batch_size", batch_size, f"a multiple of {world_size}", batch_size % max(world_size, 1) == 0),
            ("batch_size", batch_size, f"at most the {len(source)} images of {source.root}", batch_size <= len(source)),
            ("seed", seed, "at least 0", seed >= 0),
            ("flip_probability", flip_probability, "0 to 1", 0 <= flip_probability <= 1),
            ("max_bad_fraction", max_bad_fraction, "at least 0 and less than 1", 0 <= max_bad_fraction < 1),
        ):
            if not good:
                raise ValueError(f"{name}: got {value}, wanted {wanted}")
        self.source, self.image_size, self.batch_size, self.seed = source, image_size, batch_size, seed
        self.flip_probability, self.augment, self.max_bad_fraction = flip_probability, augment, max_bad_fraction
        self._count = len(source)
        self.iterations_per_epoch = self._count // batch_size
        self.local_size = batch_size // world_size
        self.views = ("x",) if augment is None else ("x", "view1", "view2")
        self._offset = rank * self.local_size
        self._order: tuple[int, np.ndarray] | None = None
        # shared with the worker processes, which then do not try these files again
        self.bad = np.frombuffer(mmap.mmap(-1, len(source)), np.bool_)

    def __call__(self, iteration: int) -> tuple[dict[str, np.ndarray] | None, dict[str, str]]:
        epoch, step = divmod(iteration, self.iterations_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._rng(_ORDER, epoch).permutation(self._count)
        first = step * self.batch_size + self._offset
        samples, used, bad_files = [], [], {}
        for index in self._order[1][first : first + self.local_size].tolist():
            sample, found = self._load(epoch, index, bad_files)
            if found is None:
                return None, bad_files
            samples.append(sample)
            used.append(found)
        labels = np.array([self.source.labels[i] for i in used], np.int64)
        return {**self.collate(samples), "label": labels, "index": np.array(used, np.int64)}, bad_files

    @abc.abstractmethod
    def make(self, content: bytes, rng: np.random.Generator):
        """Return what `collate` takes of one encoded image; raises anything for a bad one."""

    @abc.abstractmethod
    def collate(self, samples: list) -> dict[str, np.ndarray]: ...

    def _load(self, epoch: int, index: int, bad_files: dict[str, str]) -> tuple[object, int | None]:
        """Return (sample, its index) for `index` or the next index that decodes; no index once too many do not."""
        for i in itertools.chain(range(index, self._count), range(index)):
            if self.bad[i]:
                continue
            make = functools.partial(self.make, rng=self._rng(_SAMPLE, epoch, index))
            sample, reason = self.source.examine(i, make)
            if reason is None:
                return sample, i
            bad_files[self.source.paths[i]] = reason
            self.bad[i] = True
            if len(bad_files) > self.max_bad_fraction * self._count:
                break
        return None, None

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


class Loader(Iterator[dict[str, torch.Tensor]], contextlib.AbstractContextManager):
    """An infinite iterator over the batches of `batches`, beginning at global iteration `start`; see `epg_fast.data`.

    A file that cannot be decoded is replaced by the next one of the source that can (same random stream, that file's
    label and index), logged once by name and kept in `bad_files`. `DataError` is raised once those that this rank has
    met, or was told of by `add_bad_files`, exceed `max_bad_fraction` of the source.

    Attributes:
        source: the images.
        iteration: of the next batch.
        bad_files: relative path -> reason.
    """

    def __init__(self, batches: Batches, start: int, workers: int):
        """workers: processes that make batches ahead; 0: this one, when asked."""
        if start < 0:
            raise ValueError(f"start: got {start}, wanted at least 0")
        self.batches, self.source, self.iteration = batches, batches.source, start
        self.bad_files: dict[str, str] = {}
        self._stream = WorkerStream(batches, start, workers)
        self._closed = False

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._closed:
            raise RuntimeError("this loader is closed; make a new one with start=iteration to go on")
        try:
            batch = self._draw()
        except Exception:
            self.close()
            raise
        self.iteration += 1
        return batch

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Stop what the loader has started; closing twice does nothing."""
        self._closed = True
        self._stream.close()

    def add_bad_files(self, found: dict[str, str]) -> None:
        """Skip the files `found` (path -> reason) from now on, without a log line; the batches do not change by that.

        For what other ranks or an earlier part of the run have met. Raises `DataError` when it makes too many.
        """
        new = {path: reason for path, reason in found.items() if path not in self.bad_files}
        self.bad_files.update(new)
        for i, path in enumerate(self.source.paths if new else ()):
            if path in new:
                self.batches.bad[i] = True
        self._check_bad_files()

    def _draw(self) -> dict[str, torch.Tensor]:
        """Return the next batch."""
        return {name: torch.from_numpy(array) for name, array in self._next_arrays().items()}

    def _next_arrays(self) -> dict[str, np.ndarray]:
        batch, bad_files = next(self._stream)
        self._report(bad_files)
        return batch

    def _report(self, bad_files: dict[str, str]) -> None:
        for path, reason in bad_files.items():
            if path not in self.bad_files:
                self.bad_files[path] = reason
                name = printable(str(self.source.root / path))
                logger.warning("cannot decode %s (%s); the next image takes its place", name, reason)
        self._check_bad_files()

    def _check_bad_files(self) -> None:
        limit = self.batches.max_bad_fraction
        if len(self.bad_files) > limit * len(self.source):
            raise too_many_bad_files(self.bad_files, len(self.source), limit)


class PillowBatches(Batches):
    """Batches of views that Pillow decodes and augments."""

    def make(self, content: bytes, rng: np.random.Generator) -> list[np.ndarray]:
        return training_views(decode_image(content), self.image_size, rng, self.flip_probability, self.augment)

    def collate(self, samples: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
        columns = zip(*samples, strict=True)
        return {
            name: np.ascontiguousarray(np.stack(column).transpose(0, 3, 1, 2))
            for name, column in zip(self.views, columns, strict=True)
        }


class PillowLoader(Loader):
    """A `Loader` that decodes and augments with Pillow, in `workers` processes, 0: in this one; batches on the CPU.

    Args:
        source, options: see `Batches`.
        start, workers: see `Loader`.
    """

    def __init__(self, source: ImageSource, *, start: int = 0, workers: int = 2, **options):
        super().__init__(PillowBatches(source, **options), start, workers)
