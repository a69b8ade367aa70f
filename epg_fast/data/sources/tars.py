"""Images inside uncompressed tars, read in any order without unpacking."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import zlib
from pathlib import Path

from epg_fast.data.sources.manifest import MANIFEST, check_complete, read_manifest
from epg_fast.data.sources.names import IMAGES, files_in, is_tar, splits
from epg_fast.data.sources.source import NO_LABELS, ImageSource, existing, warn_of_no_labels
from epg_fast.data.sources.tar_index import TarIndex, scan_tars
from epg_fast.files import file_sha256

INDEX = "index.npz"
_OPEN_TARS = 128
# Of the rules by which tars are read: indices of others are not found.
_VERSION = 4

logger = logging.getLogger("epg_fast")


class ImageTars(ImageSource):
    """The images in a folder of tars, or in a single one.

    | tars                                              | class of an image                                     |
    |---------------------------------------------------|-------------------------------------------------------|
    | shards of `prepare-data`                          | that in index.npz, which has checksums too            |
    | `key.cls` (ASCII digits) beside `key.jpg`         | that number                                           |
    | `key.json` beside `key.jpg`                       | the first class index among label, cls, class,        |
    |                                                   | class_id, class_index and target                      |
    | no labels, all images named after their tar       | name of the tar, as ImageNet's `n01440764.tar` with   |
    | (`cat.tar` with `cat_1.jpg` or `cat/1.jpg`)       | its `n01440764_18.JPEG`                               |
    | no labels, a single tar, tars with other files    | "all", with a warning: shards without labels          |
    | `key.*` beside the images, or tars whose names    |                                                       |
    | differ in their digits alone                      |                                                       |
    | no labels, any others                             | name of the tar                                       |

    Tars may lie in a tar, as in `ILSVRC2012_img_train.tar`: they are read as if they lay in a folder.
    Class names are sorted, numbers are "0", "1", ... up to the largest. Images are in the order of the sorted tars and
    of their members. Endings may be in any case. Hidden members, what systems left (`files.is_junk`) and other members
    are ignored, and counted. Of members with one name in one tar the last counts, as when unpacking.

    Attributes:
        root: the folder of the tars.
        paths: `<tar>/<member>` (`<tar>/<inner tar>/<member>`).
        labels: int64 array.
        classes: names.
        index: the `TarIndex`.

    The first use reads all headers and keeps the result below `$XDG_CACHE_HOME/epg_fast`, which serves as long as
    names, sizes and times of the tars are the same. Objects may be used by threads, forked and pickled.

    Raises ValueError for compressed, truncated or damaged tars, images that are links, missing labels, splits side by
    side without labels, a mixture of layouts, and shards of `prepare-data` that are not complete or not as their
    manifest.json says, or have lost it.
    """

    def __init__(self, path: str | os.PathLike):
        path = existing(path)
        single = not path.is_dir()
        self.root, manifest = (path.parent, None) if single else (path, read_manifest(path))
        tars = [path.name] if single else _find_tars(path)
        if manifest is not None:
            check_shards(self.root, manifest)
            self.index = TarIndex.load(self.root / INDEX)
        elif not single and (self.root / INDEX).exists():
            raise ValueError(
                f"{path} has the {INDEX} of prepare-data but not its {MANIFEST}; restore it, prepare the images again "
                f"in a new outdir, or delete {INDEX} to read the tars as those of any program"
            )
        else:
            self.index = _indexed(self.root, tars)
        if not len(self.index):
            raise ValueError(f"no images in {path}, wanted tars with members ending in {', '.join(IMAGES)}")
        self.paths, self.labels, self.classes = self.index.paths, self.index.label, self.index.classes
        if self.classes == NO_LABELS and manifest is None:
            warn_of_no_labels(path)

    def read(self, i: int) -> bytes:
        """Return the encoded image `i`. Raises OSError if it cannot be read or differs from its checksum."""
        index = self.index
        size, offset = int(index.size[i]), int(index.offset[i])
        # the local reference keeps the file open even if another thread pushes it out of the cache
        file = self._file(os.path.join(self.root, index.tars[index.shard[i]]))
        content = os.pread(file.fileno(), size, offset)
        # network file systems return less if they like
        while len(content) < size and (more := os.pread(file.fileno(), size - len(content), offset + len(content))):
            content += more
        if len(content) < size:
            raise OSError(f"{self.root} ends inside of {self.paths[i]}: it was changed since it was indexed")
        if index.crc32 is not None and zlib.crc32(content) != index.crc32[i]:
            raise OSError(f"checksum of {self.paths[i]} in {self.root} differs from the one it was written with")
        return content

    @functools.cached_property
    def _file(self):
        return functools.lru_cache(_OPEN_TARS)(_File)


class _File(io.FileIO):
    """A file that is closed when nobody refers to it any more."""

    def __del__(self):
        self.close()


def check_shards(folder: Path, manifest: dict) -> None:
    """Raise ValueError unless `folder` holds the shards that `prepare-data` finished, by their sizes, and its index."""
    check_complete(folder, manifest)
    if manifest["layout"] != "shards":
        raise ValueError(f"{folder} has tars, but its {MANIFEST} says layout {manifest['layout']!r}")
    wanted = {shard["name"]: shard["bytes"] for shard in manifest["shards"]}
    found = {name: os.stat(folder / name).st_size for name in os.listdir(folder) if is_tar(name)}
    again = "run prepare-data again, it makes only what is missing"
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            bytes_found = f"{found.get(name, 'no')} bytes, wanted {wanted.get(name, 'no')} by {MANIFEST}"
            raise ValueError(f"{folder / name} has {bytes_found}; delete it and {again}")
    index = folder / INDEX
    if not index.exists() or file_sha256(index) != manifest["index_sha256"]:
        raise ValueError(
            f"{index} is missing or not the one that {MANIFEST} names; {again}, or delete it and {MANIFEST} to read "
            "the tars as those of any program"
        )


def _find_tars(folder: Path) -> list[str]:
    """Return the sorted names of the tars in `folder`. Raises ValueError for training and test tars side by side."""
    tars = files_in(folder, is_tar, "tars")
    if splits(name.split(".")[0] for name in tars):
        raise ValueError(f"{folder} has the tars of training and of other images; pass one tar, or move them apart")
    return tars


def _indexed(folder: Path, tars: list[str]) -> TarIndex:
    """Return the index of `tars`, which is made once and kept in the user's cache."""
    status = {name: os.stat(folder / name) for name in tars}
    key = _VERSION, os.fspath(folder.resolve()), [(name, s.st_size, s.st_mtime_ns) for name, s in status.items()]
    name = f"tars-{hashlib.sha256(repr(key).encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npz"
    # a container may run with a user id that has no home: then "~" stays as it is
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(cache, "epg_fast", name)
    try:
        return TarIndex.load(path)
    except (OSError, ValueError):
        logger.info("indexing the tars in %s, once", folder)
    index = scan_tars(folder, tars)
    try:
        if cache.startswith("~"):
            raise OSError("no home folder, and XDG_CACHE_HOME is not set")
        index.save(path)
    except OSError as error:
        logger.warning("the index of the tars cannot be stored (%s); the next run reads all headers again", error)
    return index
