"""A run's images, of which all ranks, and the run before a resume, know the same: classes, decoder, bad files."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np

from epg_fast.data import (
    LABELS_WANTED,
    NO_LABELS,
    DataError,
    ImageSource,
    printable,
    resolve_backend,
    too_many_bad_files,
)
from epg_fast.distributed import Ranks
from epg_fast.files import write_atomically
from epg_fast.training.stages import Stage

log = logging.getLogger("epg_fast")
_PIXELS = "their pixels differ slightly, so that the numbers are no longer those of an uninterrupted run"


def note_classes(stage: Stage, source: ImageSource) -> None:
    """Tell `stage` what its classes are called and which of them stay untrained, and say the latter once.

    Raises ValueError for more classes than the network has, and for no labels if it has several.
    """
    classes, found = getattr(stage.network, "num_classes", 0), len(source.classes)
    if not classes:
        return
    if source.classes == NO_LABELS and classes > 1:
        raise ValueError(
            f"{source.root} has no labels, but the model has {classes} classes; {LABELS_WANTED}; or pass "
            "--model.num_classes 0 for an unconditional model"
        )
    counts = np.bincount(np.asarray(source.labels, np.int64), minlength=max(classes, found))
    if found > classes:
        from_one = found == classes + 1 and not counts[0]
        remedy = "no image is of class 0: if the labels count from 1, write them from 0; or " if from_one else ""
        raise ValueError(
            f"{source.root} has {found} classes, but the model has {classes}; {remedy}pass --model.num_classes {found}"
        )
    stage.class_names = source.classes if _are_names(source.classes) else []
    absent = np.flatnonzero(counts == 0).tolist()
    before = stage.untrained_before
    stage.untrained_classes = absent if before is None else [label for label in absent if label in before]
    if not absent:
        return
    effect = "they stay as they are in --init_from"
    if stage.untrained_classes:
        used = classes - len(absent)
        remedy = "if labels count from 1 or have gaps, write them as 0, 1, ..."
        if before is not None:
            remedy = "for a network of fewer classes start from a pre-trained encoder"
        elif not counts[used:].any():
            remedy = f"pass --model.num_classes {used} for a model without them"
        effect = f"{len(stage.untrained_classes)} stay untrained, and `sample` does not draw them; {remedy}"
    log.warning(
        *("%s has no images of %d of the model's %d classes (%s): %s", source.root, len(absent), classes),
        *(_ranges(absent), effect),
    )


def _are_names(classes: list[str]) -> bool:
    """Whether names say more than the numbers of the classes."""
    return classes != NO_LABELS and classes != [f"{label:0{len(name)}d}" for label, name in enumerate(classes)]


def _ranges(labels: list[int]) -> str:
    """Rising numbers as `0, 3-5`."""
    groups = [[label for _, label in group] for _, group in itertools.groupby(enumerate(labels), lambda x: x[1] - x[0])]
    texts = [str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups]
    return ", ".join(texts[:4] + ["..."] * (len(texts) > 4))


def choose_backend(wanted: str, used: str | None, ranks: Ranks) -> str:
    """The decoder, "dali" or "pillow", for `data.backend` = `wanted` in a run that has `used` so far (None: new).

    `auto` keeps to what the run has used, because the pixels of the two differ slightly; another one by name is obeyed
    with a warning. Raises ValueError, on every rank, if the one to keep to does not work on one, and for machines that
    would decode differently.
    """
    keeps = used is not None and wanted in ("auto", used)

    def choose() -> str:
        try:
            return resolve_backend(used if keeps else wanted, ranks.device)
        except (ValueError, ImportError) as error:
            if not keeps:
                raise
            raise ValueError(
                f"the images of this run were decoded by {used} so far, which does not work here: {error}. Install it "
                f"(pip install nvidia-dali-cuda130, or -cuda120), or go on with --data.backend pillow: {_PIXELS}"
            ) from None

    chosen, *others = ranks.together(choose)
    for rank, other in enumerate(others, 1):
        if other != chosen:
            raise ValueError(
                f"rank {rank} decodes images with {other}, rank 0 with {chosen}: `epg-fast env` on both machines "
                "says what is missing; install it, or pass --data.backend pillow"
            )
    if used not in (None, chosen):
        log.warning("the images of this run were decoded by %s so far, now by %s as asked: %s", used, chosen, _PIXELS)
    return chosen


def decoder(backend: str, workers: int) -> str:
    """The decoder and its threads or processes, for people."""
    if backend == "dali":
        return f"DALI ({max(workers, 1)} thread{'s' * (workers > 1)})"
    return f"Pillow ({workers} process{'es' * (workers != 1)})" if workers else "Pillow (in the training process)"


class BadFiles:
    """What all ranks, and the run before a resume, know about the files of a dataset that cannot be decoded.

    Knowing of a file earlier changes no batch (see `epg_fast.data`), so that it does not matter at which step a rank
    learns of it, nor that the loader is some batches ahead.
    """

    def __init__(
        self, known: dict[str, str], loader, source: ImageSource, max_fraction: float, outdir: Path, ranks: Ranks
    ):
        """known: relative path -> reason; `exchange` adds to this very dict, which goes into the checkpoints.

        loader: this rank's. max_fraction: share of bad files above which training stops. outdir: for bad_files.txt.
        Raises DataError if `known` is over the limit.
        """
        self.known, self.path = known, outdir / "bad_files.txt"
        self._loader, self._source, self._max_fraction, self._ranks = loader, source, max_fraction, ranks
        if known:
            loader.add_bad_files(dict(known))

    def exchange(self) -> None:
        """Tell every rank what the others have met since the last call; all ranks call this at the same step.

        Raises DataError, the same one on every rank, when the union is over the limit.
        """
        own = self._loader.bad_files.copy()  # the thread that draws ahead may add to it meanwhile
        new = self._ranks.gather({path: reason for path, reason in own.items() if path not in self.known})
        if not any(new):
            return
        for found in reversed(new):
            self.known |= found
        if self._ranks.main and self._write(self.known):
            log.warning("%d of %d images cannot be decoded: %s", len(self.known), len(self._source), self.path)
        if len(self.known) > self._max_fraction * len(self._source):
            raise too_many_bad_files(dict(sorted(self.known.items())), len(self._source), self._max_fraction)
        self._loader.add_bad_files({path: reason for path, reason in self.known.items() if path not in own})

    def listed(self, error: DataError) -> DataError:
        """Return `error` with the name of the list. Any rank writes it: one that stops alone takes the others down."""
        found = self.known | self._loader.bad_files
        return DataError(f"{error} They are listed in {self.path}.") if found and self._write(found) else error

    def _write(self, found: dict[str, str]) -> bool:
        lines = [f"{printable(path)}\t{' '.join(reason.split())}\n" for path, reason in sorted(found.items())]
        try:
            write_atomically(self.path, "".join(lines).encode(errors="surrogateescape"))
        except OSError as error:
            log.warning("%s", error)
            return False
        return True


def still_bad(bad_files: dict[str, str], source: ImageSource) -> dict[str, str]:
    """Return those of `bad_files` that cannot be decoded now either: a restored file is part of the dataset again."""
    places = [i for i, path in enumerate(source.paths) if path in bad_files] if bad_files else []
    return {source.paths[i]: bad_files[source.paths[i]] for i in places if source.examine(i)[1] is not None}
