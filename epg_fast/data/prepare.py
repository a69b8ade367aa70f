"""Centre crops of a folder of class folders, written once so that training decodes small files."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from epg_fast.data import pool
from epg_fast.data.dataset import holds_tars
from epg_fast.data.folder import ImageFolder
from epg_fast.data.manifest import MANIFEST, count_classes, read_manifest, write_manifest
from epg_fast.data.source import ImageSource, too_many_bad_files
from epg_fast.data.views import center_crop
from epg_fast.files import is_junk, write_atomically

MAX_BAD_FRACTION = 0.01
_CHUNK = 16

logger = logging.getLogger("epg_fast")


def prepare_folder(
    source: str | os.PathLike,
    outdir: str | os.PathLike,
    image_size: int,
    workers: int = 4,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> dict:
    """Write ADM centre crops of the folder of class folders `source` to `outdir` and return the manifest.

    Each image becomes a PNG of `image_size` x `image_size` with the same relative name and the ending .png, below a
    folder of its class where `source` has its labels from a dataset.json. Files
    appear whole or not at all; run again, the work goes on with those that are missing. Files that cannot be decoded
    are left out and named in `outdir`/manifest.json, beside `classes`, `counts` (per class), `class_frequencies` (in
    class order), `image_size`, `source`.

    Args:
        source: see `ImageFolder`.
        outdir: a new or empty folder, or an earlier output for the same source and size.
        image_size: side of the crops in pixels.
        workers: processes; 0 works in this one.
        max_bad_fraction: share of bad files above which the output is not complete.

    Raises ValueError for an `outdir` that is or lies in `source`, has other files, another size or another source, or
    in which another process is at work, for two source files that would get the same name, and (`DataError`, after the
    work) if too many files are bad.
    """
    source, outdir = Path(source), Path(outdir)
    check_arguments(source, outdir, image_size, workers)
    if holds_tars(source):
        kind = "is a folder of tars" if source.is_dir() else "is a file"
        raise ValueError(
            f"source: {source} {kind}, wanted a folder of class folders; unpack it, or use --layout shards"
        )
    folder = ImageFolder(source)
    targets = _target_names(folder)
    settings = {"layout": "folder", "image_size": image_size}
    manifest = start_manifest(source, outdir, folder, settings)
    with claim_outdir(outdir, source, manifest, settings):
        _write_crops(folder, targets, outdir, manifest, workers)
        finish_manifest(outdir, manifest, len(folder), max_bad_fraction)
    return manifest


def _write_crops(folder: ImageFolder, targets: list[str], outdir: Path, manifest: dict, workers: int) -> None:
    # empty classes get a folder as well: class indices must not shift
    for name in {os.path.dirname(target) for target in targets} | set(folder.classes):
        (outdir / name).mkdir(parents=True, exist_ok=True)
    for leftover in outdir.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    write_manifest(outdir, manifest)

    missing = [i for i, target in enumerate(targets) if not (outdir / target).exists()]
    crop = functools.partial(_crop_file, folder, targets, outdir, manifest["image_size"])
    for i, reason in pool.run(crop, missing, workers, total=len(targets), chunk=_CHUNK, unit="img"):
        if reason is not None:
            manifest["bad_files"][folder.paths[i]] = reason
    labels = [
        label for path, label in zip(folder.paths, folder.labels, strict=True) if path not in manifest["bad_files"]
    ]
    manifest |= count_classes(folder.classes, labels)


@contextlib.contextmanager
def claim_outdir(outdir: Path, source: Path, manifest: dict, settings: dict) -> Iterator[None]:
    """Create `outdir`, for the images of `start_manifest`, and lock it by a hidden file in it.

    Raises ValueError when another process has the lock, or has written other images since `start_manifest`.
    """
    outdir.mkdir(parents=True, exist_ok=True)
    with open(outdir / ".lock", "ab") as lock:
        try:
            # lockf, not flock: workers would inherit the latter and hold it when this process has been killed
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"outdir: another prepare-data is writing to {outdir}; wait for it, stop it or choose another outdir"
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): do not start prepare-data there twice", outdir, error)
        _check_outdir(outdir, source, manifest["source_fingerprint"], settings)
        yield


def check_arguments(source: Path, outdir: Path, image_size: int, workers: int) -> None:
    """Raise ValueError for sizes without meaning and an `outdir` in `source`."""
    if image_size < 1 or workers < 0:
        raise ValueError(f"image_size, workers: got {image_size}, {workers}, wanted at least 1 and at least 0")
    if outdir.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"outdir: {outdir} is or lies in the source {source}; choose a folder outside")


def start_manifest(source: Path, outdir: Path, images: ImageSource, settings: dict) -> dict:
    """Return a new manifest for `outdir`. Raises ValueError if it holds anything but `images` with these settings."""
    fingerprint = images.fingerprint()
    _check_outdir(outdir, source, fingerprint, settings)
    return {
        "complete": False,
        **settings,
        "source": str(source.resolve()),
        "source_fingerprint": fingerprint,
        "classes": images.classes,
        "counts": {},
        "class_frequencies": [],
        "bad_files": {},
    }


def finish_manifest(outdir: Path, manifest: dict, total: int, max_bad_fraction: float) -> None:
    """Write `manifest`, which is complete unless too many of the `total` images are bad: `DataError` is raised then."""
    bad = len(manifest["bad_files"])
    manifest["complete"] = bad <= max_bad_fraction * total and bad < total
    write_manifest(outdir, manifest)
    if not manifest["complete"]:
        # rounded up, so that it is enough
        flag = f", or leave them out with --max_bad_fraction {math.ceil(1000 * bad / total) / 1000}"
        remedy = f"Restore these files{flag if bad < total else ''}; then give the command again."
        raise too_many_bad_files(manifest["bad_files"], total, max_bad_fraction, remedy)


def encode_crop(image: Image.Image, image_size: int, **options) -> bytes:
    """Return the centre crop of `image` as a file; `options` are those of Pillow's `save`."""
    crop = center_crop(image, image_size)
    # colour profile and the like would be copied into the file
    crop.info.clear()
    buffer = io.BytesIO()
    crop.save(buffer, **options)
    return buffer.getvalue()


def _target_names(folder: ImageFolder) -> list[str]:
    classes = (folder.classes[label] for label in folder.labels)
    targets = [
        ("" if path.startswith(f"{name}/") else f"{name}/") + os.path.splitext(path)[0] + ".png"
        for path, name in zip(folder.paths, classes, strict=True)
    ]
    if len(set(targets)) < len(targets):
        seen: dict[str, str] = {}
        for path, target in zip(folder.paths, targets, strict=True):
            if target in seen:
                raise ValueError(f"source: {seen[target]} and {path} would both become {target}; rename one of them")
            seen[target] = path
    return targets


def _check_outdir(outdir: Path, source: Path, fingerprint: str, settings: dict) -> None:
    if outdir.exists() and not outdir.is_dir():
        raise ValueError(f"outdir: {outdir} is a file, wanted a folder; choose another outdir")
    if not (outdir / MANIFEST).exists():
        # the manifest is the first file of every output
        if any(path.is_file() and not any(map(is_junk, path.relative_to(outdir).parts)) for path in outdir.rglob("*")):
            raise ValueError(f"outdir: {outdir} is not empty and has no {MANIFEST}; choose a new or empty folder")
        return
    manifest = read_manifest(outdir)
    if manifest is None or "source" not in manifest:
        raise ValueError(f"outdir: {outdir / MANIFEST} is not a manifest of prepared images; choose another outdir")
    for name, wanted in settings.items():
        # the first version wrote folders only and did not say so
        found = manifest.get(name, "folder" if name == "layout" else None)
        if found != wanted:
            raise ValueError(
                f"outdir: {outdir} has images of {name} {found}, wanted {wanted}; choose another outdir or pass "
                f"--{name} {found}"
            )
    if manifest["source_fingerprint"] == fingerprint:
        return
    if settings["layout"] == "shards":
        raise ValueError(
            f"outdir: {outdir} was made from {manifest['source']} with other images than {source} has now; "
            "choose another outdir"
        )
    if manifest["source"] != str(source.resolve()):
        raise ValueError(
            f"outdir: {outdir} was made from {manifest['source']}, not from {source}; choose another outdir"
        )


def _crop_file(
    folder: ImageFolder, targets: list[str], outdir: Path, image_size: int, i: int
) -> tuple[int, str | None]:
    """Write one crop; return its index and why it could not be read, if so."""
    image, reason = folder.examine(i)
    if image is not None:
        write_atomically(outdir / targets[i], encode_crop(image, image_size, format="PNG"))
    return i, reason
