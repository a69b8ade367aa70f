"""Centre crops of any dataset as PNG files in class folders."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from epg_fast.data.loading.workers import each
from epg_fast.data.prepare.output import MAX_BAD_FRACTION, claimed, crop_and_encode, finish_manifest, open_source
from epg_fast.data.sources.manifest import count_classes, write_manifest
from epg_fast.data.sources.source import ImageSource
from epg_fast.files import is_junk, write_atomically

_CHUNK = 16


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
    images = open_source(source, outdir, image_size, workers)
    folders = _class_folders(images.classes)
    targets = _target_names(images, folders)
    with claimed(outdir, source, images, {"layout": "folder", "image_size": image_size}) as (manifest, _):
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
        finish_manifest(outdir, manifest, len(images), max_bad_fraction)
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
    content, reason = images.examine(i, functools.partial(crop_and_encode, image_size=image_size, format="PNG"))
    if reason is None:
        write_atomically(outdir / targets[i], content)
    return reason
