"""Which classes of a network the data trains, and what they are called."""

from __future__ import annotations

import itertools
import logging

import numpy as np

from epg_fast.data import LABELS_WANTED, NO_LABELS, ImageSource
from epg_fast.training.stages import Stage

log = logging.getLogger("epg_fast")


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
