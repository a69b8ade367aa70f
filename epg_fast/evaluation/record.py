"""How the judged images were drawn: without it a number says nothing."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path

from epg_fast.evaluation.npz import Npz

log = logging.getLogger("epg_fast")
_KEYS = ("labels", "sampler", "steps", "evaluations", "guidance", "interval", "precision", "seed", "checkpoint")


def sampling_record(samples: str | os.PathLike, num: int) -> dict:
    """Return how the `num` images at `samples` were drawn, as `sample` noted it.

    The note is the entry `metadata` of an npz file; for a folder it is the settings.json in it, or beside it if the
    folder is the `png` of `sample`. Keys: `source` (where the note is), `num`, `labels` (the label protocol),
    `sampler`, `steps`, `evaluations` (network evaluations per image), `guidance`, `interval`, `precision`, `seed` and
    `checkpoint`, null where the note says nothing, then whatever else it says. Without a note that has one of these
    all are null and a warning is logged. Raises ValueError for a note that is not JSON of names and values.
    """
    source, note = _note(Path(samples))
    if not note.keys() & set(_KEYS):
        log.warning("%s does not say how it was drawn: the result cannot be attributed to a sampler", samples)
        source, note = None, {}
    elif note.get("num", num) != num:
        log.warning("%s holds %d images, but %s is about %s", samples, num, source, note["num"])
    return dict.fromkeys(("source", "num", *_KEYS)) | note | {"source": source, "num": num}


def _note(samples: Path) -> tuple[str | None, dict]:
    if not samples.is_dir():
        file = Npz(samples)
        if "metadata" not in file.names:
            return None, {}
        return f"{samples}: metadata", _parse(f"{samples}: metadata", str(file.array("metadata")))
    for path in [samples / "settings.json", *([samples.parent / "settings.json"] if samples.name == "png" else [])]:
        if path.is_file():
            return str(path), _parse(path, path.read_bytes())
    return None, {}


def _finite_float(text: str) -> float | str:
    return value if math.isfinite(value := float(text)) else text


def _parse(source: str | os.PathLike, text: str | bytes) -> dict:
    try:
        # Strict JSON, which the result becomes, has no word for what is not finite.
        note = json.loads(text, parse_constant=str, parse_float=_finite_float)
    except ValueError as error:
        raise ValueError(f"{source} is not JSON ({error}); mend or remove it") from error
    if not isinstance(note, dict):
        raise ValueError(f"{source}: expected names and values, got {type(note).__name__}; mend or remove it")
    return note
