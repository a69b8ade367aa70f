"""The table of all images in a set of uncompressed tars, its file, and how it is made: by the headers and labels."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from epg_fast.data.sources.names import Ignored, find_splits, is_image, is_tar
from epg_fast.data.sources.source import LABEL_KEYS, MOST_CLASSES, NO_LABELS
from epg_fast.files import open_atomically

_TEXTS = ("tars", "classes", "paths")
_COLUMNS = ("shard", "offset", "size", "label", "crc32")
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d": "lz4"}
# Of a .json beside an image.
_MOST_JSON = 1 << 20

logger = logging.getLogger("epg_fast")


@dataclass
class TarIndex:
    """Where the images lie: `paths` and the columns have one value per image.

    Attributes:
        tars: file names of the tars.
        classes: class names.
        paths: `<tar>/<member>`, or `<tar>/<inner tar>/<member>`.
        shard: position in `tars`, int32.
        offset, size: of the content, in bytes from the tar's beginning, int64.
        label: class index, int64.
        crc32: of the content, uint32, if `prepare-data` wrote the tars; else None.
    """

    tars: list[str]
    classes: list[str]
    paths: list[str]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    crc32: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def save(self, path: Path) -> None:
        """Write the index to `path`, at once. Raises OSError."""
        # no name holds a zero byte
        texts = {name: "\0".join(getattr(self, name)).encode("utf-8", "surrogateescape") for name in _TEXTS}
        columns = {name: getattr(self, name) for name in _COLUMNS if getattr(self, name) is not None}
        with open_atomically(path) as file:
            np.savez(file, **{name: np.frombuffer(text, np.uint8) for name, text in texts.items()}, **columns)

    @classmethod
    def load(cls, path: Path) -> TarIndex:
        """Return the index in `path`. Raises OSError if it cannot be read, ValueError if it is damaged."""
        try:
            # the sums in the zip archive are checked on the way
            with np.load(path, allow_pickle=False) as file:
                columns = dict(file)
            texts = {name: columns.pop(name).tobytes().decode("utf-8", "surrogateescape") for name in _TEXTS}
            return cls(**{name: text.split("\0") if text else [] for name, text in texts.items()}, **columns)
        except (EOFError, KeyError, TypeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged ({error})") from None


def scan_tars(folder: Path, names: list[str]) -> TarIndex:
    """Return the index of the images in the tars `names` in `folder`, in the order of the tars and their members.

    Only headers and labels are read. See `ImageTars` for the layouts. Raises ValueError for what is none of them.
    """
    ignored, tars = Ignored(), []
    where = str(folder / names[0]) if len(names) == 1 else f"the {len(names)} tars in {folder}"
    for shard, name in enumerate(names):
        with open(folder / name, "rb") as file:
            try:
                tars += _scan(file, folder / name, name, shard, 0, ignored)
            except tarfile.TarError as error:
                raise _cut(folder / name, str(error)) from None
    ignored.report(f"members of {where}", "images or labels")
    if superseded := sum(tar.superseded for tar in tars):
        message = (
            "%s: left out %d members whose names come again in the same tar: the last one counts, as when unpacking"
        )
        logger.warning(message, where, superseded)
    tars = [tar for tar in tars if tar.images]
    classes, labels = _label(where, tars) if tars else ([], [])
    places = np.array([place for tar in tars for place in tar.images.values()], np.int64).reshape(-1, 2)
    return TarIndex(
        tars=list(names),
        classes=classes,
        paths=[f"{tar.name}/{name}" for tar in tars for name in tar.images],
        shard=np.repeat(np.array([tar.shard for tar in tars], np.int32), [len(tar.images) for tar in tars]),
        offset=places[:, 0],
        size=places[:, 1],
        label=np.array(labels, np.int64),
    )


@dataclass
class _Tar:
    """What one tar holds, which may be a member of another.

    Attributes:
        name: its path relative to the folder.
        shard: position of the file that it is or lies in.
        images: name -> offset and size of the content in that file; of members with one name the last.
        labels: name without its ending -> class index, from the .cls or .json beside an image.
        has_companions: whether an image has another file of its name beside it.
        superseded: how many members have a later one of the same name.
    """

    name: str
    shard: int
    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    has_companions: bool = False
    superseded: int = 0

    @property
    def stem(self) -> str:
        return os.path.splitext(os.path.basename(self.name))[0]


def _is_member(name: str) -> bool:
    return is_image(name) or is_tar(name) or name.lower().endswith((".cls", ".json"))


def _scan(file: BinaryIO, path: Path, name: str, shard: int, start: int, ignored: Ignored) -> list[_Tar]:
    """Return the tar in `file`, which begins at byte `start` of its shard, and the tars in it, sorted by name."""
    tar, inner, weaker, companions = _Tar(name, shard), {}, {}, set()
    for archive, member in _members(file, path):
        name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
        stem = os.path.splitext(name)[0]
        if any(ignored.skips(part) for part in name.split("/")):
            continue
        if ignored.skips(name, _is_member):
            companions.add(stem)
            continue
        if not member.isreg() or member.issparse():
            raise ValueError(
                f"{path} has {name} as a link or a sparse file, wanted the file itself; unpack it, or pack it again "
                "with tar --dereference --hard-dereference"
            )
        place = start + member.offset_data
        if is_image(name):
            tar.superseded += tar.images.pop(name, None) is not None
            tar.images[name] = place, member.size
            continue
        with archive.extractfile(member) as content:
            if is_tar(name):
                tar.superseded += name in inner
                inner[name] = _scan(content, path / name, f"{tar.name}/{name}", shard, place, ignored)
            elif name.lower().endswith(".cls"):
                tar.labels[stem] = _class_index(content.read(64), path / name)
            else:
                companions.add(stem)
                weaker[stem] = _json_label(content.read(_MOST_JSON))
                if weaker[stem] is None:
                    ignored.skips(name, is_image)
    tar.has_companions = any(os.path.splitext(image)[0] in companions for image in tar.images)
    tar.labels = {stem: label for stem, label in weaker.items() if label is not None} | tar.labels
    if inner and tar.images:
        raise ValueError(f"{path} has both tars and images as members, wanted one kind; unpack it")
    return [tar, *(found for name in sorted(inner) for found in inner[name])]


def _members(file: BinaryIO, path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the members, but directories, of the tar `file`, whose name in errors is `path`.

    Raises ValueError or TarError for a damaged tar and one that ends early, also where `tarfile` takes it for complete.
    """
    first = file.read(tarfile.BLOCKSIZE)
    for magic, kind in _MAGIC.items():
        if first.startswith(magic):
            raise ValueError(f"{path} is compressed ({kind}), wanted a plain tar; decompress it")
    end = 0
    if any(first):  # with none, Python 3.10's tarfile fails
        file.seek(0)
        with tarfile.TarFile(fileobj=file) as archive:
            while (member := archive.next()) is not None:
                # tarfile would keep them all
                archive.members.clear()
                if not member.isdir():
                    yield archive, member
            end = archive.offset
    # where tarfile stops, zeros follow up to the end of the file
    file.seek(end)
    rest = iter(functools.partial(file.read, 1 << 20), b"")
    if any(block.strip(b"\0") for block in rest) or file.tell() < end + tarfile.BLOCKSIZE:
        raise _cut(path, f"it has no mark of a tar's end at byte {end}, or goes on behind it")


def _cut(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} was cut, is damaged or was joined of several tars ({reason}); get it or pack it again")


def _class_index(content: bytes, path: Path) -> int:
    if not re.fullmatch(rb"[0-9]{1,18}", content.strip()) or int(content) >= MOST_CLASSES:
        wanted = f"wanted a class index below {MOST_CLASSES} in ASCII digits"
        raise ValueError(f"{path} holds {content[:20]!r}, {wanted}")
    return int(content)


def _json_label(content: bytes) -> int | None:
    """The first of the known entries that is a class index; None without: it may be a caption's or be damaged."""
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError):
        return None
    for key in LABEL_KEYS if isinstance(entries, dict) else ():
        value = entries.get(key)
        # pandas writes a column with gaps as floats
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, (int, str)) and re.fullmatch("[0-9]{1,6}", str(value)):
            return int(value)
    return None


def _label(where: str, tars: list[_Tar]) -> tuple[list[str], list[int]]:
    """Return the class names and each image's label."""
    if any(tar.labels for tar in tars):
        labels = [_beside(where, tar, name) for tar in tars for name in tar.images]
        return [str(label) for label in range(max(labels) + 1)], labels
    if held := find_splits({name.rpartition("/")[0] for tar in tars for name in tar.images}):
        above, found = held
        raise ValueError(
            f"the splits {', '.join(found)} lie {f'below {above} ' * bool(above)}in {where}, wanted the images of one "
            f"split; unpack, and pass the folder {found[0]} or a tar of it alone"
        )
    if not _are_classes(tars):
        return list(NO_LABELS), [0] * sum(len(tar.images) for tar in tars)
    numbers = {stem: label for label, stem in enumerate(sorted({tar.stem for tar in tars}))}
    logger.info("%s: no image has a label beside it: each of the %d tars is a class", where, len(tars))
    return list(numbers), [numbers[tar.stem] for tar in tars for _ in tar.images]


def _beside(where: str, tar: _Tar, name: str) -> int:
    stem = os.path.splitext(name)[0]
    if stem not in tar.labels:
        raise ValueError(
            f"{tar.name} in {where} has {name} but no {stem}.cls (or .json with {'/'.join(LABEL_KEYS)}), wanted a "
            "label beside every image, or beside none"
        )
    return tar.labels[stem]


def _are_classes(tars: list[_Tar]) -> bool:
    """Whether tars without labels are classes; else they are shards. See `ImageTars`."""
    if len(tars) == 1:
        return False
    if all(_is_named_after(tar.stem, name) for tar in tars for name in tar.images):
        return True
    shapes = {re.sub("[0-9]+", "0", tar.stem) for tar in tars}
    return len(shapes) == len(tars) and not any(tar.has_companions for tar in tars)


def _is_named_after(stem: str, name: str) -> bool:
    """Whether a member's name is that of its tar and something more: n01_18.JPEG or n01/18.JPEG in n01.tar."""
    end, following = stem[-1:], name[len(stem) : len(stem) + 1]
    cut = (end.isdigit() and following.isdigit()) or (end.isalpha() and following.isalpha())
    return name.startswith(stem) and not cut
