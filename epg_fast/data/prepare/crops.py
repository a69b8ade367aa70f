"""Centre crops of any dataset, as PNG files in class folders or as WebDataset shards: `prepare-data`.

Shards are few large files, which training checks and reads in any order.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import mmap
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from epg_fast.data.loading.views import center_crop
from epg_fast.data.loading.workers import each
from epg_fast.data.sources import open_images
from epg_fast.data.sources.decoding import decode_image
from epg_fast.data.sources.faults import too_many_bad_files
from epg_fast.data.sources.manifest import MANIFEST, count_classes, read_manifest, write_manifest
from epg_fast.data.sources.source import ImageSource, images_of
from epg_fast.data.sources.tar_index import TarIndex, scan_tars
from epg_fast.data.sources.tars import INDEX, check_shards
from epg_fast.files import OutputFolder, file_sha256, is_junk, open_atomically, write_atomically

MAX_BAD_FRACTION = 0.01
# Images that a process crops at a time.
_CHUNK = 16

logger = logging.getLogger("epg_fast")


# ---- what both layouts share


def _open_source(source: Path, outdir: Path, image_size: int, workers: int) -> ImageSource:
    """Return the images of `source`. Raises ValueError for sizes without meaning and an `outdir` in `source`."""
    if image_size < 1 or workers < 0:
        raise ValueError(f"image_size, workers: got {image_size}, {workers}, wanted at least 1 and at least 0")
    if outdir.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"outdir: {outdir} is or lies in the source {source}; choose a folder outside")
    with images_of("source"):
        return open_images(source)


@contextlib.contextmanager
def _claimed(outdir: Path, source: Path, images: ImageSource, settings: dict) -> Iterator[tuple[dict, dict | None]]:
    """Lock `outdir`; gives a new manifest, and that of an earlier run with the same images and settings, if any.

    Raises ValueError for a folder with anything else, or in which another process is at work.
    """
    now = settings | {"source": str(source.resolve()), "source_fingerprint": images.fingerprint()}
    with OutputFolder(outdir, "prepare-data", MANIFEST) as folder:
        before = None
        if folder.check():
            before = read_manifest(outdir)
            if before is None:
                raise folder.unreadable("it was not written by prepare-data")
            # a source that moved is the same; and one that grew gets the crops that a folder lacks
            ignored = {"source"} if before["source_fingerprint"] == now["source_fingerprint"] else set()
            if settings["layout"] == "folder" and before.get("source") == now["source"]:
                ignored = {"source_fingerprint"}
            folder.require_same({name: before.get(name) for name in now}, now, ignored)
        folder.lock()
        _remove_leftovers(outdir)
        new = {"complete": False, **now, "classes": images.classes, "bad_files": {}, **count_classes([], [])}
        try:
            yield new, before
        except BaseException:
            _remove_leftovers(outdir)  # of processes that were ended
            raise


def _remove_leftovers(outdir: Path) -> None:
    for leftover in outdir.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _finish_manifest(outdir: Path, manifest: dict, total: int, max_bad_fraction: float) -> None:
    """Write `manifest`, which is complete unless too many of the `total` images are bad: `DataError` is raised then."""
    bad = len(manifest["bad_files"])
    manifest["complete"] = bad <= max_bad_fraction * total and bad < total
    write_manifest(outdir, manifest)
    if not manifest["complete"]:
        # rounded up, so that it is enough
        flag = f", or leave them out with --max_bad_fraction {math.ceil(1000 * bad / total) / 1000}"
        remedy = f"Restore these files{flag if bad < total else ''}; then give the command again."
        raise too_many_bad_files(manifest["bad_files"], total, max_bad_fraction, remedy)


def _crop_and_encode(content: bytes, image_size: int, **options) -> bytes:
    """Return the centre crop of an encoded image as a file; `options` are those of Pillow's `save`."""
    crop = center_crop(decode_image(content), image_size)
    # colour profile and the like would be copied into the file
    crop.info.clear()
    buffer = io.BytesIO()
    crop.save(buffer, **options)
    return buffer.getvalue()


# ---- class folders


def prepare_folder(
    source: str | os.PathLike,
    outdir: str | os.PathLike,
    image_size: int,
    workers: int = 4,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> dict:
    """Write ADM centre crops of `source` to `outdir` as a folder of class folders and return the manifest.

    Each image becomes a PNG of `image_size` x `image_size` with the same relative name and the ending .png, below a
    folder of its class where its name does not begin with that. Classes whose names cannot be those of folders, or that
    are not in their order, have numbers for folders, and their names in the manifest (`class_names`). Files appear
    whole or not at all; run again, the work goes on with those that are missing. Files that cannot be decoded are left
    out and named in `outdir`/manifest.json, beside `classes`, `counts` (per class), `class_frequencies` (in class
    order), `image_size`, `source`.

    Args:
        source: see `open_images`.
        outdir: a new or empty folder, or an earlier output for the same source and size.
        image_size: side of the crops in pixels.
        workers: processes; 0 works in this one.
        max_bad_fraction: share of bad files above which the output is not complete.

    Raises ValueError for an `outdir` that is or lies in `source`, has other files, another size or another source, or
    in which another process is at work, for two source files that would get the same name, and (`DataError`, after the
    work) if too many files are bad.
    """
    source, outdir = Path(source), Path(outdir)
    images = _open_source(source, outdir, image_size, workers)
    folders = _class_folders(images.classes)
    targets = _target_names(images, folders)
    with _claimed(outdir, source, images, {"layout": "folder", "image_size": image_size}) as (manifest, _):
        if folders != images.classes:
            manifest |= {"classes": folders, "class_names": images.classes}
        write_manifest(outdir, manifest)
        # empty classes get a folder as well: class indices must not shift
        for name in {os.path.dirname(target) for target in targets} | set(folders):
            (outdir / name).mkdir(parents=True, exist_ok=True)
        missing = [i for i, target in enumerate(targets) if not (outdir / target).exists()]
        crop = functools.partial(_crop_file, images, targets, outdir, image_size)
        bar = {"total": len(targets), "initial": len(targets) - len(missing), "unit": "img"}
        for i, reason in zip(missing, each(crop, missing, workers, chunk=_CHUNK, **bar), strict=True):
            if reason is not None:
                manifest["bad_files"][images.paths[i]] = reason
        pairs = zip(images.paths, images.labels, strict=True)
        manifest |= count_classes(folders, [label for path, label in pairs if path not in manifest["bad_files"]])
        _finish_manifest(outdir, manifest, len(images), max_bad_fraction)
    return manifest


def _class_folders(classes: list[str]) -> list[str]:
    """Names of the classes' folders, which have to be sorted as the classes are."""
    if classes == sorted(classes) and not any(map(_is_no_folder, classes)):
        return classes
    return [f"{label:0{len(str(len(classes) - 1))}d}" for label in range(len(classes))]


def _is_no_folder(name: str) -> bool:
    return not name or "/" in name or "\0" in name or len(os.fsencode(name)) > 255 or is_junk(name)


def _target_names(images: ImageSource, folders: list[str]) -> list[str]:
    targets, sources = [], {}
    for path, label in zip(images.paths, images.labels, strict=True):
        name = folders[label]
        target = ("" if path.startswith(f"{name}/") else f"{name}/") + os.path.splitext(path)[0] + ".png"
        if target in sources:
            raise ValueError(f"source: {sources[target]} and {path} would both become {target}; rename one of them")
        sources[target] = path
        targets.append(target)
    return targets


def _crop_file(images: ImageSource, targets: list[str], outdir: Path, image_size: int, i: int) -> str | None:
    """Write one crop; return why the image could not be read, if so."""
    content, reason = images.examine(i, functools.partial(_crop_and_encode, image_size=image_size, format="PNG"))
    if reason is None:
        write_atomically(outdir / targets[i], content)
    return reason


# ---- shards


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
    `open_images(source)` in an order drawn from `seed` (`ImageSource.mixed`), so that every shard mixes the classes.
    `index.npz` (`TarIndex`) has the place and CRC-32 of each image; manifest.json has `image_size`, `format`, `source`,
    `classes`, `counts` (per class), `class_frequencies` (in class order), `shards` (name, bytes, images, sha256),
    `index_sha256` and `bad_files`: those that cannot be decoded are left out and named. `ImageTars` refuses the folder
    until `complete`.

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
    if images_per_shard < 1 or seed < 0:
        raise ValueError(f"images_per_shard, seed: got {images_per_shard}, {seed}, wanted at least 1 and at least 0")
    if format not in ("png", "jpeg") or not 1 <= quality <= 100:
        raise ValueError(f"format, quality: got {format}, {quality}, wanted png or jpeg, and 1 to 100")
    source, outdir = Path(source), Path(outdir)
    settings = {"layout": "shards", "image_size": image_size, "images_per_shard": images_per_shard, "format": format}
    settings |= ({"quality": quality} if format == "jpeg" else {}) | {"seed": seed}
    images = _open_source(source, outdir, image_size, workers)
    with _claimed(outdir, source, images, settings) as (manifest, before):
        if before is not None and _is_finished(outdir, before, images):
            logger.info("%s already holds these shards", outdir)
            return before
        write_manifest(outdir, manifest | {"shards": [], "index_sha256": ""})
        order = images.mixed(np.random.default_rng(seed))
        task = functools.partial(_make_shard, images, order, outdir, settings)
        count = -(-len(images) // images_per_shard)
        shards = list(each(task, range(count), workers, total=count, unit="shard"))
        index = _joined([shard.index for shard in shards], images.classes)
        index.save(outdir / INDEX)
        manifest |= count_classes(images.classes, index.label)
        manifest["shards"], manifest["index_sha256"] = [shard.entry for shard in shards], file_sha256(outdir / INDEX)
        for shard in shards:
            manifest["bad_files"] |= shard.bad_files
        _finish_manifest(outdir, manifest, len(images), max_bad_fraction)
    return manifest


def verify_shards(outdir: str | os.PathLike) -> int:
    """Read all shards that `prepare_shards` wrote to `outdir`, compare their SHA-256 and return how many there are.

    Raises ValueError for an `outdir` without shards, or that is not complete, and for the first file that is missing or
    differs.
    """
    outdir = Path(outdir)
    manifest = read_manifest(outdir)
    if manifest is None or manifest["layout"] != "shards":
        raise ValueError(f"outdir: {outdir} has no shards of prepare-data, wanted a folder with their manifest.json")
    check_shards(outdir, manifest)
    for shard in manifest["shards"]:
        if file_sha256(outdir / shard["name"]) != shard["sha256"]:
            raise ValueError(
                f"{outdir / shard['name']} is damaged: its SHA-256 is not the one in manifest.json; "
                "delete it and run prepare-data again"
            )
    return len(manifest["shards"])


@dataclass
class _Shard:
    """One shard: its index, with checksums, what the manifest says of it, and bad files that it lacks."""

    index: TarIndex
    entry: dict
    bad_files: dict[str, str] = field(default_factory=dict)


def _is_finished(outdir: Path, manifest: dict, images: ImageSource) -> bool:
    """Whether nothing is missing from an earlier output; bad files may have been restored since."""
    if manifest["bad_files"] or manifest["classes"] != images.classes:
        return False
    try:
        check_shards(outdir, manifest)
    except (OSError, ValueError):
        return False
    return True


def _make_shard(images: ImageSource, order: np.ndarray, outdir: Path, settings: dict, number: int) -> _Shard:
    """Write shard `number`, unless an interrupted run has."""
    per_shard, format = settings["images_per_shard"], settings["format"]
    wanted = order[number * per_shard : (number + 1) * per_shard].tolist()
    names = {i: f"{i:08d}.{'png' if format == 'png' else 'jpg'}" for i in wanted}
    labels = {i: int(images.labels[i]) for i in wanted}
    path = outdir / f"shard-{number:06d}.tar"
    try:
        return _read_shard(path, list(names.values()), list(labels.values()))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning("%s is made again: %s", path, error)
    # subsampling 0: chroma in full resolution
    options = {"format": "PNG"} if format == "png" else {"format": "JPEG", "quality": settings["quality"]}
    encode = functools.partial(_crop_and_encode, image_size=settings["image_size"], **options, subsampling=0)
    bad_files = {}
    # on the disk: a run after a power failure trusts what has its final name
    with (
        open_atomically(path, sync=True) as file,
        tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for i in wanted:
            content, reason = images.examine(i, encode)
            if reason is not None:
                bad_files[images.paths[i]] = reason
                del names[i], labels[i]
                continue
            for name, member in ((names[i], content), (f"{i:08d}.cls", str(labels[i]).encode())):
                # without times and owners: the same images give the same bytes
                info = tarfile.TarInfo(name)
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))
    shard = _read_shard(path, list(names.values()), list(labels.values()))
    shard.bad_files = bad_files
    return shard


def _read_shard(path: Path, names: list[str], labels: list[int]) -> _Shard:
    """Return what is to be known of the shard `path`. Raises ValueError unless it holds these images and labels."""
    index = scan_tars(path.parent, [path.name])
    if index.paths != [f"{path.name}/{name}" for name in names] or index.label.tolist() != labels:
        raise ValueError("it holds other images or labels")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        places = zip(index.offset.tolist(), index.size.tolist(), strict=True)
        index.crc32 = np.array([zlib.crc32(content[start : start + size]) for start, size in places], np.uint32)
    entry = {"name": path.name, "bytes": path.stat().st_size, "images": len(index), "sha256": file_sha256(path)}
    return _Shard(index, entry)


def _joined(indices: list[TarIndex], classes: list[str]) -> TarIndex:
    columns = ("offset", "size", "label", "crc32")
    return TarIndex(
        tars=[index.tars[0] for index in indices],
        classes=list(classes),
        paths=[path for index in indices for path in index.paths],
        shard=np.repeat(np.arange(len(indices), dtype=np.int32), [len(index) for index in indices]),
        **{name: np.concatenate([getattr(index, name) for index in indices]) for name in columns},
    )
