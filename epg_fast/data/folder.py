"""A folder of class folders with images, or of images whose labels a dataset.json has."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from epg_fast.data.dataset_json import read_labels
from epg_fast.data.manifest import check_complete, check_counts, read_manifest
from epg_fast.data.names import IMAGES, Ignored, find_splits, is_image, is_split
from epg_fast.data.source import ImageSource

_WANTED = "wanted a folder of class folders with images"

logger = logging.getLogger("epg_fast")


class ImageFolder(ImageSource):
    """The images below `root`, where each direct subfolder is one class.

    Attributes:
        root: the folder as a `Path`.
        paths: image paths relative to `root`, with `/`, sorted; class folders are searched recursively.
        labels: class index of each path.
        classes: names of all class folders, sorted; the class index is the position in this list.

    Where `root` has the dataset.json of EDM and StyleGAN, its labels count and the folders are none: see `read_labels`.
    Images are files with the ending of a format that the decoder reads (`names.IMAGES`), in any case. Hidden names and
    what operating systems and storage boxes leave behind (`names.is_junk`) are no classes and no images.
    Links to folders are followed, but those that lead back to a folder above them, with a warning.
    A class folder without images keeps its index, so that labels do not shift, and is warned about.
    flat: take a folder of images without class folders, too, as one class.
    Raises ValueError for a missing folder, a file, a folder without class folders or without images, or with more
    images outside the class folders than in them, splits in place of classes, and an output of `prepare-data` that is
    not complete or has not the images that its manifest.json counts.
    """

    def __init__(self, root: str | os.PathLike, *, flat: bool = False):
        self.root = Path(root)
        self._root = os.fspath(root)
        self._check_root()
        found = _walk(self._root)
        labelled = read_labels(self.root, found.images) if found.images else None
        if labelled is not None:
            self.paths = found.images
            self.classes, self.labels = labelled
        else:
            self._take_classes(found, flat)
        manifest = read_manifest(self.root)
        if manifest is not None:
            check_complete(self.root, manifest)
            check_counts(self.root, manifest, self.classes, self.labels)

    def read(self, i: int) -> bytes:
        """Return the content of file `i`."""
        with open(os.path.join(self._root, self.paths[i]), "rb") as file:
            return file.read()

    def _check_root(self) -> None:
        if not self._root:
            raise ValueError(f"data path: got an empty path, {_WANTED}; set data.path")
        if not self.root.exists():
            raise ValueError(
                f"data path: {self.root} does not exist, {_WANTED}; check the spelling or prepare the data"
            )
        if not self.root.is_dir():
            raise ValueError(f"data path: {self.root} is a file, {_WANTED}; pass the folder instead")

    def _take_classes(self, found: _Found, flat: bool) -> None:
        """Class folders, or the images of a `flat` folder."""
        self.classes = sorted(folder for folder in found.folders if "/" not in folder)
        loose = [path for path in found.images if "/" not in path]
        if flat and len(loose) == len(found.images) > 0:
            self.paths, self.classes, self.labels = loose, [self.root.name], [0] * len(loose)
            return
        self.paths = [path for path in found.images if "/" in path]
        self._check_found(found, len(loose), flat)
        index = {name: label for label, name in enumerate(self.classes)}
        self.labels = [index[path[: path.index("/")]] for path in self.paths]
        self._warn_of_empty_classes()

    def _check_found(self, found: _Found, loose: int, flat: bool) -> None:
        root = self.root
        if not self.classes and loose:
            raise ValueError(
                f"data path: {root} has {loose} images but no class folders, {_WANTED}; "
                "move them into one subfolder per class (a single one for unlabelled images)"
            )
        if not self.classes:
            what = "has neither class folders nor images" if found.others else "is empty"
            raise ValueError(f"data path: {root} {what}, {_WANTED}; check the path, or prepare the data first")
        self._check_splits(found.folders)
        if not self.paths and not loose:
            raise ValueError(
                f"data path: none of the {len(self.classes)} class folders in {root} has an image, "
                f"wanted files ending in {', '.join(IMAGES)}; check the path"
            )
        if loose and flat or loose > len(self.paths):
            raise ValueError(
                f"data path: {root} has {loose} images itself and {len(self.paths)} in its folders "
                f"({self.classes[0]}{', ...' * (len(self.classes) > 1)}), wanted one of these; move the others away"
            )
        if loose:
            logger.warning("%s: ignored %d images that lie outside the class folders", root, loose)

    def _check_splits(self, folders: list[str]) -> None:
        """The splits of a dataset hold class folders of their own and would be taken for classes, the test set too."""
        if held := find_splits(folders):
            above, found = held
            where = self.root / above
            remedy = f"pass {where / found[0]}"
            if above and len(self.classes) > 1:
                remedy = f"move one of them into a folder of its own, as {found[0]}/{above.replace('/', '_')}"
            raise ValueError(f"data path: {where} holds the splits {', '.join(found)}, {_WANTED}; {remedy}")
        used = sorted({path.split("/", 1)[0] for path in self.paths})
        inner = sorted({path.split("/", 2)[1] for path in self.paths if path.count("/") > 1})
        if used and all(map(is_split, used)) and all(path.count("/") > 1 for path in self.paths):
            raise ValueError(
                f"data path: {self.root} holds the split {', '.join(used)}, {_WANTED}; pass {self.root / used[0]}"
            )
        if len(used) == 1 and len(inner) > 1:
            logger.warning(
                "%s: one class, %s, with images in %d folders (%s, ...); pass %s if these are the classes",
                *(self.root, used[0], len(inner), inner[0], self.root / used[0]),
            )

    def _warn_of_empty_classes(self) -> None:
        used = set(self.labels)
        empty = [name for label, name in enumerate(self.classes) if label not in used]
        if empty:
            some = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
            logger.warning(
                "%s: %d class folders have no images (%s); they keep their class index", self.root, len(empty), some
            )


@dataclass
class _Found:
    """What lies below a folder.

    Attributes:
        folders: all of them, relative with `/`.
        images: their paths likewise, sorted.
        others: whether there are other files.
    """

    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    others: bool = False


def _walk(root: str) -> _Found:
    found, ignored, loops = _Found(), Ignored(), []
    # for each folder to come, those on the way to it: a link to one of them would be walked round and round
    above = {root: frozenset(map(_identity, (root, *Path(root).resolve().parents)))}
    for folder, subfolders, files in os.walk(root, onerror=_unreadable, followlinks=True):
        prefix = "" if folder == root else os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        parents = above.pop(folder)
        subfolders[:] = [name for name in subfolders if not ignored.skips(name)]
        identities = {name: _identity(os.path.join(folder, name)) for name in subfolders}
        loops += [prefix + name for name in subfolders if identities[name] in parents]
        subfolders[:] = [name for name in subfolders if identities[name] not in parents]
        above |= {os.path.join(folder, name): parents | {identities[name]} for name in subfolders}
        found.folders += [prefix + name for name in subfolders]
        for name in files:
            if ignored.skips(name):
                continue
            if is_image(name):
                found.images.append(prefix + name)
            else:
                ignored.add_other(name)
    found.images.sort()
    found.others = bool(ignored.others)
    ignored.report(root)
    if loops:
        logger.warning(
            "%s: %d links lead back to a folder above them and are not followed (%s)", root, len(loops), loops[0]
        )
    return found


def _identity(path: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _unreadable(error: OSError) -> None:
    raise ValueError(f"data path: cannot read {error.filename} ({error.strerror}); fix its permissions") from error
