"""Which class each image is of."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from epg_fast.data import load_class_frequencies
from epg_fast.models import EPGViT
from epg_fast.wording import nearest

log = logging.getLogger("epg_fast")


def choose_labels(
    how: str, num: int, num_classes: int, seed: int, untrained: Collection[int] = (), names: Sequence[str] = ()
) -> list[int]:
    """Labels of `num` images: `balanced` (0, 1, ..., repeated), `random` (uniform, from the seed) or a list `3,cat`.

    Both words leave out the classes that are `untrained`; lists that choose them are obeyed, with a warning. `names` of
    the classes: see `class_index`.

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
        chosen = _listed(how, num_classes, tuple(names))
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
    """Labels as `SamplingEngine` takes them, of indices or of names that the checkpoint knows: see `class_index`.

    Labels of an unconditional model, which are its number of images, are returned as they are, None as 1. Raises
    ValueError for other names, and for none.
    """
    if not model.num_classes:
        return 1 if labels is None else labels
    names = model.metadata.get("class_names") or []
    if np.ndim(labels) == 0:
        labels = [labels]
    if any(label is None for label in labels):
        raise ValueError(f"class_labels is missing; {_wanted(names, model.num_classes)}")
    return [class_index(label, names, model.num_classes) if isinstance(label, str) else label for label in labels]


def class_index(name: str, names: Sequence[str], num_classes: int) -> int:
    """Index of the class that is called `name`, in upper or lower case. names: metadata `class_names` of a checkpoint.

    A class called "tench, Tinca tinca" is also "tench". Raises ValueError for no such class, and several.
    """
    known = _indices(tuple(names))
    found = known.get(_plain(name), [])
    if not found:
        like = nearest(_plain(name), known)
        raise ValueError(f"the model has no class {name!r}{like}, and takes no text; {_wanted(names, num_classes)}")
    if len(found) > 1:
        several = " and ".join(f"{label} ({names[label]!r})" for label in found)
        raise ValueError(f"class {name!r} may be {several}; give the class index")
    return found[0]


def _wanted(names: Sequence[str], num_classes: int) -> str:
    return f"want class indices in 0..{num_classes - 1}" + (f", or names such as {names[0]!r}" if names else "")


@functools.lru_cache(8)
def _indices(names: tuple[str, ...]) -> dict[str, list[int]]:
    """Plain name -> the classes that are called so; a whole name counts before the parts of others."""
    parts: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        for part in {*map(_plain, name.split(","))}:
            parts.setdefault(part, []).append(label)
    return parts | {_plain(name): [label] for label, name in enumerate(names)}


def _plain(name: str) -> str:
    return ",".join(part.strip() for part in name.casefold().split(","))


def _listed(how: str, num_classes: int, names: tuple[str, ...]) -> list[int]:
    """A list of class indices and names, of which some have commas: the longest name counts."""
    parts, known, chosen = [part.strip() for part in how.split(",")], _indices(names), []
    longest = max((name.count(",") + 1 for name in names), default=1)
    while parts:
        if re.fullmatch(r"[+-]?[0-9]+(\s+[+-]?[0-9]+)*", parts[0]):
            numbers = parts.pop(0).split()
            chosen += map(int, numbers)
            for number in numbers:
                if known.get(number, [int(number)]) != [int(number)]:
                    log.warning("labels: %s is the class index, not the class called so, %s", number, known[number][0])
            continue
        if not names or not parts[0]:
            without = "" if names else " (the checkpoint knows no names of classes)"
            raise ValueError(
                f"labels {how!r}: want balanced, random, frequencies:PATH, class indices such as 3 or 0,1,2, or names "
                f"of classes{without}"
            )
        joined = (",".join(parts[:count]) for count in range(min(longest, len(parts)), 0, -1))
        name = next((name for name in joined if _plain(name) in known), parts[0])
        chosen.append(class_index(name, names, num_classes))
        del parts[: name.count(",") + 1]
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
