"""Find the images in uncompressed tars and their classes."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from epg_fast.data.sources.names import Ignored, find_splits, is_image, is_tar
from epg_fast.data.sources.source import LABEL_KEYS, MOST_CLASSES, NO_LABELS
from epg_fast.data.sources.tar_index import TarIndex

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d": "lz4"}
# Of a .json beside an image.
_MOST_JSON = 1 << 20

logger = logging.getLogger("epg_fast")


def scan_tars(folder: Path, names: list[str]) -> TarIndex:
    """Return the index of the images in the tars `names` in `folder`, in the order of the tars and their members.

    Only headers and labels are read. See `ImageTars` for the layouts. Raises ValueError for what is none of them.
    """
    ignored, tars = Ignored(own=()), []
    where = str(folder / names[0]) if len(names) == 1 else f"the {len(names)} tars in {folder}"
    for shard, name in enumerate(names):
        with open(folder / name, "rb") as file:
            try:
                tars += _scan(file, folder / name, name, shard, 0, ignored)
            except tarfile.TarError as error:
                raise _cut(folder / name, str(error)) from None
    ignored.report(f"members of {where}", "images or labels")
    if superseded := sum(tar.superseded for tar in tars):
        logger.warning(
            "%s: left out %d members whose names come again in the same tar: the last one counts, as when unpacking",
            *(where, superseded),
        )
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


def _scan(file: BinaryIO, path: Path, name: str, shard: int, start: int, ignored: Ignored) -> list[_Tar]:
    """Return the tar in `file`, which begins at byte `start` of its shard, and the tars in it, sorted by name."""
    tar, inner, weaker, companions = _Tar(name, shard), {}, {}, set()
    for archive, member in _members(file, path):
        name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
        stem, extension = os.path.splitext(name)
        if any(ignored.skips(part) for part in name.split("/")):
            continue
        if not (is_image(name) or is_tar(name) or extension.lower() in (".cls", ".json")):
            companions.add(stem)
            ignored.add_other(name)
        elif not member.isreg() or member.issparse():
            raise ValueError(
                f"data path: {path} has {name} as a link or a sparse file, wanted the file itself; unpack it, or pack "
                "it again with tar --dereference --hard-dereference"
            )
        elif is_image(name):
            tar.superseded += tar.images.pop(name, None) is not None
            tar.images[name] = start + member.offset_data, member.size
        elif is_tar(name):
            tar.superseded += name in inner
            with archive.extractfile(member) as content:
                place = start + member.offset_data
                inner[name] = _scan(content, path / name, f"{tar.name}/{name}", shard, place, ignored)
        elif extension.lower() == ".cls":
            with archive.extractfile(member) as content:
                tar.labels[stem] = _class_index(content.read(64), path / name)
        else:
            companions.add(stem)
            with archive.extractfile(member) as content:
                weaker[stem] = _json_label(content.read(_MOST_JSON))
            if weaker[stem] is None:
                ignored.add_other(name)
    stems = {os.path.splitext(image)[0] for image in tar.images}
    tar.has_companions = not companions.isdisjoint(stems)
    tar.labels = {stem: label for stem, label in weaker.items() if label is not None} | tar.labels
    if inner and tar.images:
        raise ValueError(f"data path: {path} has both tars and images as members, wanted one kind; unpack it")
    return [tar, *(found for name in sorted(inner) for found in inner[name])]


def _members(file: BinaryIO, path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the members, but directories, of the tar `file`, whose name in errors is `path`.

    Raises ValueError or TarError for a damaged tar and one that ends early, also where `tarfile` takes it for complete.
    """
    first = file.read(tarfile.BLOCKSIZE)
    for magic, kind in _MAGIC.items():
        if first.startswith(magic):
            raise ValueError(f"data path: {path} is compressed ({kind}), wanted a plain tar; decompress it")
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
    return ValueError(
        f"data path: {path} was cut, is damaged or was joined of several tars ({reason}); get it again, or pack its "
        "content again"
    )


def _class_index(content: bytes, path: Path) -> int:
    if not re.fullmatch(rb"[0-9]{1,18}", content.strip()) or int(content) >= MOST_CLASSES:
        raise ValueError(
            f"data path: {path} holds {content[:20]!r}, wanted a class index below {MOST_CLASSES} in ASCII digits"
        )
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
            f"data path: the splits {', '.join(found)} lie {f'below {above} ' * bool(above)}in {where}, wanted the "
            f"images of one split; unpack, and pass the folder {found[0]} or a tar of it alone"
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
            f"data path: {tar.name} in {where} has {name} but no {stem}.cls (or .json with {'/'.join(LABEL_KEYS)}), "
            "wanted a label beside every image, or beside none"
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
