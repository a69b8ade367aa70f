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
_KEYS = {"complete": bool, "layout": str, "source_fingerprint": str, "classes": list, "counts": dict, "bad_files": dict}
_KEYS_OF_SHARDS = {"shards": list, "index_sha256": str}

logger = logging.getLogger("epg_fast")


def read_manifest(folder: Path) -> dict | None:
    """Return the manifest of `folder`, None if it has none or that of another program, which is warned about.

    Raises ValueError for one that is damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is no JSON ({error})", "; move it away if it is of another program") from None
    if not isinstance(manifest, dict) or "source_fingerprint" not in manifest:
        logger.warning("%s was not written by prepare-data and is ignored", path)
        return None
    kinds = _KEYS | (_KEYS_OF_SHARDS if manifest.get("layout") == "shards" else {})
    for key, kind in (kinds | ({"class_names": list} if "class_names" in manifest else {})).items():
        if not isinstance(manifest.get(key), kind):
            raise _damaged(path, f"{key} is {manifest.get(key)!r:.40}, wanted {kind.__name__}")
    return manifest


def _damaged(path: Path, why: str, otherwise: str = "") -> ValueError:
    return ValueError(f"{path} is damaged: {why}; restore it, or prepare the images again in a new outdir{otherwise}")


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write `manifest` to `folder`, at once."""
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def count_classes(classes: list[str], labels: Sequence[int] | np.ndarray) -> dict:
    """Return `counts` (class name -> images) and `class_frequencies` (share of the images, in class order)."""
    counts = np.bincount(np.asarray(labels, np.int64), minlength=len(classes))
    frequencies = counts / max(1, counts.sum())
    return {"counts": dict(zip(classes, counts.tolist(), strict=True)), "class_frequencies": frequencies.tolist()}


def check_complete(folder: Path, manifest: dict) -> None:
    """Raise ValueError if `prepare-data` did not finish `folder`."""
    if manifest["complete"]:
        return
    reason = "prepare-data was interrupted; run it again to go on"
    if bad := len(manifest["bad_files"]):
        reason = (
            f"prepare-data could not decode {bad} images (see {MANIFEST}); restore them, or leave more out with "
            "its --max_bad_fraction, and run it again"
        )
    raise ValueError(f"{folder} is not complete: {reason}")


def check_counts(folder: Path, manifest: dict, classes: list[str], labels: Sequence[int] | np.ndarray) -> None:
    """Raise ValueError unless `folder` holds the classes and numbers of images that its manifest names."""
    found, wanted = count_classes(classes, labels)["counts"], manifest["counts"]
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder} has {found.get(name, 'no')} images of class {name!r}, wanted {wanted.get(name, 'none')} by "
                f"{MANIFEST}; run prepare-data again, or delete {MANIFEST} if you wanted this"
            )


def load_class_frequencies(path: str | os.PathLike) -> list[float]:
    """Return `class_frequencies` of the manifest `path` (the file or its folder), in class order, with sum 1.

    Raises ValueError for a missing file, one without frequencies, or one of an output that is not complete.
    """
    file = Path(path) / MANIFEST if os.path.isdir(path) else Path(path)
    try:
        manifest = json.loads(file.read_bytes())
        values, complete = [float(value) for value in manifest["class_frequencies"]], manifest["complete"]
    except OSError as error:
        reason = f"cannot read {file} ({error.strerror}); prepare-data makes it: pass its output"
        raise ValueError(f"class frequencies: {reason}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"class frequencies: {file} has no class_frequencies; pass that of prepare-data") from None
    if not complete:
        raise ValueError(f"class frequencies: {file} is of an unfinished prepare-data; run it again")
    if not all(math.isfinite(value) and value >= 0 for value in values) or not sum(values) > 0:
        raise ValueError(f"class frequencies: {file} holds values that are no probabilities; run prepare-data again")
    return [value / sum(values) for value in values]
