"""Batches of training views, decoded with Pillow by worker processes."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import signal
import sys
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from epg_fast.config import AugmentConfig
from epg_fast.data.source import DataError, ImageSource, too_many_bad_files
from epg_fast.data.views import check_augment, training_views

__all__ = ["DataError", "PillowLoader"]

logger = logging.getLogger("epg_fast")

# The two kinds of random streams of a seed, as the first element of numpy's spawn key.
_ORDER, _SAMPLE = 0, 1


class PillowLoader:
    """An infinite iterator over one rank's batches of an `ImageFolder`, beginning at global iteration `start`.

    Each batch is a dict: `x` uint8 [b, 3, H, W], `label` int64 [b], `index` int64 [b] and, with `augment`, `view1` and
    `view2`, uint8 [b, 3, H, W]; b = batch_size / world_size, H = W = image_size, on the CPU.

    An epoch is `len(folder) // batch_size` iterations over a fresh permutation; the rest of it is dropped. The
    permutation follows from (seed, epoch) and a sample's views from (seed, epoch, index). Rank r has positions
    [r*b, (r+1)*b) of the global batch, so that iteration i is the same for every `start`, `workers` and `world_size`.

    A file that cannot be decoded is replaced by the next one of the folder that can (same random stream, that file's
    label and index), logged once by name and kept in `bad_files`. `DataError` is raised once those that this rank has
    met exceed `max_bad_fraction` of the folder.

    Args:
        folder: the images.
        image_size: side of the views in pixels.
        batch_size: global batch size.
        seed: non-negative; every random draw follows from it.
        rank, world_size: this process and how many there are.
        start: first global iteration, to resume.
        flip_probability: of `x`.
        augment: the augmented views of pre-training; None for `x` alone.
        workers: decoding processes; 0 decodes in this process.
        max_bad_fraction: see above.

    Raises ValueError for arguments that cannot work, e.g. a batch larger than the folder or no multiple of world_size.
    """

    def __init__(
        self,
        folder: ImageSource,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        flip_probability: float = 0.5,
        augment: AugmentConfig | None = None,
        workers: int = 2,
        max_bad_fraction: float = 0.01,
    ):
        _check_arguments(folder, image_size, batch_size, seed, rank, world_size, start, workers)
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"flip_probability: got {flip_probability}, wanted 0 to 1")
        if not 0 <= max_bad_fraction < 1:
            raise ValueError(f"max_bad_fraction: got {max_bad_fraction}, wanted at least 0 and less than 1")
        if augment is not None:
            check_augment(augment)
        self.folder = folder
        self.iteration = start
        self.iterations_per_epoch = len(folder) // batch_size
        self.workers = workers
        self.max_bad_fraction = max_bad_fraction
        self.bad_files: dict[str, str] = {}
        self._batches = _Batches(
            folder,
            image_size=image_size,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            flip_probability=flip_probability,
            augment=augment,
            max_bad_files=max_bad_fraction * len(folder),
        )
        self._stream: Iterator | None = None
        self._closed = False

    def __iter__(self) -> PillowLoader:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._closed:
            raise RuntimeError("this loader is closed; make a new one with start=iteration to go on")
        if self._stream is None:
            self._stream = self._open()
        batch, bad_files = next(self._stream)
        self._report(bad_files)
        self.iteration += 1
        return batch

    def __enter__(self) -> PillowLoader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Stop the worker processes; closing twice does nothing."""
        self._closed = True
        stream, self._stream = self._stream, None
        if stream is not None and self.workers:
            # dropping the iterator does the same, but a traceback may keep it alive
            stream._shutdown_workers()
            atexit.unregister(self._close_at_exit)

    def _open(self) -> Iterator:
        iterations = itertools.count(self.iteration)
        if self.workers == 0:
            return map(self._batches.__getitem__, iterations)
        loader = DataLoader(
            self._batches,
            sampler=iterations,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.workers,
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            # its own generator, or starting it would advance the global one
            generator=torch.Generator(),
        )
        with _signals_blocked():
            stream = iter(loader)
        # multiprocessing's own hook would send the workers SIGTERM and wait for ever: stop them before.
        reference = weakref.ref(self)
        self._close_at_exit = lambda: (loader := reference()) and loader.close()
        atexit.register(self._close_at_exit)
        return stream

    def _report(self, bad_files: dict[str, str]) -> None:
        for path, reason in bad_files.items():
            if path not in self.bad_files:
                self.bad_files[path] = reason
                logger.warning("cannot decode %s (%s); the next image takes its place", self.folder.root / path, reason)
        if len(self.bad_files) > self.max_bad_fraction * len(self.folder):
            self.close()
            raise too_many_bad_files(self.bad_files, len(self.folder), self.max_bad_fraction)


class _Batches(Dataset):
    """Maps a global iteration to (this rank's batch, files that could not be decoded); lives in every worker."""

    def __init__(
        self, folder, *, image_size, batch_size, seed, rank, world_size, flip_probability, augment, max_bad_files
    ):
        self.folder = folder
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed
        self.local_size = batch_size // world_size
        self.offset = rank * self.local_size
        self.flip_probability = flip_probability
        self.augment = augment
        self.max_bad_files = max_bad_files
        self.names = ("x",) if augment is None else ("x", "view1", "view2")
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, iteration: int) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        epoch, indices = self._indices(iteration)
        shape = (self.local_size, 3, self.image_size, self.image_size)
        images = {name: np.empty(shape, np.uint8) for name in self.names}
        used = np.empty(self.local_size, np.int64)
        bad_files: dict[str, str] = {}
        for position, index in enumerate(indices):
            image, used[position] = self._load(int(index), bad_files)
            if image is None:
                return None, bad_files
            rng = self._rng(_SAMPLE, epoch, int(index))
            views = training_views(image, self.image_size, rng, self.flip_probability, self.augment)
            for name, view in zip(self.names, views, strict=True):
                images[name][position] = view.transpose(2, 0, 1)
        batch = {name: torch.from_numpy(array) for name, array in images.items()}
        batch["label"] = torch.tensor([self.folder.labels[i] for i in used], dtype=torch.int64)
        batch["index"] = torch.from_numpy(used)
        return batch, bad_files

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def _indices(self, iteration: int) -> tuple[int, np.ndarray]:
        epoch, step = divmod(iteration, len(self.folder) // self.batch_size)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._rng(_ORDER, epoch).permutation(len(self.folder))
        first = step * self.batch_size + self.offset
        return epoch, self._order[1][first : first + self.local_size]

    def _load(self, index: int, bad_files: dict[str, str]) -> tuple[Image.Image | None, int]:
        """Return (image, its index) for `index` or the next index that decodes; no image once too many do not."""
        for i in itertools.chain(range(index, len(self.folder)), range(index)):
            path = self.folder.paths[i]
            if path in bad_files:
                continue
            try:
                return self.folder.load(i), i
            except Exception as error:
                # what a damaged file makes Pillow raise is no closed list
                bad_files[path] = f"{type(error).__name__}: {error}"
            if len(bad_files) > self.max_bad_files:
                break
        return None, index


def _unchanged(batch):
    return batch


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM for the processes started inside, for their whole life.

    Ctrl-C and a scheduler's SIGTERM reach the whole process group, but it is the parent that decides what to finish
    first; workers end by its close(), or on their own within seconds of its death.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _check_arguments(folder, image_size, batch_size, seed, rank, world_size, start, workers) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} of {world_size}, wanted 0 <= rank < world_size")
    for name, value, lowest in (
        ("image_size", image_size, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("start", start, 0),
        ("workers", workers, 0),
    ):
        if value < lowest:
            raise ValueError(f"{name}: got {value}, wanted at least {lowest}")
    if batch_size % world_size:
        raise ValueError(f"batch_size: got {batch_size} for {world_size} ranks, wanted a multiple of {world_size}")
    if batch_size > len(folder):
        raise ValueError(
            f"batch_size: got {batch_size}, wanted at most the {len(folder)} images of {folder.root}; lower it"
        )
