"""Centre crops of a folder of class folders, written once so that training decodes small files."""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from epg_fast.data.folder import ImageFolder
from epg_fast.data.source import too_many_bad_files
from epg_fast.data.views import center_crop

MANIFEST = "manifest.json"
_MAX_BAD_FRACTION = 0.01
_CHUNK = 16


def prepare_folder(source: str | os.PathLike, outdir: str | os.PathLike, image_size: int, workers: int = 4) -> dict:
    """Write ADM centre crops of the folder of class folders `source` to `outdir` and return the manifest.

    Each image becomes a PNG of `image_size` x `image_size` with the same relative name and the ending .png. Files
    appear whole or not at all; run again, the work goes on with those that are missing. Files that cannot be decoded
    are left out and named in `outdir`/manifest.json, beside `classes`, `counts` (per class), `image_size`, `source`.

    Args:
        source: see `ImageFolder`.
        outdir: a new or empty folder, or an earlier output for the same source and size.
        image_size: side of the crops in pixels.
        workers: processes; 0 works in this one.

    Raises ValueError for an `outdir` that is or lies in `source`, has other files, another size or another source, for
    two source files that would get the same name, and (`DataError`, after the work) if over 1% of the files are bad.
    """
    source, outdir = Path(source), Path(outdir)
    if image_size < 1 or workers < 0:
        raise ValueError(f"image_size, workers: got {image_size}, {workers}, wanted at least 1 and at least 0")
    if outdir.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"outdir: {outdir} is or lies in the source {source}; choose a folder outside")
    folder = ImageFolder(source)
    targets = _target_names(folder)
    _check_outdir(outdir, folder, image_size)

    manifest = {
        "complete": False,
        "image_size": image_size,
        "source": str(source.resolve()),
        "source_fingerprint": folder.fingerprint(),
        "classes": folder.classes,
        "counts": {},
        "bad_files": {},
    }
    # empty classes get a folder as well: class indices must not shift
    for name in {os.path.dirname(target) for target in targets} | set(folder.classes):
        (outdir / name).mkdir(parents=True, exist_ok=True)
    for leftover in outdir.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    _write_manifest(outdir, manifest)

    missing = [i for i, target in enumerate(targets) if not (outdir / target).exists()]
    crop = functools.partial(_crop_file, folder, targets, outdir, image_size)
    for i, reason in _run(crop, missing, workers, total=len(targets)):
        if reason is not None:
            manifest["bad_files"][folder.paths[i]] = reason
    labels = [
        label for path, label in zip(folder.paths, folder.labels, strict=True) if path not in manifest["bad_files"]
    ]
    good = Counter(labels)
    manifest["counts"] = {name: good[label] for label, name in enumerate(folder.classes)}
    manifest["complete"] = len(manifest["bad_files"]) <= _MAX_BAD_FRACTION * len(folder)
    _write_manifest(outdir, manifest)
    if not manifest["complete"]:
        raise too_many_bad_files(manifest["bad_files"], len(folder), _MAX_BAD_FRACTION)
    return manifest


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a run after a crash, sees the whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _target_names(folder: ImageFolder) -> list[str]:
    targets = [os.path.splitext(path)[0] + ".png" for path in folder.paths]
    if len(set(targets)) < len(targets):
        seen: dict[str, str] = {}
        for path, target in zip(folder.paths, targets, strict=True):
            if target in seen:
                raise ValueError(f"source: {seen[target]} and {path} would both become {target}; rename one of them")
            seen[target] = path
    return targets


def _check_outdir(outdir: Path, folder: ImageFolder, image_size: int) -> None:
    if outdir.exists() and not outdir.is_dir():
        raise ValueError(f"outdir: {outdir} is a file, wanted a folder; choose another outdir")
    file = outdir / MANIFEST
    if not file.exists():
        # the manifest is the first file of every output
        if any(path.is_file() and not path.name.startswith(".") for path in outdir.rglob("*")):
            raise ValueError(f"outdir: {outdir} is not empty and has no {MANIFEST}; choose a new or empty folder")
        return
    try:
        manifest = json.loads(file.read_text())
        size, source, fingerprint = (manifest[key] for key in ("image_size", "source", "source_fingerprint"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"outdir: {file} is not a manifest of prepared images; choose another outdir") from error
    if size != image_size:
        raise ValueError(f"outdir: {outdir} has images of size {size}, wanted {image_size}; choose another outdir")
    if source != str(folder.root.resolve()) and fingerprint != folder.fingerprint():
        raise ValueError(f"outdir: {outdir} was made from {source}, not from {folder.root}; choose another outdir")


def _write_manifest(outdir: Path, manifest: dict) -> None:
    write_atomically(outdir / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def _crop_file(
    folder: ImageFolder, targets: list[str], outdir: Path, image_size: int, i: int
) -> tuple[int, str | None]:
    """Write one crop; return its index and why it could not be read, if so."""
    try:
        image = folder.load(i)
    except Exception as error:
        # what a damaged file makes Pillow raise is no closed list
        return i, f"{type(error).__name__}: {error}"
    crop = center_crop(image, image_size)
    # colour profile and the like would be copied into the PNG
    crop.info.clear()
    buffer = io.BytesIO()
    crop.save(buffer, "PNG")
    write_atomically(outdir / targets[i], buffer.getvalue())
    return i, None


def _run(crop, indices: list[int], workers: int, total: int) -> Iterator[tuple[int, str | None]]:
    # disable=None: no bar in a log file
    bar = functools.partial(tqdm, total=total, initial=total - len(indices), unit="img", disable=None)
    if workers == 0 or not indices:
        yield from bar(map(crop, indices))
        return
    # each worker gets `crop` once, not with every task: it holds the list of all files
    with ProcessPoolExecutor(
        min(workers, len(indices)),
        mp_context=multiprocessing.get_context("fork" if sys.platform == "linux" else None),
        initializer=_start_worker,
        initargs=(crop, os.getpid()),
    ) as executor:
        try:
            yield from bar(executor.map(_call_crop, indices, chunksize=_CHUNK))
        except BaseException:
            executor.shutdown(wait=True, cancel_futures=True)
            raise


def _start_worker(crop, parent: int) -> None:
    global _crop
    _crop = crop
    # the parent ends the pool on Ctrl-C
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    # a worker of concurrent.futures would wait for ever after the parent was killed
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _call_crop(i: int) -> tuple[int, str | None]:
    return _crop(i)
