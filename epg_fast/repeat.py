"""`evaluate --protocol`: the images of a result are drawn and judged again, and compared with it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from epg_fast.config import EvaluateConfig, JudgeConfig, SampleConfig
from epg_fast.distributed import is_main, resolve_device
from epg_fast.evaluation import command as judging
from epg_fast.evaluation.images import open_stream
from epg_fast.evaluation.judge import open_judges
from epg_fast.evaluation.protocol import protocol_changes
from epg_fast.files import as_json
from epg_fast.sampling import command as sampling

log = logging.getLogger("epg_fast")

_PATHS = ("reference", "inception", "dinov2", "train", "test")
_HOW = ("protocol", "checkpoint", "outdir", "page", "output", "device", "batch_size")


def run(config: EvaluateConfig) -> None:
    """Draw the images of the result `config.protocol` again, judge them and say what differs.

    The result is that of `evaluate`, with `repeated`: `protocol` (what differs), `figures` (name -> then, now, the
    difference and how many standard errors that is) and `images` (whether they are the same bit for bit). Under
    torchrun the ranks share the drawing, and the main one judges. Raises ValueError, before anything is drawn, for a
    file that is no such result, and for weights, networks, references and folders that are others than then.
    """
    before = _read(config)
    try:
        judged, drawn = _commands(config, before)
    except (ValueError, TypeError) as error:
        raise ValueError(f"protocol: {config.protocol}: {error}") from error

    def draw() -> None:
        sampling.run(drawn, {name: before["protocol"]["sampling"][name] for name in sampling.CHECKSUMS})

    def evaluate(_: EvaluateConfig) -> dict:
        _require_judges(judged, before)
        draw()
        now = judging.evaluate_images(judged)
        return now | {"repeated": compared(before, now)}

    if not is_main():
        draw()
        return
    for line in _lines(config.protocol, judging.run(config, evaluate)["repeated"]):
        log.info("%s", line)


def compared(before: Mapping, now: Mapping) -> dict:
    """What `repeated` of a result is, from two results."""
    figures = {}
    for name, spread in now["spread"].items():
        then, here, errors = before.get(name), now.get(name), [before["spread"].get(name), spread]
        if then is not None and here is not None:
            together = math.hypot(*errors) if None not in errors else None
            figures[name] = {"then": then, "now": here, "spread": errors, "difference": here - then}
            figures[name]["standard_errors"] = (here - then) / together if together else None
    return {
        "protocol": protocol_changes(before["protocol"], as_json(now["protocol"])),
        "figures": figures,
        "images": _images(before["samples"], now["samples"]),
    }


def _read(config: EvaluateConfig) -> dict:
    """The result that is to be repeated."""
    if not config.outdir:
        raise ValueError("evaluate: --protocol needs --outdir, a folder for the images that are drawn")
    default = EvaluateConfig()
    for field in dataclasses.fields(EvaluateConfig):
        if field.name not in (*_HOW, *_PATHS) and getattr(config, field.name) != getattr(default, field.name):
            raise ValueError(f"evaluate: got --{field.name} with --protocol, which has its own; leave it out")
    path = Path(config.protocol)
    try:
        result = json.loads(path.read_bytes())
        protocol = result["protocol"]
        parts = [protocol["sampling"], protocol["versions"], protocol["judging"]["settings"]]
        parts += [result["spread"], *protocol["judging"]["judges"].values()]
        if not all(isinstance(part, dict) for part in parts) or not isinstance(result["samples"], str):
            raise TypeError("its parts are no mappings")
        _, _ = result["image_size"]
    except OSError as error:
        raise ValueError(f"protocol: {path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"protocol: {path} is no result with a protocol; want a file that `evaluate --samples ... --output` of "
            "this version has written"
        ) from None
    if Path(config.outdir).resolve() in Path(result["samples"]).resolve().parents:
        raise ValueError(f"outdir: {config.outdir} holds the images of {path}; choose another --outdir")
    return result


def _commands(config: EvaluateConfig, before: Mapping) -> tuple[EvaluateConfig, SampleConfig]:
    """The commands that judge and draw as then, with the paths that are said to be others now."""
    then, note, npz = before["protocol"]["judging"], before["protocol"]["sampling"], before["samples"].endswith(".npz")
    settings = {f.name: then["settings"][f.name] for f in dataclasses.fields(JudgeConfig) if f.name in then["settings"]}
    settings |= {name: then[name] for name in ("bootstrap", "repeats", "batch_size") if name in then}
    settings |= {name: getattr(config, name) for name in (*_PATHS, "batch_size") if getattr(config, name)}
    samples = Path(config.outdir) / ("samples.npz" if npz else "png")
    changed = {"device": config.device, "npz": npz, "png": not npz}
    changed |= {name: note.get(name) for name in sampling.GIVES_WAY}
    changed |= {name: getattr(config, name) for name in ("checkpoint", "batch_size") if getattr(config, name)}
    judged = EvaluateConfig(**settings, samples=str(samples), device=config.device)
    return judged, sampling.drawn_again(note, config.outdir, **changed)


def _require_judges(judged: EvaluateConfig, before: Mapping) -> None:
    """Raise ValueError for a network or real images that are others than then."""
    device = resolve_device(judged.device if judged.reference else "cpu")
    now = open_judges(judged, tuple(before["image_size"]), device).description
    for name, judge in before["protocol"]["judging"]["judges"].items():
        for part, then in judge.items():
            here, option = now.get(name, {}).get(part), name if part == "network" else part
            if isinstance(then, Mapping) and isinstance(here, Mapping):
                got, want = (found.get("sha256", found.get("fingerprint")) for found in (here, then))
                if got != want:
                    raise ValueError(
                        f"{option}: {here['path']} is not what it was (checksum {got}, want {want}); say with "
                        f"--{option} where {then['path']} is now"
                    )


def _images(then: str, now: str) -> dict:
    """Whether images are the same, where those of then are still there."""
    found = {"then": then, "now": now, "same": None}
    if not Path(then).exists():
        return found | {"why": "those of then are not there any more"}
    try:
        streams = [open_stream(path) for path in (then, now)]
        if (streams[0].num, streams[0].size) != (streams[1].num, streams[1].size):
            return found | {"same": False, "why": "their numbers or sizes differ"}
        differ, most = 0, 0
        for (_, a), (_, b) in zip(*(stream.batches(64) for stream in streams), strict=True):
            levels = np.abs(a.numpy().astype(np.int16) - b.numpy()).reshape(len(a), -1).max(axis=1)
            differ, most = differ + int((levels > 0).sum()), max(most, int(levels.max()))
    except ValueError as error:
        return found | {"why": str(error)}
    return found | {"same": not differ, "num": streams[0].num, "differ": differ, "most_levels": most}


def _lines(path: str, repeated: Mapping) -> Iterator[str]:
    yield f"protocol: {'differs from' if repeated['protocol'] else 'as in'} {path}"
    yield from (f"  {change}" for change in repeated["protocol"])
    for name, f in repeated["figures"].items():
        then, now = map(judging.plus_minus, (f["then"], f["now"]), f["spread"])
        far = "" if f["standard_errors"] is None else f", {abs(f['standard_errors']):.2g} standard errors"
        yield f"{name}: then {then}, now {now}, difference {f['difference']:+.3g}{far}"
    images = repeated["images"]
    then = f"those of {images['then']}"
    if images["same"]:
        yield f"images: all {images['num']} are {then}, bit for bit"
    elif "differ" in images:
        by = f"by at most {images['most_levels']} of 255 levels"
        yield f"images: {images['differ']} of {images['num']} are not {then}, {by}"
    else:
        yield f"images: not compared with {then}: {images['why']}"
