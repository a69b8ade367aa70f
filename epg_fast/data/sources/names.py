"""What names of files and folders say, the same for every reader: image, tar, split, or not part of a dataset."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from epg_fast.files import is_junk

IMAGES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".webp", ".bmp", ".gif")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
# What this package writes into a folder of images, and the labels that EDM's tools do.
_OWN = ("manifest.json", "index.npz", "dataset.json", ".lock")
_SPLITS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "unlabelled"),
}
_SPLIT = re.compile(f"({'|'.join(_SPLITS)})(?:set|data|images?|imgs?)?")

logger = logging.getLogger("epg_fast")


def is_image(name: str) -> bool:
    """Whether a file of this name is an image in a format that the decoder reads."""
    return name.lower().endswith(IMAGES)


def is_tar(name: str) -> bool:
    """Whether a file of this name is a tar, also a compressed one, which its reader refuses."""
    return name.lower().endswith(TARS)


def is_parquet(name: str) -> bool:
    """Whether a file of this name is a parquet file."""
    return name.lower().endswith(".parquet")


def split_of(name: str) -> str | None:
    """Which split a folder or file of this name (`val2017`, `Test Set`) can be: train, val, test or unlabelled."""
    return _split(name)[0]


def _split(name: str) -> tuple[str | None, tuple[str, ...]]:
    """(which split, the other words of the name); digits count as spaces."""
    words = re.findall(r"[a-z]+", name.lower())
    for i, word in enumerate(words):
        if match := _SPLIT.fullmatch(word):
            return _SPLITS[match[1]], (*words[:i], *words[i + 1 :])
    return None, ()


def splits(names: Iterable[str]) -> list[str]:
    """Those of `names` that are splits of one dataset, the training set first; none if they may be classes.

    One alone may be a class (`train` among vehicles). Of two kinds they are splits if they are called alike
    (`train2017`, `val2017`) or if most of the names are like that; `bullet_train` and `test_tube` among others are not.
    """
    names = list(names)
    found = {name: split for name in names if (split := _split(name))[0]}
    kinds = defaultdict(set)
    for kind, rest in found.values():
        kinds[rest].add(kind)
    alike = any(len(some) > 1 for some in kinds.values())
    if not alike and (len(set().union(*kinds.values())) < 2 or 2 * len(found) < len(names)):
        return []
    order = list(dict.fromkeys(_SPLITS.values()))
    return sorted(found, key=lambda name: (order.index(found[name][0]), name))


def find_splits(folders: Iterable[str]) -> tuple[str, list[str]] | None:
    """The first folder that holds `splits`, and these; those above `folders` (relative, with `/`) are implied."""
    below = defaultdict(set)
    for folder in folders:
        while folder:
            above, _, name = folder.rpartition("/")
            below[above].add(name)
            folder = above
    return next(((above, found) for above in sorted(below) if (found := splits(below[above]))), None)


class Ignored:
    """Counts what a reader leaves out, but for this package's own files, to say so in one line of each kind."""

    def __init__(self):
        self.junk: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def skips(self, name: str, is_wanted: Callable[[str], bool] = lambda name: True) -> bool:
        """Whether `name` is junk or not wanted, which is counted."""
        junk = is_junk(name)
        if not junk and is_wanted(name):
            return False
        if name not in _OWN:
            kind = ("._*" if name.startswith("._") else name) if junk else os.path.splitext(name)[1].lower() or name
            (self.junk if junk else self.others)[kind] += 1
        return True

    def report(self, where: object, wanted: str) -> None:
        """Log what was left out; the same line of a process comes once."""
        if self.junk:
            _say(f"{where}: ignored {_counts(self.junk)}: hidden, or of an operating system or a storage box")
        if self.others:
            _say(f"{where}: ignored {self.others.total()} files that are no {wanted}: {_counts(self.others)}")


def files_in(folder: Path, is_wanted: Callable[[str], bool], wanted: str) -> list[str]:
    """The sorted names in `folder` for which `is_wanted`; what is left out is counted and logged."""
    ignored = Ignored()
    found = [name for name in sorted(os.listdir(folder)) if not ignored.skips(name, is_wanted)]
    ignored.report(folder, wanted)
    return found


@functools.lru_cache(1024)
def _say(line: str) -> None:
    logger.info("%s", line)


def _counts(counter: Counter[str]) -> str:
    some = [f"{count} {name!r}"[:60] for name, count in counter.most_common(3)]
    return ", ".join(some) + (", ..." if len(counter) > 3 else "")
