"""A folder of class folders with images."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from epg_fast.data.manifest import check_complete, check_counts, read_manifest
from epg_fast.data.source import ImageSource

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

logger = logging.getLogger("epg_fast")


class ImageFolder(ImageSource):
    """The images below `root`, where each direct subfolder is one class.

    Attributes:
        root: the folder as a `Path`.
        paths: image paths relative to `root`, with `/`, sorted; class folders are searched recursively.
        labels: class index of each path.
        classes: names of all class folders, sorted; the class index is the position in this list.

    Images are files ending in .png, .jpg, .jpeg, .webp or .bmp in any case; hidden files and folders are ignored.
    Links to folders are followed, but those that lead back to a folder above them, with a warning.
    A class folder without images keeps its index, so that labels do not shift, and is warned about.
    Raises ValueError for a missing folder, a file, a folder without class folders or without images, and an output of
    `prepare-data` that is not complete or has not the images that its manifest.json counts.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        self._root = os.fspath(root)
        self._loops: list[str] = []
        self.classes = self._find_classes()
        found = [(path, label) for label, name in enumerate(self.classes) for path in self._find_images(name)]
        found.sort()
        self.paths = [path for path, _ in found]
        self.labels = [label for _, label in found]
        if self._loops:
            logger.warning(
                "%s: %d links lead back to a folder above them and are not followed (%s)",
                self.root,
                len(self._loops),
                self._loops[0],
            )
        self._check_found()
        manifest = read_manifest(self.root)
        if manifest is not None:
            check_complete(self.root, manifest)
            check_counts(self.root, manifest, self.classes, self.labels)

    def read(self, i: int) -> bytes:
        """Return the content of file `i`."""
        with open(os.path.join(self._root, self.paths[i]), "rb") as file:
            return file.read()

    def _find_classes(self) -> list[str]:
        wanted = "wanted a folder of class folders with images"
        if not self._root:
            raise ValueError(f"data path: got an empty path, {wanted}; set data.path")
        if not self.root.exists():
            raise ValueError(f"data path: {self.root} does not exist, {wanted}; check the spelling or prepare the data")
        if not self.root.is_dir():
            raise ValueError(f"data path: {self.root} is a file, {wanted}; pass the folder instead")
        visible = [entry for entry in os.scandir(self._root) if not entry.name.startswith(".")]
        folders = sorted(entry.name for entry in visible if entry.is_dir())
        self._above = frozenset(map(_identity, (self.root, *self.root.resolve().parents)))
        classes = [name for name in folders if not self._is_loop(name, self._above)]
        loose = sum(_is_image(entry.name) for entry in visible if not entry.is_dir())
        if not visible:
            raise ValueError(f"data path: {self.root} is empty, {wanted}; prepare the data first")
        if not classes and loose:
            raise ValueError(
                f"data path: {self.root} has {loose} images but no class folders, {wanted}; "
                "move them into one subfolder per class (a single one for unlabelled images)"
            )
        if not classes:
            raise ValueError(f"data path: {self.root} has neither class folders nor images, {wanted}; check the path")
        if loose:
            logger.warning("%s: ignored %d images that lie outside the class folders", self.root, loose)
        return classes

    def _find_images(self, name: str) -> list[str]:
        found = []
        top = os.path.join(self._root, name)
        # for each folder to come, those on the way to it: a link to one of them would be walked round and round
        above = {top: self._above | {_identity(top)}}
        for folder, subfolders, files in os.walk(top, onerror=_unreadable, followlinks=True):
            prefix = os.path.relpath(folder, self._root).replace(os.sep, "/")
            parents = above.pop(folder)
            subfolders[:] = [
                subfolder
                for subfolder in subfolders
                if not subfolder.startswith(".") and not self._is_loop(f"{prefix}/{subfolder}", parents)
            ]
            for path in (os.path.join(folder, subfolder) for subfolder in subfolders):
                above[path] = parents | {_identity(path)}
            found += [f"{prefix}/{file}" for file in files if _is_image(file)]
        return found

    def _is_loop(self, path: str, above: frozenset[tuple[int, int]]) -> bool:
        loop = _identity(os.path.join(self._root, path)) in above
        if loop:
            self._loops.append(path)
        return loop

    def _check_found(self) -> None:
        if not self.paths:
            raise ValueError(
                f"data path: none of the {len(self.classes)} class folders in {self.root} has an image, "
                f"wanted files ending in {', '.join(EXTENSIONS)}; check the path"
            )
        # A dataset's split folders hold class folders of their own and would be taken for classes.
        splits = {"train", "test", "val", "validation"}
        if "train" in self.classes and splits.issuperset(self.classes) and all(p.count("/") > 1 for p in self.paths):
            raise ValueError(
                f"data path: {self.root} holds the splits {', '.join(self.classes)}, wanted a folder of class folders; "
                f"pass {self.root / 'train'}"
            )
        used = set(self.labels)
        empty = [name for label, name in enumerate(self.classes) if label not in used]
        if empty:
            some = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
            logger.warning(
                "%s: %d class folders have no images (%s); they keep their class index", self.root, len(empty), some
            )


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _identity(path: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _unreadable(error: OSError) -> None:
    raise ValueError(f"data path: cannot read {error.filename} ({error.strerror}); fix its permissions") from error
