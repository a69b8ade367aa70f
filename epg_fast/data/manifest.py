"""manifest.json: what `prepare-data` wrote, and whether it came to the end."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from epg_fast.data.files import write_atomically

MANIFEST = "manifest.json"
_KEYS = {"complete": bool, "image_size": int, "source_fingerprint": str, "classes": list, "counts": dict}

logger = logging.getLogger("epg_fast")


def read_manifest(folder: Path) -> dict | None:
    """Return the manifest of `folder`, or None if it has none. A foreign manifest.json is warned about and ignored."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or any(not isinstance(manifest.get(key), kind) for key, kind in _KEYS.items()):
        logger.warning("%s was not written by prepare-data (or is damaged) and is ignored", folder / MANIFEST)
        return None
    return manifest


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write `manifest` to `folder`, at once."""
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def count_classes(classes: list[str], labels: Sequence[int] | np.ndarray) -> dict:
    """Return `counts` (class name -> images) and `class_frequencies` (share of the images, in class order)."""
    counts = np.bincount(np.asarray(labels, np.int64), minlength=len(classes))
    frequencies = counts / max(1, counts.sum())
    return {"counts": dict(zip(classes, counts.tolist(), strict=True)), "class_frequencies": frequencies.tolist()}


def check_complete(folder: Path, manifest: dict) -> None:
    """Raise ValueError if `prepare-data` did not finish `folder`."""
    if manifest["complete"]:
        return
    bad = len(manifest.get("bad_files", ()))
    if bad:
        raise ValueError(
            f"data path: {folder} is not complete: prepare-data could not decode {bad} images (see {MANIFEST}); "
            "restore or delete them and run it again"
        )
    raise ValueError(f"data path: {folder} is not complete: prepare-data was interrupted; run it again to go on")


def check_counts(folder: Path, manifest: dict, classes: list[str], labels: Sequence[int] | np.ndarray) -> None:
    """Raise ValueError unless `folder` holds the classes and numbers of images that its manifest names."""
    found = count_classes(classes, labels)["counts"]
    wanted = {name: manifest["counts"].get(name, 0) for name in manifest["classes"]}
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"data path: {folder} has {found.get(name, 'no')} images of class {name!r}, wanted "
                f"{wanted.get(name, 'none')} by {MANIFEST}; run prepare-data again, or delete {MANIFEST} if you "
                "wanted this"
            )


def load_class_frequencies(path: str | os.PathLike) -> list[float]:
    """Return `class_frequencies` of the manifest `path` (the file or its folder), in class order, with sum 1.

    Raises ValueError for a missing file, one without frequencies, or one of an output that is not complete.
    """
    path = Path(path)
    file = path / MANIFEST if path.is_dir() else path
    try:
        manifest = json.loads(file.read_bytes())
        frequencies = [float(value) for value in manifest["class_frequencies"]]
        complete = manifest["complete"]
    except OSError as error:
        raise ValueError(f"class frequencies: cannot read {file} ({error.strerror}); pass the {MANIFEST}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"class frequencies: {file} has no class_frequencies; wanted a {MANIFEST} of prepare-data, "
            "which an earlier version wrote without them: run prepare-data again"
        ) from None
    if not complete:
        raise ValueError(f"class frequencies: {file} is of an unfinished prepare-data; run it again")
    if not all(math.isfinite(value) and value >= 0 for value in frequencies) or not sum(frequencies) > 0:
        raise ValueError(f"class frequencies: {file} holds values that are no probabilities; run prepare-data again")
    return [value / sum(frequencies) for value in frequencies]
