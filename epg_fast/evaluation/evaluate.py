"""Samples of a file or folder: their figures, how far these can be trusted, and whether others differ from them."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from epg_fast.config import EvaluateConfig
from epg_fast.data import images_of
from epg_fast.distributed import resolve_device
from epg_fast.evaluation.figures import bootstrap, difference, measured
from epg_fast.evaluation.images import FolderStream, ImageStream, open_stream
from epg_fast.evaluation.judge import Judges, Rows, check_judges, join_rows, open_judges, take_rows
from epg_fast.evaluation.protocol import protocol, sampling_record

log = logging.getLogger("epg_fast")
# Normally distributed, of 20 equal pairs one is further apart.
_STANDARD_ERRORS = 2.0
_BATCH_SIZE = 64
_BOOTSTRAPPED = (
    "Spread: deviation over {} sets drawn from the samples with repetition, seed 0; of KID, recall and FID at infinity "
    "an estimate of their own."
)
_FIRST_ORDER = "Spread: standard error, from the first-order effect of each image."


def evaluate_images(config: EvaluateConfig) -> dict:
    """Figures of `config.samples`, for JSON.

    By a network (`reference` and `inception`, `dinov2`): `fid`, `fid_infinity`, `inception_score`, `precision`,
    `recall`, ... (null, and the reason in `missing`, where the reference has no images). Without (`train` and `test`):
    `accuracy` and `frechet_distance`. Then `spread` (name -> standard error or null), what helps to read the figures,
    `repeats` and `compared` if asked for, and `protocol`: see there. What can be checked is checked before a network
    runs. Raises ValueError for files that do not fit.
    """
    begun, batch_size = time.perf_counter(), config.batch_size or _BATCH_SIZE
    check_judges(config)
    streams = []
    for name in ("samples", *(["compare"] if config.compare else [])):
        with images_of(name):
            streams.append(open_stream(getattr(config, name)))
    samples = streams[0]
    sampling = [sampling_record(stream.path, stream.num) for stream in streams]
    device = resolve_device(config.device if config.reference else "cpu")
    judges = open_judges(config, samples.size, device, batch_size=batch_size)
    for stream in streams:
        _check(config, stream, samples, judges)
    rows = [_rows(judges, stream, batch_size) for stream in streams]
    figures = judges.figures(rows[0])
    parts = _repeats(config, judges, rows[0]) if config.repeats > 1 else {}
    compared = _compared(streams, sampling, figures, judges.figures(rows[1])) if config.compare else {}
    values = {name: figure.value for name, figure in figures.items()}
    if wild := next((name for name, value in values.items() if not math.isfinite(value)), None):
        raise ValueError(
            f"{wild} is {values[wild]}: features of {config.samples} or of {config.reference or config.test} are too "
            "large to be compared; compute them again"
        )
    missing = dict.fromkeys(judges.missing)
    spreads = measured(figures)["spread"] | bootstrap(figures, config.bootstrap)
    _say(values, spreads, compared, samples.num)
    return {
        "kind": "images",
        "samples": str(config.samples),
        **values,
        **missing,
        "spread": spreads | missing,
        **({"missing": judges.missing} if missing else {}),
        "num_samples": samples.num,
        "image_size": list(samples.size),
        **judges.facts(figures, rows[0], samples.size),
        **({"repeats": parts} if parts else {}),
        **({"compared": compared} if compared else {}),
        "protocol": protocol(
            *(judges, config, sampling[0], samples.num, samples.size, device),
            spread=_BOOTSTRAPPED.format(config.bootstrap) if config.bootstrap else _FIRST_ORDER,
            bootstrap=config.bootstrap,
            repeats=config.repeats,
            batch_size=batch_size,
            seconds=time.perf_counter() - begun,
        ),
    }


def _say(values: dict, spreads: dict, compared: dict, num: int) -> None:
    """The figures in a line each, beside the JSON."""
    for name, value in values.items():
        log.info("%s %.5g%s (%d images)", name, value, _plus_minus(spreads[name]), num)
        if name in compared:
            change, spread, differs = (compared[name][key] for key in ("difference", "spread", "differs"))
            verdict = {True: "more than chance", False: "no more than chance", None: "not known if by chance"}[differs]
            log.info("  %s: %+.4g%s, %s", compared["samples"], change, _plus_minus(spread), verdict)


def _plus_minus(spread: float | None) -> str:
    return "" if spread is None else f" +- {spread:.2g}"


def _rows(judges: Judges, stream: ImageStream, batch_size: int) -> Rows:
    number = -(-stream.num // batch_size)
    batches = tqdm(stream.batches(batch_size), total=number, desc=stream.path.name, unit="batch")
    labels = stream.labels
    return join_rows([judges.rows(batch, None if labels is None else labels[part]) for part, batch in batches])


def _repeats(config: EvaluateConfig, judges: Judges, rows: Rows) -> dict:
    """Figures of equal parts of the samples: name -> values, their mean and deviation, and the best of them."""
    num = len(next(iter(rows.values())))
    each = num // config.repeats
    apart = [judges.figures(take_rows(rows, slice(i * each, (i + 1) * each))) for i in range(config.repeats)]
    found: dict = {"num": config.repeats, "images_each": each}
    for name in apart[0]:
        values = [figures[name].value for figures in apart]
        best = {"minimum": min(values)} if judges.best[name] == "low" else {"maximum": max(values)}
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
        found[name] = {"values": values, "mean": mean, "deviation": deviation, **best}
    return found


def _compared(streams: list[ImageStream], sampling: list[dict], ours: dict, others: dict) -> dict:
    """name -> by how much the other samples exceed ours, the standard error of that, and whether chance explains it."""
    paired = _share_noise(streams, sampling)
    if streams[0].num != streams[1].num:
        log.warning(
            "%s holds %d images and %s %d: figures that depend on the number are not compared; give equal numbers",
            *(streams[0].path, streams[0].num, streams[1].path, streams[1].num),
        )
    found: dict = {"samples": str(streams[1].path), "num_samples": streams[1].num, "same_noise": paired}
    for name, figure in ours.items():
        if name in others:
            change, spread = difference(others[name], figure, paired)
            unequal = figure.by_number and streams[0].num != streams[1].num
            differs = None if spread is None or unequal else bool(abs(change) > _STANDARD_ERRORS * spread)
            found[name] = {"value": others[name].value, "difference": change, "spread": spread, "differs": differs}
    return found


def _share_noise(streams: list[ImageStream], sampling: list[dict]) -> bool:
    """Whether image i of both comes from the same noise and label, as their notes say."""
    a, b = streams
    same_labels = a.labels is not None and b.labels is not None and np.array_equal(a.labels, b.labels)
    seeds = [note["seed"] for note in sampling]
    return same_labels and None not in seeds and seeds[0] == seeds[1]


def _check(config: EvaluateConfig, stream: ImageStream, first: ImageStream, judges: Judges) -> None:
    if stream.size != first.size:
        got, wanted = ("x".join(map(str, size[::-1])) for size in (stream.size, first.size))
        raise ValueError(
            f"{stream.path}: its images are {got}, those of {first.path} {wanted}; give images of one size"
        )
    each, of = stream.num // config.repeats, "images" if config.repeats == 1 else "images in each of the repeats"
    if stream.num % config.repeats:
        raise ValueError(
            f"repeats is {config.repeats}, which does not divide the {stream.num} images of {stream.path}; give a "
            "number that does"
        )
    if config.repeats > 1 and isinstance(stream, FolderStream) and len(stream.classes) > 1:
        raise ValueError(
            f"repeats: {stream.path} holds class folders, whose images come class by class, so that parts differ in "
            "their classes; give the samples.npz"
        )
    if config.reference and Path(stream.path).resolve() == Path(config.reference).resolve():
        log.warning("%s is judged against itself: its figures say nothing", stream.path)
    if each < judges.least:
        raise ValueError(
            f"{stream.path} holds {each} {of}, want at least {judges.least}: one per split, and more than there are "
            f"neighbours; draw more (the paper's figures are of 50000), or lower --splits (now "
            f"{config.splits}) or --neighbors (now {config.neighbors})"
        )
    judges.check(each)
    # A folder of a few sampled classes would be numbered 0, 1, ... whatever they are.
    if config.train and isinstance(stream, FolderStream):
        wanted = len([path for path in Path(config.train).iterdir() if path.is_dir()])
        if len(stream.classes) != wanted:
            raise ValueError(
                f"{stream.path} has {len(stream.classes)} class folders and {config.train} {wanted}, so that their "
                "class indices differ; sample every class, or give the samples.npz, which knows its labels"
            )
