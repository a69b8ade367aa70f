"""Centre crops of any dataset as WebDataset shards: few large files, which training checks and reads in any order."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from epg_fast.data import pool
from epg_fast.data.dataset import open_images
from epg_fast.data.manifest import MANIFEST, check_complete, count_classes, lost_manifest, read_manifest, write_manifest
from epg_fast.data.prepare import (
    MAX_BAD_FRACTION,
    check_arguments,
    claim_outdir,
    encode_crop,
    finish_manifest,
    start_manifest,
)
from epg_fast.data.source import ImageSource
from epg_fast.data.tar_index import INDEX, Names, TarIndex, has_checksums
from epg_fast.data.tar_scan import walk_tar
from epg_fast.data.tars import check_index, check_shards, find_tars
from epg_fast.files import open_atomically

_BLOCK = 512

logger = logging.getLogger("epg_fast")


def prepare_shards(
    source: str | os.PathLike,
    outdir: str | os.PathLike,
    image_size: int,
    *,
    workers: int = 4,
    images_per_shard: int = 2048,
    format: Literal["png", "jpeg"] = "png",
    quality: int = 95,
    seed: int = 0,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> dict:
    """Write ADM centre crops of `source` to `outdir` as WebDataset shards and return the manifest.

    `shard-000000.tar`, ... hold `<i>.png` (or .jpg) and `<i>.cls`, the class index in ASCII digits, for the images i of
    `open_images(source)` in an order drawn from `seed`, so that every shard mixes the classes. `index.npz` (`TarIndex`)
    has the place and CRC-32 of each image; manifest.json has `image_size`, `format`, `source`, `classes`, `counts` (per
    class), `class_frequencies` (in class order), `shards` (name, bytes, images, sha256) and `bad_files`: those that
    cannot be decoded are left out and named. `ImageTars` refuses the folder until `complete` is true.

    Shards appear whole or not at all. Run again, the work goes on with the missing ones, and the result is the same bit
    for bit as without interruption (with the same Pillow).

    Args:
        source: see `open_images`.
        outdir: a new or empty folder, or an earlier output for the same source and arguments.
        image_size: side of the crops in pixels.
        workers: processes, each of which writes a shard at a time and holds one image; 0 works in this one.
        images_per_shard: images in a shard, but the last and those with bad files.
        format: "png" is lossless; "jpeg", with chroma in full resolution (4:4:4), is smaller and is not.
        quality: of JPEG, 1 to 100.
        seed: of the order.
        max_bad_fraction: share of bad files above which the output is not complete.

    Raises ValueError for an `outdir` that is or lies in `source`, has other files, or is of other images or arguments,
    or in which another process is at work; and (`DataError`, after the work) if too many files are bad.
    """
    source, outdir = Path(source), Path(outdir)
    check_arguments(source, outdir, image_size, workers)
    settings = _settings(image_size, images_per_shard, format, quality, seed)
    images = open_images(source)
    manifest = start_manifest(source, outdir, images, settings)
    finished = _finished(outdir, images)
    if finished is not None:
        logger.info("%s already holds these shards", outdir)
        return finished

    with claim_outdir(outdir, source, manifest, settings):
        _write_shards(images, outdir, manifest, settings, workers)
        finish_manifest(outdir, manifest, len(images), max_bad_fraction)
    return manifest


def _write_shards(images: ImageSource, outdir: Path, manifest: dict, settings: dict, workers: int) -> None:
    for leftover in outdir.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    write_manifest(outdir, manifest)
    order = np.random.default_rng(settings["seed"]).permutation(len(images))
    task = functools.partial(_make_shard, images, order, outdir, settings)
    count = -(-len(images) // settings["images_per_shard"])
    shards = list(pool.run(task, list(range(count)), workers, total=count, chunk=1, unit="shard"))

    index = _index(outdir, shards, images)
    index.save(outdir / INDEX)
    for shard in shards:
        manifest["bad_files"] |= shard.bad_files
    manifest |= count_classes(images.classes, index.label)
    manifest["shards"] = [
        {"name": s.name, "bytes": s.bytes, "images": len(s.images), "sha256": s.sha256} for s in shards
    ]


def verify_shards(outdir: str | os.PathLike) -> int:
    """Read all shards that `prepare_shards` wrote to `outdir`, compare their SHA-256 and return how many there are.

    Raises ValueError for the first that is missing or differs, for an `outdir` that is none or is not complete, and for
    an index.npz that is missing, damaged or does not fit.
    """
    outdir = Path(outdir)
    manifest = read_manifest(outdir)
    if manifest is None or manifest.get("layout") != "shards":
        if has_checksums(outdir / INDEX):
            raise lost_manifest(outdir, "is missing, or not that of shards")
        raise ValueError(f"outdir: {outdir} has no shards of prepare-data, wanted a folder with their manifest.json")
    check_complete(outdir, manifest)
    check_shards(outdir, find_tars(outdir)[1], manifest)
    _check_index_file(outdir, manifest)
    for shard in manifest["shards"]:
        if _sha256(outdir / shard["name"]) != shard["sha256"]:
            raise ValueError(
                f"{outdir / shard['name']} is damaged: its SHA-256 is not the one in manifest.json; "
                "delete it and run prepare-data again"
            )
    return len(manifest["shards"])


@dataclass
class _Shard:
    """What a shard holds; `images` are the positions in the source, the other lists have one value for each."""

    name: str
    bytes: int = 0
    sha256: str = ""
    images: list[int] = field(default_factory=list)
    members: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    bad_files: dict[str, str] = field(default_factory=dict)

    def add(self, i: int, member: str, offset: int, content: bytes) -> None:
        self.images.append(i)
        self.members.append(member)
        self.offsets.append(offset)
        self.sizes.append(len(content))
        self.crc32.append(zlib.crc32(content))


class _TarWriter:
    """A tar without times and owners: the same members give the same bytes."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._sha256 = hashlib.sha256()
        self.bytes = 0

    def add(self, name: str, content: bytes) -> int:
        """Append a member and return the offset of its content."""
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        offset = self.bytes
        self._write(content + bytes(-len(content) % _BLOCK))
        return offset

    def finish(self) -> str:
        """Write the mark of the end and return the file's SHA-256."""
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self.bytes % tarfile.RECORDSIZE))
        # a run after a power failure trusts what has its final name
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._sha256.hexdigest()

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self.bytes += len(content)


def _settings(image_size: int, images_per_shard: int, format: str, quality: int, seed: int) -> dict:
    if images_per_shard < 1 or seed < 0:
        raise ValueError(f"images_per_shard, seed: got {images_per_shard}, {seed}, wanted at least 1 and at least 0")
    if format not in ("png", "jpeg") or not 1 <= quality <= 100:
        raise ValueError(f"format, quality: got {format}, {quality}, wanted png or jpeg, and 1 to 100")
    settings = {"layout": "shards", "image_size": image_size, "images_per_shard": images_per_shard, "format": format}
    return settings | ({"quality": quality} if format == "jpeg" else {}) | {"seed": seed}


def _finished(outdir: Path, images: ImageSource) -> dict | None:
    """Return the manifest of an output in which nothing is missing."""
    manifest = read_manifest(outdir)
    # bad files may have been restored since
    if not manifest or not manifest["complete"] or manifest["bad_files"] or manifest["classes"] != images.classes:
        return None
    try:
        check_shards(outdir, find_tars(outdir)[1], manifest)
        _check_index_file(outdir, manifest)
    except (OSError, ValueError):
        return None
    return manifest


def _check_index_file(outdir: Path, manifest: dict) -> None:
    """Raise ValueError, with what to do, unless index.npz of `prepare_shards` is there, whole and fits `manifest`."""
    path = outdir / INDEX
    again = "run prepare-data again, it makes this file anew"
    try:
        index = TarIndex.load(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {again}") from None
    except ValueError as error:
        raise ValueError(f"{error}; {again}") from None
    if index.crc32 is None:
        raise ValueError(f"{path} has no checksums, so it is not that of prepare-data; {again}")
    shards = [(shard["name"], shard["bytes"]) for shard in manifest["shards"]]
    if shards != list(zip(index.tars, index.tar_bytes.tolist(), strict=True)):
        raise ValueError(f"{path} is of other shards than those in {MANIFEST}; {again}")
    check_index(outdir, manifest, index)


def _make_shard(images: ImageSource, order: np.ndarray, outdir: Path, settings: dict, number: int) -> _Shard:
    """Write shard `number`, or read what it holds if it is there and whole."""
    per_shard = settings["images_per_shard"]
    wanted = order[number * per_shard : (number + 1) * per_shard].tolist()
    shard = _Shard(f"shard-{number:06d}.tar")
    path = outdir / shard.name
    extension, options = _encoding(settings)
    if path.exists():
        try:
            return _read_shard(images, wanted, path, extension)
        except (OSError, ValueError) as error:
            logger.warning("%s is made again: %s", path, error)
    with open_atomically(path) as file:
        tar = _TarWriter(file)
        for i in wanted:
            pool.check_stopped()
            image = _load(images, i, shard.bad_files)
            if image is None:
                continue
            content = encode_crop(image, settings["image_size"], **options)
            shard.add(i, f"{i:08d}.{extension}", tar.add(f"{i:08d}.{extension}", content), content)
            tar.add(f"{i:08d}.cls", _cls(images, i))
        shard.sha256 = tar.finish()
        shard.bytes = tar.bytes
    return shard


def _encoding(settings: dict) -> tuple[str, dict]:
    if settings["format"] == "png":
        return "png", {"format": "PNG"}
    # 0: no subsampling of the chroma
    return "jpg", {"format": "JPEG", "quality": settings["quality"], "subsampling": 0}


def _load(images: ImageSource, i: int, bad_files: dict[str, str]):
    image, reason = images.examine(i)
    if reason is not None:
        bad_files[images.paths[i]] = reason
    return image


def _read_shard(images: ImageSource, wanted: list[int], path: Path, extension: str) -> _Shard:
    """Return what the shard `path` of an interrupted run holds. Raises ValueError if it is not what a run makes."""
    shard = _Shard(path.name, bytes=path.stat().st_size, sha256=_sha256(path))
    with open(path, "rb") as file:
        members = {name: (offset, size) for name, offset, size in walk_tar(file, path, 0, shard.bytes)}
        for i in wanted:
            pool.check_stopped()
            name, label = f"{i:08d}.{extension}", f"{i:08d}.cls"
            if name in members and label in members:
                offset, size = members[name]
                shard.add(i, name, offset, os.pread(file.fileno(), size, offset))
                if os.pread(file.fileno(), members[label][1], members[label][0]) != _cls(images, i):
                    raise ValueError(f"{label} is of another class")
            elif _load(images, i, shard.bad_files) is not None:
                raise ValueError(f"it lacks {images.paths[i]}, which can be read now")
    if len(members) != 2 * len(shard.images):
        raise ValueError("it has members that do not belong to it")
    return shard


def _cls(images: ImageSource, i: int) -> bytes:
    return str(int(images.labels[i])).encode()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            pool.check_stopped()
            digest.update(block)
    return digest.hexdigest()


def _index(outdir: Path, shards: list[_Shard], images: ImageSource) -> TarIndex:
    labels = np.asarray(images.labels, np.int64)
    return TarIndex(
        tars=[shard.name for shard in shards],
        tar_bytes=np.array([shard.bytes for shard in shards], np.int64),
        # no times: the same images give the same index
        tar_mtime=np.zeros(len(shards), np.int64),
        classes=list(images.classes),
        names=Names([member for shard in shards for member in shard.members]),
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.images) for shard in shards]),
        offset=np.array([offset for shard in shards for offset in shard.offsets], np.int64),
        size=np.array([size for shard in shards for size in shard.sizes], np.int64),
        label=labels[np.array([i for shard in shards for i in shard.images], np.int64)],
        crc32=np.array([crc for shard in shards for crc in shard.crc32], np.uint32),
    )
