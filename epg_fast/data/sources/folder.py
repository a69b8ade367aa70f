"""A folder of class folders with images, or of images whose labels a dataset.json has."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from epg_fast.data.sources.manifest import check_complete, check_counts, read_manifest
from epg_fast.data.sources.names import IMAGES, Ignored, find_splits, is_image, is_parquet, split_of
from epg_fast.data.sources.source import MOST_CLASSES, NO_LABELS, ImageSource, existing, warn_of_no_labels
from epg_fast.files import is_junk

_WANTED = "wanted a folder of class folders with images"
_DATASET = "dataset.json"

logger = logging.getLogger("epg_fast")


class ImageFolder(ImageSource):
    """The images below `root`, where each direct subfolder is one class.

    Attributes:
        root: the folder as a `Path`.
        paths: image paths relative to `root`, with `/`, sorted; class folders are searched recursively.
        labels: class index of each path.
        classes: names of all class folders, sorted; the class index is the position in this list. An output of
            `prepare-data` may have numbers for folders, and the names in its manifest.json.

    Where `root` has the dataset.json of EDM and StyleGAN, `{"labels": [["00000/img00000000.png", 6], ...]}`, its labels
    count and the folders are none. Classes are then "0", "1", ... up to the largest label, with leading zeros, so that
    names sort as numbers; `"labels": null` says that there are none (`NO_LABELS`).
    Images are files with the ending of a format that the decoder reads (`names.IMAGES`), in any case. Hidden names and
    what operating systems and storage boxes leave behind (`files.is_junk`) are no classes and no images.
    Links to folders are followed, but those that lead back to a folder above them, with a warning.
    A class folder without images keeps its index, so that labels do not shift, and is warned about.
    flat: take a folder of images without class folders, too, as one class.
    Raises ValueError for a missing folder, a file, a folder without class folders or without images, or with more
    images outside the class folders than in them, splits in place of classes, a dataset.json without a class index for
    each image, and an output of `prepare-data` that is not complete or not as its manifest.json says.
    """

    def __init__(self, root: str | os.PathLike, *, flat: bool = False):
        self.root, self._root = existing(root), os.fspath(root)
        if not self.root.is_dir():
            raise ValueError(f"{root} is a file, {_WANTED}; pass the folder instead")
        found = _walk(self._root)
        labels = _read_labels(self.root / _DATASET) if found.images else None
        if labels is not None:
            self._take_labels(found.images, labels)
        else:
            self._take_classes(found, flat)
        manifest = read_manifest(self.root)
        if manifest is not None:
            check_complete(self.root, manifest)
            check_counts(self.root, manifest, self.classes, self.labels)
            # where names of classes are none of folders, or not in the order of the classes
            self.classes = manifest.get("class_names", self.classes)

    def read(self, i: int) -> bytes:
        """Return the content of file `i`."""
        with open(os.path.join(self._root, self.paths[i]), "rb") as file:
            return file.read()

    def _take_labels(self, paths: list[str], labels: dict[str, int]) -> None:
        """The labels of a dataset.json; empty if it says that there are none."""
        self._refuse_splits({path.rpartition("/")[0] for path in paths})
        self.paths = paths
        if not labels:
            warn_of_no_labels(self.root / _DATASET)
            self.classes, self.labels = list(NO_LABELS), [0] * len(paths)
            return
        if missing := [path for path in paths if path not in labels]:
            raise ValueError(f"{self.root / _DATASET} has no label of {missing[0]}; add it, or move one of them away")
        if len(labels) > len(paths):
            logger.warning("%s: %d files of %s are not there", self.root, len(labels) - len(paths), _DATASET)
        self.labels = [labels[path] for path in paths]
        count = max(self.labels) + 1
        self.classes = [f"{label:0{len(str(count - 1))}d}" for label in range(count)]

    def _take_classes(self, found: _Found, flat: bool) -> None:
        """Class folders, or the images of a `flat` folder."""
        root, loose = self.root, [path for path in found.images if "/" not in path]
        self.paths = [path for path in found.images if "/" in path]
        self.classes = sorted(folder for folder in found.folders if "/" not in folder)
        if flat and loose and not self.paths:
            self.paths, self.classes, self.labels = loose, [root.name], [0] * len(loose)
            return
        if found.parquet and not found.images:
            folder = min(found.parquet, key=lambda name: (split_of(name.rpartition("/")[2]) != "train", name))
            # of a reader that takes class folders alone
            remedy = f"`epg-fast prepare-data --layout folder --source {root}` makes class folders of them"
            remedy = f"pass {root / folder}" if folder else remedy
            raise ValueError(f"{root} has no images, but parquet files in {folder or root}, {_WANTED}; {remedy}")
        if not self.classes:
            what, remedy = "is empty", "check the path, or prepare the data first"
            if loose:
                what, remedy = f"has {len(loose)} images but no class folders", "move them into one subfolder per class"
            elif found.others:
                what = "has neither class folders nor images"
            raise ValueError(f"{root} {what}, {_WANTED}; {remedy}")
        self._refuse_splits(found.folders)
        if not found.images:
            raise ValueError(
                f"none of the {len(self.classes)} class folders in {root} has an image, wanted files ending in "
                f"{', '.join(IMAGES)}; check the path"
            )
        if loose and flat or len(loose) > len(self.paths):
            raise ValueError(
                f"{root} has {len(loose)} images itself and {len(self.paths)} in its folders "
                f"({self.classes[0]}{', ...' * (len(self.classes) > 1)}), wanted one of these; move the others away"
            )
        index = {name: label for label, name in enumerate(self.classes)}
        self.labels = [index[path[: path.index("/")]] for path in self.paths]
        self._check_used(len(loose))

    def _refuse_splits(self, folders: Iterable[str]) -> None:
        """The splits of a dataset hold class folders of their own and would be taken for classes, the test set too."""
        if held := find_splits(folders):
            raise self._split(self.root / held[0], held[1])

    def _split(self, where: Path, names: list[str]) -> ValueError:
        several = "s" * (len(names) > 1)
        return ValueError(f"{where} holds the split{several} {', '.join(names)}, {_WANTED}; pass {where / names[0]}")

    def _check_used(self, loose: int) -> None:
        """What may be another dataset than was meant."""
        used = [self.classes[label] for label in sorted(set(self.labels))]
        deep = [path.split("/", 2)[1] for path in self.paths if path.count("/") > 1]
        if all(map(split_of, used)) and len(deep) == len(self.paths):
            raise self._split(self.root, used)
        if len(used) == 1 and len(inner := sorted(set(deep))) > 1:
            logger.warning(
                "%s: one class, %s, with images in %d folders (%s, ...); pass %s if these are the classes",
                *(self.root, used[0], len(inner), inner[0], self.root / used[0]),
            )
        if loose:
            logger.warning("%s: ignored %d images that lie outside the class folders", self.root, loose)
        if empty := sorted(set(self.classes).difference(used)):
            some = ", ".join(empty[:3]) + ", ..." * (len(empty) > 3)
            message = "%s: %d class folders have no images (%s); they keep their class index"
            logger.warning(message, self.root, len(empty), some)


def _read_labels(path: Path) -> dict[str, int] | None:
    """Return the class index of each file in a dataset.json, empty without labels; None for another program's."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"no JSON: {error}"
        raise ValueError(f"cannot read {path} ({reason}); mend it, or move it away") from None
    if not isinstance(content, dict) or "labels" not in content:
        logger.warning("%s has no labels and is ignored", path)
        return None
    try:
        pairs = [(name.replace("\\", "/"), label) for name, label in content["labels"] or ()]
    except (TypeError, ValueError, AttributeError):
        pairs = [("", None)]
    labels = dict(pairs)
    if not all(type(label) is int and 0 <= label < MOST_CLASSES for label in labels.values()):
        raise ValueError(f"{path} has other labels, wanted a list of [file, class index]; or move it away")
    for name, label in pairs:
        if labels[name] != label:
            raise ValueError(f"{path} names {name} with the labels {label} and {labels[name]}; delete one of them")
    return labels


class _Found(NamedTuple):
    """What lies below a folder; paths are relative, with `/`."""

    folders: list[str]
    images: list[str]
    parquet: set[str]
    """The folders that have parquet files."""
    others: bool
    """Whether there are files that are no images."""


def _walk(root: str) -> _Found:
    folders, images, parquet, loops, ignored = [], [], set(), [], Ignored()
    for folder, subfolders, files in os.walk(root, onerror=_unreadable, followlinks=True):
        prefix = "" if folder == root else os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        known = [name for name in subfolders if not ignored.skips(name)]
        # these would be walked round and round
        back = [name for name in known if _leads_back(folder, name)]
        loops += [prefix + name for name in back]
        subfolders[:] = [name for name in known if name not in back]
        folders += [prefix + name for name in subfolders]
        for name in files:
            if not ignored.skips(name, is_image):
                images.append(prefix + name)
            elif is_parquet(name) and not is_junk(name):
                parquet.add(prefix.rstrip("/"))
    ignored.report(root, "images")
    if loops:
        message = "%s: %d links lead back to a folder above them and are not followed (%s)"
        logger.warning(message, root, len(loops), loops[0])
    return _Found(folders, sorted(images), parquet, bool(ignored.others))


def _leads_back(folder: str, name: str) -> bool:
    """Whether `name` is a link to `folder` or to one above it."""
    path = os.path.join(folder, name)
    return os.path.islink(path) and Path(folder).resolve().is_relative_to(os.path.realpath(path))


def _unreadable(error: OSError) -> None:
    raise ValueError(f"cannot read {error.filename} ({error.strerror}); fix its permissions") from error
