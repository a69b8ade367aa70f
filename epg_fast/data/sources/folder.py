"""A folder of class folders with images, or of images whose labels a dataset.json has."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from epg_fast.data.sources.manifest import check_complete, check_counts, read_manifest
from epg_fast.data.sources.names import IMAGES, Ignored, find_splits, is_image, is_parquet, split_of
from epg_fast.data.sources.source import MOST_CLASSES, NO_LABELS, ImageSource, existing

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
        self.root = existing(root)
        self._root = os.fspath(root)
        if not self.root.is_dir():
            raise ValueError(f"data path: {root} is a file, {_WANTED}; pass the folder instead")
        found = _walk(self._root)
        labels = _read_labels(self.root / _DATASET) if found.images else None
        if labels is not None:
            self._check_splits({path.rpartition("/")[0] for path in found.images})
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
        self.paths = paths
        if not labels:
            logger.warning("%s: no labels in %s: one class, '%s'", self.root, _DATASET, *NO_LABELS)
            self.classes, self.labels = list(NO_LABELS), [0] * len(paths)
            return
        missing = next((path for path in paths if path not in labels), None)
        if missing is not None:
            raise ValueError(
                f"data path: {self.root / _DATASET} has no label of {missing}; add it, or move one of them away"
            )
        if len(labels) > len(paths):
            logger.warning("%s: %d files of %s are not there", self.root, len(labels) - len(paths), _DATASET)
        self.labels = [labels[path] for path in paths]
        count = max(self.labels) + 1
        self.classes = [f"{label:0{len(str(count - 1))}d}" for label in range(count)]

    def _take_classes(self, found: _Found, flat: bool) -> None:
        """Class folders, or the images of a `flat` folder."""
        if found.parquet and not found.images:
            folder = min(found.parquet, key=lambda name: (split_of(name.rpartition("/")[2]) != "train", name))
            where, remedy = f" in {folder}", f"pass {self.root / folder}"
            if not folder:  # of a reader that takes class folders alone
                where = ""
                remedy = f"`epg-fast prepare-data --layout folder --source {self.root}` makes class folders of them"
            raise ValueError(f"data path: {self.root} has no images, but parquet files{where}, {_WANTED}; {remedy}")
        self.classes = sorted(folder for folder in found.folders if "/" not in folder)
        self.paths = [path for path in found.images if "/" in path]
        loose = [path for path in found.images if "/" not in path]
        if flat and loose and not self.paths:
            self.paths, self.classes, self.labels = loose, [self.root.name], [0] * len(loose)
            return
        if not self.classes:
            what, remedy = "is empty", "check the path, or prepare the data first"
            if loose:
                what = f"has {len(loose)} images but no class folders"
                remedy = "move them into one subfolder per class (a single one for unlabelled images)"
            elif found.others:
                what = "has neither class folders nor images"
            raise ValueError(f"data path: {self.root} {what}, {_WANTED}; {remedy}")
        self._check_splits(found.folders)
        if not found.images:
            raise ValueError(
                f"data path: none of the {len(self.classes)} class folders in {self.root} has an image, "
                f"wanted files ending in {', '.join(IMAGES)}; check the path"
            )
        if loose and flat or len(loose) > len(self.paths):
            raise ValueError(
                f"data path: {self.root} has {len(loose)} images itself and {len(self.paths)} in its folders "
                f"({self.classes[0]}{', ...' * (len(self.classes) > 1)}), wanted one of these; move the others away"
            )
        index = {name: label for label, name in enumerate(self.classes)}
        self.labels = [index[path[: path.index("/")]] for path in self.paths]
        self._check_used(set(self.labels), len(loose))

    def _check_splits(self, folders) -> None:
        """The splits of a dataset hold class folders of their own and would be taken for classes, the test set too."""
        if held := find_splits(folders):
            above, found = held
            where = self.root / above
            raise ValueError(
                f"data path: {where} holds the splits {', '.join(found)}, {_WANTED}; pass {where / found[0]}"
            )

    def _check_used(self, labels: set[int], loose: int) -> None:
        """What may be another dataset than was meant."""
        used = [self.classes[label] for label in sorted(labels)]
        inner = sorted({path.split("/", 2)[1] for path in self.paths if path.count("/") > 1})
        if all(map(split_of, used)) and all(path.count("/") > 1 for path in self.paths):
            raise ValueError(
                f"data path: {self.root} holds the split {', '.join(used)}, {_WANTED}; pass {self.root / used[0]}"
            )
        if len(used) == 1 and len(inner) > 1:
            logger.warning(
                "%s: one class, %s, with images in %d folders (%s, ...); pass %s if these are the classes",
                *(self.root, used[0], len(inner), inner[0], self.root / used[0]),
            )
        if loose:
            logger.warning("%s: ignored %d images that lie outside the class folders", self.root, loose)
        if empty := sorted(set(self.classes).difference(used)):
            some = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
            logger.warning(
                "%s: %d class folders have no images (%s); they keep their class index", self.root, len(empty), some
            )


def _read_labels(path: Path) -> dict[str, int] | None:
    """Return the class index of each file in a dataset.json, empty without labels; None for another program's."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"no JSON: {error}"
        raise ValueError(f"data path: cannot read {path} ({reason}); mend it, or move it away") from None
    if not isinstance(content, dict) or "labels" not in content:
        logger.warning("%s has no labels and is ignored", path)
        return None
    try:
        pairs = [(name.replace("\\", "/"), label) for name, label in content["labels"] or ()]
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
    return labels


@dataclass
class _Found:
    """What lies below a folder.

    Attributes:
        folders: all of them, relative with `/`.
        images: their paths likewise, sorted.
        parquet: the folders that have parquet files.
        others: whether there are other files.
    """

    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    parquet: set[str] = field(default_factory=set)
    others: bool = False


def _walk(root: str) -> _Found:
    found, ignored, loops = _Found(), Ignored(), []
    for folder, subfolders, files in os.walk(root, onerror=_unreadable, followlinks=True):
        prefix = "" if folder == root else os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        subfolders[:] = [name for name in subfolders if not ignored.skips(name)]
        # which would be walked round and round
        back = [name for name in subfolders if _leads_back(folder, name)]
        loops += [prefix + name for name in back]
        subfolders[:] = [name for name in subfolders if name not in back]
        found.folders += [prefix + name for name in subfolders]
        for name in files:
            if ignored.skips(name):
                continue
            if is_image(name):
                found.images.append(prefix + name)
            else:
                ignored.add_other(name)
                if is_parquet(name):
                    found.parquet.add(prefix.rstrip("/"))
    found.images.sort()
    found.others = bool(ignored.others)
    ignored.report(root, "images")
    if loops:
        logger.warning(
            "%s: %d links lead back to a folder above them and are not followed (%s)", root, len(loops), loops[0]
        )
    return found


def _leads_back(folder: str, name: str) -> bool:
    """Whether `name` is a link to `folder` or to one above it."""
    path = os.path.join(folder, name)
    return os.path.islink(path) and Path(folder).resolve().is_relative_to(os.path.realpath(path))


def _unreadable(error: OSError) -> None:
    raise ValueError(f"data path: cannot read {error.filename} ({error.strerror}); fix its permissions") from error
