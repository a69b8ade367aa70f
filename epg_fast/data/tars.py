"""Images inside uncompressed tars, read in any order without unpacking."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import re
import resource
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from epg_fast.data.manifest import (
    MANIFEST,
    UnreadableManifest,
    check_complete,
    check_counts,
    lost_manifest,
    read_manifest,
)
from epg_fast.data.names import Ignored, is_compressed_tar, is_tar, splits
from epg_fast.data.source import NO_LABELS, ImageSource
from epg_fast.data.tar_index import INDEX, ForeignIndex, TarIndex, has_checksums
from epg_fast.data.tar_scan import scan_tars
from epg_fast.files import is_junk

_OPEN_TARS = 128
_AGAIN = "run prepare-data again, it makes only what is missing"

logger = logging.getLogger("epg_fast")


class ImageTars(ImageSource):
    """The images in a folder of tars, or in a single one, which may have these layouts:

    - WebDataset shards: a member `key.jpg` (or of another ending in `names.IMAGES`) has a label beside it in the same
      tar: `key.cls`, its class index in ASCII digits, or `key.json`, a mapping with a class index as label, cls, class,
      class_id, class_index or target (the first that is one). Classes are those of `prepare-data`'s manifest.json, else
      "0", "1", ... up to the largest label. Without labels they are one class "all" (warned about): a single tar, tars
      with other files `key.*` beside the images, and tars whose names differ in their digits alone.
    - A tar per class without labels, as ImageNet's `n01440764.tar` with its `n01440764_18.JPEG`: the class is the tar's
      name. Tars are that if all images are named after their tar, or if they are no shards by the rules above.
    - A tar of such tars, as `ILSVRC2012_img_train.tar`; the only tar of its folder, or passed itself.

    Class names are sorted; images are in the order of the sorted tars and of their members, links behind the others.
    Endings may be in any case. Hidden members, what systems left (`names.is_junk`) and other members are ignored, and
    counted. Links are followed within their tar; those that lead to no file there are left out with a warning. Of
    members with one name in one tar the last counts, as when unpacking.

    Attributes:
        root: the folder of the tars.
        paths: `<tar>/<member>` (`<tar>/<inner tar>/<member>`).
        labels: int64 array.
        classes: names.
        index: the `TarIndex`.

    The first use reads all headers and keeps the result as `index.npz` in the folder (`<tar>.index.npz` for a single
    tar; below `$XDG_CACHE_HOME/epg_fast` if it cannot be written there), which serves as long as names, sizes and
    times of the tars are the same. Objects may be used by threads, forked and pickled.

    Raises ValueError for compressed, truncated or damaged tars, missing labels, splits side by side without labels, a
    mixture of layouts, and a folder of `prepare-data` that is not complete or not as its manifest.json says, or has
    lost it. A folder is that of `prepare-data` if manifest.json says so, or index.npz has checksums; a manifest.json
    that cannot be read is taken for that of `prepare-data` beside tars named shard-000000.tar, ..., and else ignored
    with a warning.
    """

    def __init__(self, path: str | os.PathLike):
        self.root, tars = find_tars(Path(path))
        single = not Path(path).is_dir()
        manifest = None if single else _checked_manifest(self.root, tars)
        if not single:
            _report_ignored(self.root, tars)
        name = f"{tars[0]}.{INDEX}" if single else INDEX
        self.index = _index(self.root, tars, name, prepared=manifest is not None)
        self.labels = self.index.label
        self.classes = self.index.classes
        if manifest is not None:
            check_index(self.root, manifest, self.index)
            self.classes = list(manifest["classes"])
        elif self.classes == NO_LABELS:
            logger.warning("%s: no image has a label: one class, '%s'", path, *NO_LABELS)
        self.paths = _Paths(self.index)
        self._open_files()

    def read(self, i: int) -> bytes:
        """Return the encoded image `i`. Raises OSError if it cannot be read or differs from its checksum."""
        index = self.index
        name = index.tars[index.shard[i]]
        size = int(index.size[i])
        # the local reference keeps the file open even if another thread pushes it out of the cache
        file = self._file(os.path.join(self.root, name))
        content = _pread(file.descriptor, size, int(index.offset[i]))
        if len(content) < size:
            raise OSError(f"{self.root / name} ends inside of {self.paths[i]}: it was changed since it was indexed")
        if index.crc32 is not None and zlib.crc32(content) != index.crc32[i]:
            raise OSError(f"checksum of {self.paths[i]} in {self.root} differs from the one it was written with")
        return content

    def _open_files(self) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # most descriptors are for others; no limit is -1
        self._file = functools.lru_cache(min(_OPEN_TARS, limit // 4) if limit > 0 else _OPEN_TARS)(_File)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open_files()


class _File:
    """A file that is closed when nobody refers to it any more."""

    descriptor = None

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close=os.close):
        if self.descriptor is not None:
            close(self.descriptor)


class _Paths(Sequence[str]):
    def __init__(self, index: TarIndex):
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> str:
        return f"{self._index.tars[self._index.shard[i]]}/{self._index.names[i]}"

    def __iter__(self) -> Iterator[str]:
        tars = self._index.tars
        for shard, name in zip(self._index.shard.tolist(), self._index.names, strict=True):
            yield f"{tars[shard]}/{name}"


def find_tars(path: Path) -> tuple[Path, list[str]]:
    """Return the folder and the sorted names of the tars that `path`, one tar or a folder of tars, means.

    Raises ValueError for compressed tars, for none, and for training and test tars side by side.
    """
    if not path.exists():
        raise ValueError(f"data path: {path} does not exist, wanted a tar or a folder of tars; check the spelling")
    names = [path.name] if not path.is_dir() else sorted(name for name in os.listdir(path) if not is_junk(name))
    compressed = [name for name in names if is_compressed_tar(name)]
    if compressed:
        where = path / compressed[0] if path.is_dir() else path
        raise ValueError(f"data path: {where} is compressed, wanted plain tars; decompress it")
    tars = [name for name in names if is_tar(name)]
    if not tars:
        raise ValueError(f"data path: {path} is or has no tar, wanted a file ending in .tar or a folder of such files")
    if splits(os.path.splitext(name)[0] for name in tars):
        raise ValueError(
            f"data path: {path} has the tars of training and of other images; pass one tar, or move them apart"
        )
    return (path, tars) if path.is_dir() else (path.parent, tars)


def check_shards(folder: Path, tars: list[str], manifest: dict) -> None:
    """Raise ValueError unless `tars` are the shards that the manifest names, with the same sizes."""
    listed = manifest.get("shards")
    if not isinstance(listed, list) or not all(_is_shard(shard) for shard in listed):
        found = "no shards" if listed is None else f"shards {listed!r:.40}"
        raise ValueError(
            f"data path: {folder / MANIFEST} has {found}, wanted a list with name, bytes and sha256 of each; {_AGAIN}"
        )
    shards = {shard["name"]: shard["bytes"] for shard in listed}
    for name, size in shards.items():
        if name not in tars:
            raise ValueError(f"data path: {folder} lacks {name}, which its manifest.json names; {_AGAIN}")
        found = os.stat(folder / name).st_size
        if found != size:
            raise ValueError(
                f"data path: {folder / name} has {found} bytes, wanted {size} by manifest.json; delete it and {_AGAIN}"
            )
    for name in tars:
        if name not in shards:
            raise ValueError(f"data path: {folder} has {name}, which its manifest.json does not name; move it away")


def check_index(folder: Path, manifest: dict, index: TarIndex) -> None:
    """Raise ValueError unless `index` has the classes and the numbers of images that the manifest names."""
    classes, labels = manifest["classes"], index.label
    # without checksums the index comes from the .cls, which hold no names
    if index.crc32 is not None and index.classes != classes:
        pairs = itertools.zip_longest(index.classes, classes)
        i, (found, wanted) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            f"data path: {folder}: class {i} is {found!r} by {INDEX}, but {wanted!r} by {MANIFEST}; {_AGAIN}"
        )
    if labels.max(initial=-1) >= len(classes):
        raise ValueError(
            f"data path: {folder} has the label {labels.max()}, wanted less than the {len(classes)} classes of its "
            f"{MANIFEST}; {_AGAIN}"
        )
    check_counts(folder, manifest, classes, labels)


def _report_ignored(folder: Path, tars: list[str]) -> None:
    ignored, known = Ignored(), {*tars, *(f"{tar}.{INDEX}" for tar in tars)}
    for name in sorted(os.listdir(folder)):
        if name not in known and not ignored.skips(name):
            ignored.add_other(name)
    ignored.report(folder, "tars")


def _checked_manifest(folder: Path, tars: list[str]) -> dict | None:
    """Return the manifest of `prepare-data`, None if `tars` are not its own.

    Raises ValueError if they are and it does not say that they are complete.
    """
    prepared = has_checksums(folder / INDEX)
    try:
        manifest = read_manifest(folder)
    except UnreadableManifest as error:
        if prepared or any(re.fullmatch(r"shard-[0-9]{6,}\.tar", name) for name in tars):
            raise
        logger.warning("%s; ignored, as the tars are not named as those of prepare-data", error)
        return None
    if manifest is None:
        if prepared:
            raise lost_manifest(folder, "is of another program" if (folder / MANIFEST).exists() else "is missing")
        return None
    layout = manifest.get("layout")
    if layout != "shards":
        raise lost_manifest(folder, f"says layout {layout!r}, wanted 'shards'")
    check_complete(folder, manifest)
    check_shards(folder, tars, manifest)
    return manifest


def _is_shard(shard) -> bool:
    return isinstance(shard, dict) and all(
        type(shard.get(key)) is kind for key, kind in (("name", str), ("bytes", int), ("sha256", str))
    )


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    content = os.pread(descriptor, size, offset)
    if len(content) == size:
        return content
    # Linux returns at most 2 GiB at once, and network file systems less if they like
    parts, missing = [content], size - len(content)
    while missing and parts[-1]:
        parts.append(os.pread(descriptor, missing, offset + size - missing))
        missing -= len(parts[-1])
    return b"".join(parts)


def _index(folder: Path, tars: list[str], name: str, *, prepared: bool) -> TarIndex:
    """Return the stored index of `tars` if it fits them, else scan them and store it."""
    beside, cached = folder / name, _cache_files(folder / name)
    # what prepare-data or somebody else stored beside the tars is never written over
    keep = prepared
    for path in (beside, *cached):
        try:
            index = TarIndex.load(path)
        except FileNotFoundError:
            continue
        except ForeignIndex:
            keep = True
            continue
        except ValueError as error:
            logger.warning("%s; the tars are indexed again", error)
            continue
        if _fits(index, folder, tars):
            break
    else:
        logger.info("indexing the tars in %s, once", folder)
        index = scan_tars(folder, tars)
        _store(index, cached if keep else [beside, *cached])
    if prepared and index.crc32 is None:
        logger.warning("%s: %s is lost: images are not checked; run prepare-data again", folder, INDEX)
    return index


def _fits(index: TarIndex, folder: Path, tars: list[str]) -> bool:
    if index.tars != tars:
        return False
    status = [os.stat(folder / name) for name in tars]
    # shards of prepare-data may be copied; their images have checksums
    same_times = index.crc32 is not None or index.tar_mtime.tolist() == [s.st_mtime_ns for s in status]
    return same_times and index.tar_bytes.tolist() == [s.st_size for s in status]


def _store(index: TarIndex, paths: list[Path]) -> None:
    reason = "no home folder, and XDG_CACHE_HOME is not set"
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            index.save(path)
            return
        except OSError as error:
            reason = error
    logger.warning("the index of the tars cannot be stored (%s); the next run reads all headers again", reason)


def _cache_files(path: Path) -> list[Path]:
    """Return the file that stands for `path` in the user's cache, if the user has one."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        # a container may run with a user id that has no home
        return []
    return [cache / "epg_fast" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.npz"]
