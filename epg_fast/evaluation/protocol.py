"""The protocol of figures: how the images were drawn and judged. Without it a number says nothing."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from epg_fast.config import JudgeConfig
from epg_fast.environment import versions
from epg_fast.evaluation.judge import Judges
from epg_fast.files import as_json, flat
from epg_fast.npz import Npz

log = logging.getLogger("epg_fast")
# Parts of names, joined by dots, that say nothing of what was done.
_NO_CHANGE = {"source", "checkpoint", "path", "seconds", "settings", "precision_error"}
_KEYS = ("labels", "sampler", "steps", "evaluations", "guidance", "interval", "precision", "seed", "checkpoint")


def protocol(
    judges: Judges,
    config: JudgeConfig,
    sampling: Mapping,
    num: int,
    size: tuple[int, int],
    device: torch.device,
    **judging,
) -> dict:
    """The protocol of figures of `num` images of `size` (height, width), for JSON.

    sampling: how they were drawn, with the names of settings.json of `sample`. judging: what is to be said of judging
    beside `config`, `judges` and the `device` where they are. Keys: `text` (for people), `sampling`, `judging`
    (`settings` of the command; `judges`: networks and references by SHA-256, constants), `versions`.
    """
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(JudgeConfig)}
    return {
        "text": judges.sentence(num, size),
        "sampling": dict(sampling),
        "judging": {"settings": settings, "judges": judges.description, **judging},
        "versions": versions(device),
    }


def protocol_changes(before: Mapping, now: Mapping) -> list[str]:
    """What differs between two protocols, a line each; where files are and how long things took is left out."""
    pairs = [flat(_ways(protocol)) for protocol in (before, now)]
    return [
        f"{name} was {pairs[0].get(name)!r}, now {pairs[1].get(name)!r}"
        for name in pairs[0] | pairs[1]
        if pairs[0].get(name) != pairs[1].get(name) and not {*name.split(".")} & _NO_CHANGE
    ]


def _ways(protocol: Mapping) -> dict:
    """A protocol with the last of the ways in which images were drawn, and without wishes that gave way."""
    sampling = {k: v for k, v in protocol["sampling"].items() if not k.startswith("wanted_")}
    drawn = sampling.get("drawn_with") or [{}]
    sampling |= {"drawn_with": drawn[-1], "ways": len(drawn)}
    return {"sampling": sampling, **{name: protocol[name] for name in ("judging", "versions")}}


def sampling_record(samples: str | os.PathLike, num: int) -> dict:
    """Return how the `num` images at `samples` were drawn, as `sample` noted it.

    The note is the entry `metadata` of an npz file; for a folder it is the settings.json in it, or beside it if the
    folder is the `png` of `sample`. Keys: `source` (where the note is), `num`, `labels` (the label protocol),
    `sampler`, `steps`, `evaluations` (network evaluations per image), `guidance`, `interval`, `precision`, `seed` and
    `checkpoint`, null where the note says nothing, then whatever else it says. Without a note that has one of these all
    are null and a warning is logged. Raises ValueError for a note that is not JSON of names and values.
    """
    source, note = _note(Path(samples))
    note.pop("class_names", None)  # of which nothing depends; see `class_names`
    if not note.keys() & set(_KEYS):
        log.warning("%s does not say how it was drawn: the result cannot be attributed to a sampler", samples)
        source, note = None, {}
    elif note.get("num", num) != num:
        log.warning("%s holds %d images, but %s is about %s", samples, num, source, note["num"])
    return dict.fromkeys(("source", "num", *_KEYS)) | note | {"source": source, "num": num}


def class_names(samples: str | os.PathLike) -> list[str]:
    """What the classes of samples are called, as `sample` noted it; nothing where it did not."""
    names = _note(Path(samples))[1].get("class_names")
    return names if isinstance(names, list) else []


def _note(samples: Path) -> tuple[str | None, dict]:
    """(where it is, what `sample` noted), or (None, {})."""
    if not samples.is_dir():
        file, source = Npz(samples), f"{samples}: metadata"
        return (source, _parse(source, str(file.array("metadata")))) if "metadata" in file.names else (None, {})
    for path in [samples / "settings.json", *([samples.parent / "settings.json"] if samples.name == "png" else [])]:
        if path.is_file():
            return str(path), _parse(path, path.read_bytes())
    return None, {}


def _parse(source: str | os.PathLike, text: str | bytes) -> dict:
    try:
        note = as_json(json.loads(text))
    except ValueError as error:
        raise ValueError(f"{source} is not JSON ({error}); mend or remove it") from error
    if not isinstance(note, dict):
        raise ValueError(f"{source}: expected names and values, got {type(note).__name__}; mend or remove it")
    return note
