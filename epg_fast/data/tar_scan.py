"""Find the images in uncompressed tars and their classes."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from epg_fast.data.names import IMAGES, Ignored, find_splits, is_image, is_tar
from epg_fast.data.source import LABEL_KEYS, MOST_CLASSES, NO_LABELS, printable
from epg_fast.data.tar_index import Names, TarIndex
from epg_fast.files import is_junk

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512
# Of a .json beside an image.
_MOST_JSON = 1 << 20
# On the way to one file, as Linux has it.
_MOST_LINKS = 40

logger = logging.getLogger("epg_fast")


def scan_tars(folder: Path, tars: list[str]) -> TarIndex:
    """Return the index of the images in `tars` (file names in `folder`), in the order of the tars and their members.

    Only headers and labels are read. See `ImageTars` for the layouts. Raises ValueError for what is none of them.
    """
    status = [os.stat(folder / name) for name in tars]
    ignored = Ignored(own=())
    scans = [_scan(folder / name, ignored) for name in tars]
    ignored.report(f"members of {_some(folder, tars)}", "images or labels")
    superseded = sum(scan.superseded for scan in scans)
    if superseded:
        logger.warning(
            "%s: left out %d members whose names come again in the same tar: the last one counts, as when unpacking",
            folder,
            superseded,
        )
    lost = [printable(link) for scan in scans for link in scan.lost]
    if lost:
        logger.warning(
            "%s: left out %d links that lead to no file in the same tar: %s%s",
            folder,
            len(lost),
            ", ".join(lost[:3]),
            ", ..." if len(lost) > 3 else "",
        )
    if not any(scan.names for scan in scans):
        raise ValueError(f"data path: no images in {_some(folder, tars)}, wanted members ending in {', '.join(IMAGES)}")
    classes, labels = _classes(folder, tars, scans)
    return TarIndex(
        tars=list(tars),
        tar_bytes=np.array([s.st_size for s in status], np.int64),
        tar_mtime=np.array([s.st_mtime_ns for s in status], np.int64),
        classes=classes,
        names=Names([name for scan in scans for name in scan.names]),
        shard=np.repeat(np.arange(len(tars), dtype=np.int32), [len(scan.names) for scan in scans]),
        offset=np.concatenate([np.array(scan.offsets, np.int64) for scan in scans]),
        size=np.concatenate([np.array(scan.sizes, np.int64) for scan in scans]),
        label=labels,
    )


def walk_tar(file, path: Path, start: int, stop: int, lost: list[str] | None = None) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the regular members of the tar at bytes `start` to `stop` of `file`.

    `path` is its name in errors. Directories are left out, `./` in names too. Links come behind the others, with the
    content that they lead to; those that lead to no member of this tar are added to `lost` in words.
    Raises ValueError for a damaged tar and one that ends early, also where `tarfile` would take it for complete.
    """
    if stop == start:
        raise ValueError(f"data path: {path} is empty, wanted a tar; get it again")
    file.seek(start)
    if not any(file.read(_BLOCK)):  # no members, at which Python 3.10's tarfile fails
        _check_end(file, path, start, start, stop)
        return
    file.seek(start)
    has_links = False
    try:
        with tarfile.TarFile(fileobj=file, mode="r") as tar:
            while (member := tar.next()) is not None:
                # tarfile would keep them all
                tar.members.clear()
                if member.isreg() and member.offset_data + member.size > stop:
                    raise ValueError(
                        f"data path: {path} is truncated: it ends after {stop - start} bytes inside of {member.name}; "
                        "get it again"
                    )
                name = _plain_name(member.name)
                has_links = has_links or member.islnk() or member.issym()
                if not member.isreg():
                    continue
                if member.issparse():
                    raise ValueError(
                        f"data path: {path} has the sparse member {member.name}; write it without --sparse"
                    )
                yield name, member.offset_data, member.size
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(_damaged(path, file, start, stop, str(error))) from None
    _check_end(file, path, start, end, stop)
    if has_links:
        yield from _follow_links(file, path, start, [] if lost is None else lost)


def _follow_links(file, path: Path, start: int, lost: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the links in a tar, which lead where they would once it is unpacked."""
    # the place of a file, or where a symbolic link points
    members: dict[str, tuple[int, int] | str] = {}
    links: dict[str, str] = {}
    folders = {""}
    file.seek(start)
    with tarfile.TarFile(fileobj=file, mode="r") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()
            name = _plain_name(member.name)
            # of members with one name the last counts; a hard link is what its target was at this point
            links.pop(name, None)
            found = (member.offset_data, member.size) if member.isreg() else None
            if member.islnk() or member.issym():
                links[name] = member.linkname
                found = member.linkname if member.issym() else members.get(_plain_name(member.linkname))
            members.pop(name, None)
            if found is not None:
                members[name] = found
            folder = name if member.isdir() else posixpath.dirname(name)
            while folder not in folders:
                folders.add(folder)
                folder = posixpath.dirname(folder)
    for name, target in links.items():
        place = _follow(name, members, folders)
        if not isinstance(place, str):
            yield name, *place
        elif not any(map(is_junk, name.split("/"))):
            lost.append(f"{path.name}/{name} -> {target} ({place})")


def _follow(name: str, members: dict[str, tuple[int, int] | str], folders: set[str]) -> tuple[int, int] | str:
    """Return the place of the file that `name` leads to, or why there is none."""
    for _ in range(_MOST_LINKS):
        found = members.get(name)
        if isinstance(found, tuple):
            return found
        parts = name.split("/")
        # the member itself or a folder on the way to it
        ends = (i for i in range(1, len(parts) + 1) if isinstance(members.get("/".join(parts[:i])), str))
        end = next(ends, None)
        if end is None:
            return "a folder" if name in folders else "nothing"
        link = "/".join(parts[:end])
        name = posixpath.normpath(posixpath.join(posixpath.dirname(link), members[link], *parts[end:]))
        if name.startswith(("/", "../")) or name == "..":
            return "outside of the tar"
        name = _plain_name(name)
    return "a circle"


def _plain_name(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _check_end(file, path: Path, start: int, end: int, stop: int) -> None:
    """A tar ends with blocks of zeros; without them it was cut between two members, or a header is damaged."""
    file.seek(end)
    block = file.read(_BLOCK)
    if end + _BLOCK > stop or len(block) < _BLOCK:
        raise ValueError(
            f"data path: {path} is truncated: it ends after {stop - start} bytes without the mark of a tar's end; "
            "get it again"
        )
    if any(block):
        raise ValueError(_damaged(path, file, start, stop, f"no header at byte {end - start}"))
    position = end + _BLOCK
    while position < stop:
        rest = file.read(min(1 << 20, stop - position))
        if not rest or any(rest.strip(b"\0")):
            raise ValueError(
                f"data path: {path} goes on behind its end at byte {end - start}: several tars were joined; "
                "split them, or pack their content again"
            )
        position += len(rest)


def _damaged(path: Path, file, start: int, stop: int, reason: str) -> str:
    file.seek(start)
    first = file.read(8)
    for magic, name in _MAGIC.items():
        if first.startswith(magic):
            return f"data path: {path} is compressed ({name}), wanted a plain tar; decompress it"
    if any(text in reason for text in ("unexpected end", "empty header", "truncated header")):
        return f"data path: {path} is truncated: it ends after {stop - start} bytes inside of a member; get it again"
    return f"data path: {path} is no tar or is damaged ({reason}); get it again"


@dataclass
class _Scan:
    """What one tar holds.

    Attributes:
        names, offsets, sizes: of its images.
        labels: from the .cls or .json beside each image, -1 where it has none; None if the tar has none.
        inner: the class of each image, in a tar of class tars.
        has_companions: whether an image has another file of its name beside it.
        superseded: how many images and inner tars have a later member of the same name.
        lost: links that lead to no member of their tar.
    """

    names: list[str] = field(default_factory=list)
    offsets: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    labels: np.ndarray | None = None
    inner: list[str] = field(default_factory=list)
    has_companions: bool = False
    superseded: int = 0
    lost: list[str] = field(default_factory=list)

    def add(self, name: str, offset: int, size: int) -> None:
        self.names.append(name)
        self.offsets.append(offset)
        self.sizes.append(size)


def _scan(path: Path, ignored: Ignored) -> _Scan:
    scan, inner, labels, weaker, companions = _Scan(), {}, {}, {}, set()
    with open(path, "rb") as file:
        for name, offset, size in walk_tar(file, path, 0, os.fstat(file.fileno()).st_size, scan.lost):
            stem, extension = os.path.splitext(name)
            if any(ignored.skips(part) for part in name.split("/")):
                continue
            if is_image(name):
                scan.add(name, offset, size)
            elif extension.lower() == ".cls":
                labels[stem] = _label(os.pread(file.fileno(), min(size, 64), offset), path / name)
            elif is_tar(name):
                scan.superseded += name in inner
                inner[name] = offset, offset + size
            else:
                companions.add(stem)
                if extension.lower() == ".json":
                    weaker[stem] = _json_label(os.pread(file.fileno(), min(size, _MOST_JSON), offset))
                if weaker.get(stem) is None:
                    ignored.add_other(name)
        if inner and (scan.names or labels):
            raise ValueError(
                f"data path: {path} has both tars and images or labels as members, wanted one tar of images per class, "
                "or images; unpack it"
            )
        # sorted as the classes of a folder, whatever the order of packing
        for name, (start, stop) in sorted(inner.items()):
            before = len(scan.names)
            for member, offset, size in walk_tar(file, path / name, start, stop, scan.lost):
                if any(ignored.skips(part) for part in member.split("/")):
                    continue
                if is_tar(member) or member.lower().endswith(".cls"):
                    raise ValueError(f"data path: {path / name} has the member {member}, wanted images; unpack {path}")
                if is_image(member):
                    scan.add(f"{name}/{member}", offset, size)
                else:
                    ignored.add_other(member)
            scan.inner += [os.path.splitext(name)[0]] * (len(scan.names) - before)
            if len(scan.names) == before:
                raise ValueError(f"data path: {path / name} has no images; remove it or get it again")
    _drop_superseded(scan)
    stems = [os.path.splitext(name)[0] for name in scan.names]
    scan.has_companions = not companions.isdisjoint(stems)
    labels = {stem: label for stem, label in weaker.items() if label is not None} | labels
    if labels:
        scan.labels = np.array([labels.get(stem, -1) for stem in stems], np.int64)
    return scan


def _drop_superseded(scan: _Scan) -> None:
    """Leave the last of the images with one name: `tar --append` adds new versions behind the old."""
    last = {name: i for i, name in enumerate(scan.names)}
    count = len(scan.names) - len(last)
    if not count:
        return
    kept = sorted(last.values())
    scan.superseded += count
    scan.names = [scan.names[i] for i in kept]
    scan.offsets = array("q", [scan.offsets[i] for i in kept])
    scan.sizes = array("q", [scan.sizes[i] for i in kept])
    scan.inner = [scan.inner[i] for i in kept] if scan.inner else []


def _label(content: bytes, path: Path) -> int:
    text = content.strip()
    if not re.fullmatch(rb"[0-9]{1,18}", text):
        raise ValueError(f"data path: {path} holds {content[:20]!r}, wanted a class index in ASCII digits")
    if int(text) >= MOST_CLASSES:
        raise ValueError(f"data path: {path} holds {int(text)}, wanted a class index below {MOST_CLASSES}")
    return int(text)


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


def _classes(folder: Path, tars: list[str], scans: list[_Scan]) -> tuple[list[str], np.ndarray]:
    """Return the class names and each image's label."""
    labelled = any(scan.labels is not None for scan in scans)
    if not labelled and (held := find_splits({name.rpartition("/")[0] for scan in scans for name in scan.names})):
        above, found = held
        raise ValueError(
            f"data path: the splits {', '.join(found)} lie {f'below {above} ' * bool(above)}in {_some(folder, tars)}, "
            f"wanted the images of one split; unpack, and pass the folder {found[0]} or a tar of it alone"
        )
    if any(scan.inner for scan in scans):
        if len(scans) > 1:
            raise ValueError(
                f"data path: one of {_some(folder, tars)} is a tar of class tars, which is read alone; pass that file"
            )
        classes = sorted(set(scans[0].inner))
        numbers = {name: label for label, name in enumerate(classes)}
        return classes, np.array([numbers[name] for name in scans[0].inner], np.int64)
    if labelled:
        labels = np.concatenate([_sample_labels(folder / tar, scan) for tar, scan in zip(tars, scans, strict=True)])
        return [str(label) for label in range(labels.max() + 1)], labels
    counts, stems = [len(scan.names) for scan in scans], [os.path.splitext(tar)[0] for tar in tars]
    if not _are_classes(stems, scans):
        return list(NO_LABELS), np.zeros(sum(counts), np.int64)
    classes = sorted(set(stems))
    logger.info("%s: no image has a label beside it: each of the %d tars is a class", folder, len(tars))
    return classes, np.repeat(np.array([classes.index(stem) for stem in stems], np.int64), counts)


def _sample_labels(path: Path, scan: _Scan) -> np.ndarray:
    labels = np.full(len(scan.names), -1) if scan.labels is None else scan.labels
    missing = np.flatnonzero(labels < 0)
    if len(missing):
        name = scan.names[missing[0]]
        raise ValueError(
            f"data path: {path} has {name} but no {os.path.splitext(name)[0]}.cls (or .json with "
            f"{'/'.join(LABEL_KEYS)}), wanted a label beside every image, or beside none"
        )
    return labels


def _are_classes(stems: list[str], scans: list[_Scan]) -> bool:
    """Whether tars without labels, named `stems`, are classes; else they are shards. See `ImageTars`."""
    if len(stems) == 1:
        return False
    if all(_is_named_after(stem, name) for stem, scan in zip(stems, scans, strict=True) for name in scan.names):
        return True
    shapes = {re.sub("[0-9]+", "0", stem) for stem in stems}
    return len(shapes) == len(stems) and not any(scan.has_companions for scan in scans)


def _is_named_after(stem: str, name: str) -> bool:
    """Whether a member's name is that of its tar and something more: n01_18.JPEG or n01/18.JPEG in n01.tar."""
    end, following = stem[-1:], name[len(stem) : len(stem) + 1]
    cut = (end.isdigit() and following.isdigit()) or (end.isalpha() and following.isalpha())
    return name.startswith(stem) and not cut


def _some(folder: Path, tars: list[str]) -> str:
    return str(folder / tars[0]) if len(tars) == 1 else f"the {len(tars)} tars in {folder}"
