"""dataset.json: the labels of a folder of images, as the tools of StyleGAN and EDM write it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from epg_fast.data.names import find_splits
from epg_fast.data.source import MOST_CLASSES, NO_LABELS

DATASET = "dataset.json"

logger = logging.getLogger("epg_fast")


def read_labels(root: Path, paths: list[str]) -> tuple[list[str], list[int]] | None:
    """Return class names and the class index of each of `paths` by dataset.json; None if `root` has none.

    It holds `{"labels": [["00000/img00000000.png", 6], ...]}`. Classes are "0", "1", ... up to the largest label, with
    leading zeros, so that names sort as numbers. `"labels": null` says that there are none (`NO_LABELS`). A file of
    another program, without `labels`, is warned about and ignored.
    Raises ValueError for one that is damaged, with labels that are no class indices, with two of one file, or without
    one of `paths`, and for splits beside each other.
    """
    path = root / DATASET
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(
            f"data path: cannot read {path} ({error.strerror}), wanted a file of labels; mend it, or move it away"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data path: {path} is no JSON ({error}); get it again, or move it away") from None
    if not isinstance(content, dict) or "labels" not in content:
        logger.warning("%s has no labels and is ignored", path)
        return None
    if held := find_splits({name.rpartition("/")[0] for name in paths}):
        raise _holds_splits(root / held[0], held[1])
    if not content["labels"]:
        logger.warning("%s: no labels in %s: one class, '%s'", root, DATASET, *NO_LABELS)
        return list(NO_LABELS), [0] * len(paths)
    try:
        pairs = [(name.replace("\\", "/"), label) for name, label in content["labels"]]
    except (TypeError, ValueError, AttributeError):
        pairs = [("", None)]
    labels = dict(pairs)
    if not all(type(label) is int and 0 <= label < MOST_CLASSES for label in labels.values()):
        raise ValueError(f"data path: {path} has other labels, wanted a list of [file, class index]; or move it away")
    for name, label in pairs:
        if labels[name] != label:
            raise ValueError(
                f"data path: {path} names {name} with the labels {label} and {labels[name]}; delete one of them"
            )
    for name in paths:
        if name not in labels:
            raise ValueError(f"data path: {path} has no label of {name}; add it, or move one of them away")
    if len(labels) > len(paths):
        logger.warning("%s: %d files that %s names are not there", root, len(labels) - len(paths), DATASET)
    found = [labels[name] for name in paths]
    count = max(found, default=0) + 1
    return [f"{label:0{len(str(count - 1))}d}" for label in range(count)], found


def _holds_splits(where: Path, splits: list[str]) -> ValueError:
    one = where / splits[0]
    remedy = f"pass {one}"
    if not (one / DATASET).is_file():
        remedy = f"write {one / DATASET} with the labels of its images, named from there, and pass {one}"
    return ValueError(
        f"data path: {where} holds the splits {', '.join(splits)}, wanted the images of one split and their {DATASET}; "
        f"{remedy}"
    )
