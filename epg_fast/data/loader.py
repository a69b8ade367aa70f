"""Batches of training views: the stream every loader shares, and the loader that decodes with Pillow."""

from __future__ import annotations

import abc
import itertools
import logging
import mmap

import numpy as np
import torch

from epg_fast.config import AugmentConfig
from epg_fast.data.source import DataError, ImageSource, decode_image, printable, too_many_bad_files
from epg_fast.data.views import check_augment, check_shape, training_views
from epg_fast.data.workers import WorkerStream

logger = logging.getLogger("epg_fast")

# The two kinds of random streams of a seed, as the first element of numpy's spawn key.
_ORDER, _SAMPLE = 0, 1


class Loader(abc.ABC):
    """An infinite iterator over one rank's batches of an `ImageSource`, beginning at global iteration `start`.

    Each batch is a dict: `x` uint8 [b, 3, H, W], `label` int64 [b], `index` int64 [b] and, with `augment`, `view1` and
    `view2`, uint8 [b, 3, H, W]; b = batch_size / world_size, H = W = image_size.

    An epoch is `len(source) // batch_size` iterations over a fresh permutation; the rest of it is dropped. The
    permutation follows from (seed, epoch) and a sample's views from (seed, epoch, index). Rank r has positions
    [r*b, (r+1)*b) of the global batch, so that iteration i is the same for every `start`, `workers` and `world_size`.

    A file that cannot be decoded is replaced by the next one of the source that can (same random stream, that file's
    label and index), logged once by name and kept in `bad_files`. `DataError` is raised once those that this rank has
    met, or was told of by `add_bad_files`, exceed `max_bad_fraction` of the source.

    Args:
        source: the images.
        image_size: side of the views in pixels.
        batch_size: global batch size.
        seed: non-negative; every random draw follows from it.
        rank, world_size: this process and how many there are.
        start: first global iteration, to resume.
        flip_probability: of `x`.
        augment: the augmented views of pre-training; None for `x` alone.
        max_bad_fraction: see above.

    Raises ValueError for arguments that cannot work, e.g. a batch larger than the source or no multiple of world_size.
    """

    backend: str
    """Who decodes: "pillow" or "dali"."""

    def __init__(
        self,
        source: ImageSource,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        flip_probability: float = 0.5,
        augment: AugmentConfig | None = None,
        max_bad_fraction: float = 0.01,
    ):
        _check_arguments(source, image_size, batch_size, seed, rank, world_size, start)
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"flip_probability: got {flip_probability}, wanted 0 to 1")
        if not 0 <= max_bad_fraction < 1:
            raise ValueError(f"max_bad_fraction: got {max_bad_fraction}, wanted at least 0 and less than 1")
        if augment is not None:
            check_augment(augment)
        self.source = source
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.iteration = start
        self.iterations_per_epoch = len(source) // batch_size
        self.flip_probability = flip_probability
        self.augment = augment
        self.max_bad_fraction = max_bad_fraction
        self.bad_files: dict[str, str] = {}
        # shared with the worker processes, which then do not try these files again
        self._bad = np.frombuffer(mmap.mmap(-1, len(source)), np.bool_)
        self._closed = False

    def __iter__(self) -> Loader:
        return self

    @abc.abstractmethod
    def __next__(self) -> dict[str, torch.Tensor]:
        """Return the batch of `iteration`, which grows by one."""

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Stop what the loader has started; closing twice does nothing."""
        self._closed = True

    def add_bad_files(self, found: dict[str, str]) -> None:
        """Skip the files `found` (path -> reason) from now on, without a log line; the batches do not change by that.

        For what other ranks or an earlier part of the run have met. Raises `DataError` when it makes too many.
        """
        new = {path: reason for path, reason in found.items() if path not in self.bad_files}
        if not new:
            return
        self.bad_files.update(new)
        for i, path in enumerate(self.source.paths):
            if path in new:
                self._bad[i] = True
        self._check_bad_files()

    def _report(self, bad_files: dict[str, str]) -> None:
        for path, reason in bad_files.items():
            if path not in self.bad_files:
                self.bad_files[path] = reason
                name = printable(str(self.source.root / path))
                logger.warning("cannot decode %s (%s); the next image takes its place", name, reason)
        self._check_bad_files()

    def _check_bad_files(self) -> None:
        if len(self.bad_files) > self.max_bad_fraction * len(self.source):
            raise too_many_bad_files(self.bad_files, len(self.source), self.max_bad_fraction)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this loader is closed; make a new one with start=iteration to go on")


class PillowLoader(Loader):
    """A `Loader` that decodes and augments with Pillow, in `workers` processes, 0: in this one; batches on the CPU."""

    backend = "pillow"

    def __init__(self, source: ImageSource, *, workers: int = 2, **options):
        super().__init__(source, **options)
        self.workers = workers
        self._stream = WorkerStream(DecodedBatches(self), self.iteration, workers)

    def __next__(self) -> dict[str, torch.Tensor]:
        self._check_open()
        batch, bad_files = next(self._stream)
        try:
            self._report(bad_files)
        except DataError:
            self.close()
            raise
        self.iteration += 1
        return batch

    def close(self) -> None:
        """Stop the worker processes; closing twice does nothing."""
        super().close()
        self._stream.close()


class Batches(abc.ABC):
    """Maps a global iteration to (this rank's batch, files that could not be read); lives in every worker.

    A subclass says what is made of an image: `_start` allocates for a batch, `_add` takes an image, `_finish` returns.
    """

    def __init__(self, loader: Loader):
        # not the loader itself: it holds processes
        self.source = loader.source
        self.image_size = loader.image_size
        self.batch_size = loader.batch_size
        self.seed = loader.seed
        self.local_size = loader.batch_size // loader.world_size
        self.offset = loader.rank * self.local_size
        self.flip_probability = loader.flip_probability
        self.augment = loader.augment
        self.max_bad_files = loader.max_bad_fraction * len(loader.source)
        self.names = ("x",) if loader.augment is None else ("x", "view1", "view2")
        self._bad = loader._bad
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, iteration: int) -> tuple[dict | None, dict[str, str]]:
        epoch, indices = self._indices(iteration)
        batch = self._start()
        used = np.empty(self.local_size, np.int64)
        bad_files: dict[str, str] = {}
        for position, index in enumerate(indices):
            image, used[position] = self._load(int(index), bad_files)
            if image is None:
                return None, bad_files
            rng = np.random.default_rng(_seed_sequence(self.seed, _SAMPLE, epoch, int(index)))
            self._add(batch, position, image, rng)
        batch = self._finish(batch)
        batch["label"] = torch.tensor([int(self.source.labels[i]) for i in used], dtype=torch.int64)
        batch["index"] = torch.from_numpy(used)
        return batch, bad_files

    @abc.abstractmethod
    def _decode(self, content: bytes):
        """Return an encoded image in the form that `_add` takes; raises anything for a bad one."""

    @abc.abstractmethod
    def _start(self): ...

    @abc.abstractmethod
    def _add(self, batch, position: int, image, rng: np.random.Generator) -> None: ...

    @abc.abstractmethod
    def _finish(self, batch) -> dict: ...

    def _indices(self, iteration: int) -> tuple[int, np.ndarray]:
        epoch, step = divmod(iteration, len(self.source) // self.batch_size)
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng(_seed_sequence(self.seed, _ORDER, epoch))
            self._order = epoch, rng.permutation(len(self.source))
        first = step * self.batch_size + self.offset
        return epoch, self._order[1][first : first + self.local_size]

    def _load(self, index: int, bad_files: dict[str, str]) -> tuple[object | None, int]:
        """Return (image, its index) for `index` or the next index that decodes; no image once too many do not."""
        for i in itertools.chain(range(index, len(self.source)), range(index)):
            if self._bad[i]:
                continue
            image, reason = self.source.examine(i, self._decode)
            if reason is None:
                return image, i
            bad_files[self.source.paths[i]] = reason
            self._bad[i] = True
            if len(bad_files) > self.max_bad_files:
                break
        return None, index


class DecodedBatches(Batches):
    """Batches of views made with Pillow."""

    def _decode(self, content):
        image = decode_image(content)
        check_shape(*image.size, self.image_size)
        return image

    def _start(self):
        shape = (self.local_size, 3, self.image_size, self.image_size)
        return {name: np.empty(shape, np.uint8) for name in self.names}

    def _add(self, batch, position, image, rng):
        views = training_views(image, self.image_size, rng, self.flip_probability, self.augment)
        for name, view in zip(self.names, views, strict=True):
            batch[name][position] = view.transpose(2, 0, 1)

    def _finish(self, batch):
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def _seed_sequence(seed: int, *key: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=key)


def _check_arguments(source, image_size, batch_size, seed, rank, world_size, start) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} of {world_size}, wanted 0 <= rank < world_size")
    for name, value, lowest in (
        ("image_size", image_size, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("start", start, 0),
    ):
        if value < lowest:
            raise ValueError(f"{name}: got {value}, wanted at least {lowest}")
    if batch_size % world_size:
        raise ValueError(f"batch_size: got {batch_size} for {world_size} ranks, wanted a multiple of {world_size}")
    if batch_size > len(source):
        raise ValueError(
            f"batch_size: got {batch_size}, wanted at most the {len(source)} images of {source.root}; lower it"
        )
