"""manifest.json: what `prepare-data` wrote, and whether it came to the end."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from epg_fast.files import write_atomically

MANIFEST = "manifest.json"
_KEYS = {"complete": bool, "image_size": int, "source_fingerprint": str, "classes": list, "counts": dict}
_RESTORE = "restore it, or prepare the images again in a new outdir"

logger = logging.getLogger("epg_fast")


class UnreadableManifest(ValueError):
    """A manifest.json that is no JSON, as one that was cut off."""


def read_manifest(folder: Path) -> dict | None:
    """Return the manifest of `folder`, or None if it has none.

    A manifest.json of another program (JSON without `source_fingerprint`, or several lines of JSON) is warned about
    and ignored. Raises `UnreadableManifest`, and ValueError for one of `prepare-data` with values of other types.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        # behind one whole value more of them: no file of prepare-data is like this, however it is damaged
        manifest = None
        if not getattr(error, "msg", "").startswith("Extra data"):
            raise UnreadableManifest(
                f"data path: {path} is damaged: it is no JSON ({error}), wanted the file that prepare-data wrote; "
                f"{_RESTORE}; move it away if it is of another program"
            ) from None
    if not isinstance(manifest, dict) or "source_fingerprint" not in manifest:
        logger.warning("%s was not written by prepare-data and is ignored", path)
        return None
    for key, kind in _KEYS.items():
        if not isinstance(manifest.get(key), kind):
            found = f"{key} {manifest[key]!r:.40}" if key in manifest else f"no {key}"
            raise ValueError(f"data path: {path} is damaged: it has {found}, wanted {kind.__name__}; {_RESTORE}")
    names, counts = manifest["classes"], manifest["counts"].values()
    # a bool is an int
    if not all(isinstance(name, str) for name in names) or not all(type(count) is int for count in counts):
        raise ValueError(f"data path: {path} is damaged: wanted names as classes and numbers as counts; {_RESTORE}")
    if not isinstance(manifest.setdefault("bad_files", {}), dict):
        raise ValueError(f"data path: {path} is damaged: bad_files are not named with reasons; {_RESTORE}")
    return manifest


def lost_manifest(folder: Path, reason: str) -> ValueError:
    """Return the error for shards of `prepare-data` without the manifest.json that belongs to them."""
    return ValueError(
        f"data path: {folder} has shards of prepare-data, but its {MANIFEST} {reason}; {_RESTORE} "
        f"(without {MANIFEST} and index.npz the tars are read as those of any program, with classes 0, 1, ...)"
    )


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
    bad = len(manifest["bad_files"])
    if bad:
        raise ValueError(
            f"data path: {folder} is not complete: prepare-data could not decode {bad} images (see {MANIFEST}); "
            "restore them, or let it leave more of them out with its --max_bad_fraction, and run it again"
        )
    raise ValueError(f"data path: {folder} is not complete: prepare-data was interrupted; run it again to go on")


def check_counts(folder: Path, manifest: dict, classes: list[str], labels: Sequence[int] | np.ndarray) -> None:
    """Raise ValueError unless `folder` holds the classes and numbers of images that its manifest names."""
    found = count_classes(classes, labels)["counts"]
    wanted = {name: manifest["counts"].get(name, 0) for name in manifest["classes"]}
    files = f"{MANIFEST} and index.npz" if manifest.get("layout") == "shards" else MANIFEST
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"data path: {folder} has {found.get(name, 'no')} images of class {name!r}, wanted "
                f"{wanted.get(name, 'none')} by {MANIFEST}; run prepare-data again, or delete {files} if you "
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
        raise ValueError(
            f"class frequencies: cannot read {file} ({error.strerror}); prepare-data makes it: pass its output"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"class frequencies: {file} has no class_frequencies; wanted a {MANIFEST} of prepare-data, "
            "which an earlier version wrote without them: run prepare-data again"
        ) from None
    if not complete:
        raise ValueError(f"class frequencies: {file} is of an unfinished prepare-data; run it again")
    if not all(math.isfinite(value) and value >= 0 for value in frequencies) or not sum(frequencies) > 0:
        raise ValueError(f"class frequencies: {file} holds values that are no probabilities; run prepare-data again")
    return [value / sum(frequencies) for value in frequencies]
