"""Which class each image is of."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable

import numpy as np

from epg_fast.data import load_class_frequencies
from epg_fast.models import EPGViT
from epg_fast.wording import nearest

log = logging.getLogger("epg_fast")


def choose_labels(how: str, num: int, num_classes: int, seed: int, untrained: Collection[int] = ()) -> list[int]:
    """Labels of `num` images: `balanced` (0, 1, ..., repeated), `random` (uniform, from the seed) or a list `3,7`.

    Both leave out the classes that are `untrained`; others that choose them are obeyed, with a warning.

    `frequencies:PATH` draws from the seed with the probabilities in PATH, a manifest.json of `prepare-data` or its
    folder. An unconditional model (num_classes 0) has zeros, and takes `balanced` only. Raises ValueError for anything
    else, labels outside 0..num_classes-1, a list longer than `num` and another number of frequencies.
    """
    if not num_classes:
        if how != "balanced":
            raise ValueError(f"labels: got {how!r}, but the model is unconditional (it has no classes); drop --labels")
        return [0] * num
    trained = sorted(set(range(num_classes)).difference(untrained))
    if how in ("balanced", "random"):
        order = np.arange(num) % len(trained)
        if how == "random":
            order = np.random.default_rng(seed).integers(len(trained), size=num)
        return np.array(trained)[order].tolist()
    if how.startswith("frequencies:"):
        labels = _draw(os.path.expanduser(how.removeprefix("frequencies:")), num, num_classes, seed)
    else:
        chosen = _listed(how, num_classes)
        if len(chosen) > num:
            raise ValueError(
                f"labels: got more labels than images, {len(chosen)} for {num}; want at most {num}, or "
                f"--num {len(chosen)}"
            )
        labels = [chosen[i % len(chosen)] for i in range(num)]
    wrong = sorted(set(labels).difference(trained))
    if wrong:
        log.warning("labels: the model was trained on no image of class %s: expect noise", ", ".join(map(str, wrong)))
    return labels


def class_indices(model: EPGViT, labels: int | str | Iterable[int | str] | None) -> list[int] | int:
    """Labels as `SamplingEngine` takes them, of indices or of names that the checkpoint knows (metadata `class_names`).

    A name is that of its class, or one of several that are separated by commas, in upper or lower case. Labels of an
    unconditional model, which are its number of images, are returned as they are, None as 1. Raises ValueError for
    other names, and for none.
    """
    if not model.num_classes:
        return 1 if labels is None else labels
    names = getattr(model, "metadata", {}).get("class_names") or []
    known = {part.strip().casefold(): i for i, name in enumerate(names) for part in [name, *name.split(",")]}
    if np.ndim(labels) == 0:
        labels = [labels]
    wanted = f"want class indices in 0..{model.num_classes - 1}" + (f", or names such as {names[0]!r}" if names else "")
    for label in labels:
        if label is None:
            raise ValueError(f"class_labels is missing; {wanted}")
        if isinstance(label, str) and label.casefold() not in known:
            like = nearest(label.casefold(), known)
            raise ValueError(f"the model has no class {label!r}{like}, and takes no text; {wanted}")
    return [known[label.casefold()] if isinstance(label, str) else label for label in labels]


def _listed(how: str, num_classes: int) -> list[int]:
    try:
        chosen = [int(label) for label in re.split(r"\s*,\s*|\s+", how.strip())]
    except ValueError:
        raise ValueError(
            f"labels {how!r}: want balanced, random, frequencies:PATH, or class indices such as 3 or 0,1,2"
        ) from None
    wrong = [label for label in chosen if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"label {wrong[0]} is out of range: the model has classes 0..{num_classes - 1}")
    return chosen


def _draw(path: str, num: int, num_classes: int, seed: int) -> list[int]:
    frequencies = load_class_frequencies(path)
    if len(frequencies) != num_classes:
        raise ValueError(
            f"labels: {path} has the frequencies of {len(frequencies)} classes, the model has {num_classes}; "
            "pass the manifest of the data it was trained on"
        )
    return np.random.default_rng(seed).choice(num_classes, size=num, p=frequencies).tolist()
