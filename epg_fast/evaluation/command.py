"""The `evaluate` command: figures of samples, how far these can be trusted, and whether others differ from them."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from epg_fast.config import EvaluateConfig
from epg_fast.data import images_of
from epg_fast.distributed import resolve_device
from epg_fast.evaluation.figures import Figure, bootstrap, difference, measured
from epg_fast.evaluation.images import FolderStream, ImageStream, open_stream, size_words
from epg_fast.evaluation.judge import Judges, Rows, check_judges, join_rows, open_judges, take_rows
from epg_fast.evaluation.page import MARK, result_page
from epg_fast.evaluation.probe import evaluate_probe
from epg_fast.evaluation.protocol import protocol, sampling_record
from epg_fast.files import as_json, check_writable, differences, write_atomically
from epg_fast.models import create_encoder, from_pretrained, list_presets

log = logging.getLogger("epg_fast")
# Normally distributed, of 20 equal pairs one is further apart.
_STANDARD_ERRORS = 2.0
_BATCH_SIZE = 64
_BOOTSTRAPPED = (
    "Spread: deviation over {} sets drawn from the samples with repetition, seed 0; of KID, recall and FID at infinity "
    "an estimate of their own."
)
_FIRST_ORDER = "Spread: standard error, from the first-order effect of each image."


def run(config: EvaluateConfig, evaluate: Callable[[EvaluateConfig], dict] | None = None) -> dict:
    """Judge samples or an encoder, print the result as JSON and write it to `config.output`; returns it.

    evaluate: what makes the result, if not what `config` asks for. `config.page` is written as well.

    The result holds its `settings`, so that the same command may replace its own result; any other file is left alone.
    Raises ValueError for settings that do not go together and for such a file, before anything is computed.
    """
    evaluate = evaluate or _chosen(config)
    unrelated = ("output", "page", "device", "batch_size")
    settings = as_json({k: v for k, v in dataclasses.asdict(config).items() if k not in unrelated})
    if config.output:
        _check_output(Path(config.output), settings)
    if config.page:
        _check_page(Path(config.page), config.output)
    result = evaluate(config) | {"settings": settings}
    text = json.dumps(result, indent=2, allow_nan=False)
    if config.output:
        write_atomically(config.output, text + "\n")
    if config.page:
        write_atomically(config.page, result_page(result, config.output))
    print(text)
    return result


def _chosen(config: EvaluateConfig) -> Callable[[EvaluateConfig], dict]:
    for name in ("checkpoint", "outdir"):
        if getattr(config, name):
            raise ValueError(f"evaluate: got --{name} without --protocol, which it goes with")
    if bool(config.samples) == bool(config.probe):
        raise ValueError("evaluate: pass either --samples (images to judge) or --probe (an encoder to judge)")
    if config.samples:
        return evaluate_images
    names = ("reference", "inception", "dinov2", "compare", "page", "repeats", "bootstrap", "splits")
    if other := next((name for name in names if getattr(config, name) != getattr(EvaluateConfig, name)), None):
        raise ValueError(f"evaluate: got --{other} with --probe; it goes with --samples")
    return _probe


def _probe(config: EvaluateConfig) -> dict:
    """The probe of a checkpoint, or of a preset's fresh weights."""
    device = resolve_device(config.device)
    if config.probe in list_presets():
        torch.manual_seed(config.seed)
        encoder = create_encoder(config.probe).to(device).eval()
    else:
        encoder = from_pretrained(config.probe, device=device)
    return evaluate_probe(config, encoder, None if config.normalization == "auto" else config.normalization)


def _check_page(path: Path, output: str | None) -> None:
    """Raise ValueError unless the file is new or a page of ours; nothing is written."""
    check_writable(path, "page")
    if path.is_dir():
        raise ValueError(f"page: {path} is a folder; name a file, such as {path / 'page.html'}")
    if output and path.resolve() == Path(output).resolve():
        raise ValueError(f"page: {path} is the --output, too; choose another --page")
    if path.exists():
        with open(path, "rb") as file:  # which may be a large one
            if MARK.encode() not in file.read(500):
                raise ValueError(
                    f"page: {path} exists and is no page of `evaluate`; choose another --page or delete it"
                )


def _check_output(path: Path, settings: dict) -> None:
    """Raise ValueError unless the file is new or holds a result of these settings; nothing is written."""
    check_writable(path, "output")
    if not path.exists():
        return
    try:
        before = json.loads(path.read_bytes())["settings"]
        changed = differences(before, settings)
    except (ValueError, OSError, LookupError, TypeError, AttributeError):
        raise ValueError(
            f"output: {path} exists and is no result of `evaluate`; choose another --output or delete it"
        ) from None
    if changed:
        raise ValueError(
            f"output: {path} holds the result of other settings ({changed}); choose another --output or delete it"
        )


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
    parts = _repeats(config.repeats, judges, rows[0], samples.num) if config.repeats > 1 else None
    compared = _compared(streams, sampling, figures, judges.figures(rows[1])) if config.compare else None
    values = {name: figure.value for name, figure in figures.items()}
    if wild := next((name for name, value in values.items() if not math.isfinite(value)), None):
        raise ValueError(
            f"{wild} is {values[wild]}: features of {config.samples} or of {config.reference or config.test} are too "
            "large to be compared; compute them again"
        )
    missing = dict.fromkeys(judges.missing)
    spreads = measured(figures)["spread"] | bootstrap(figures, config.bootstrap)
    _say(values, spreads, compared or {}, samples.num)
    optional = {"missing": judges.missing, "repeats": parts, "compared": compared}
    return {
        "kind": "images",
        "samples": str(config.samples),
        **values,
        **missing,
        "spread": spreads | missing,
        "num_samples": samples.num,
        "image_size": list(samples.size),
        **judges.facts(figures, rows[0], samples.size),
        **{name: found for name, found in optional.items() if found},
        "protocol": protocol(
            *(judges, config, sampling[0], samples.num, samples.size, device),
            spread=_BOOTSTRAPPED.format(config.bootstrap) if config.bootstrap else _FIRST_ORDER,
            bootstrap=config.bootstrap,
            repeats=config.repeats,
            batch_size=batch_size,
            seconds=time.perf_counter() - begun,
        ),
    }


def plus_minus(value: float, spread: float | None, form: str = ".5g") -> str:
    """A figure with its spread."""
    return f"{value:{form}}" + ("" if spread is None else f" +- {spread:.2g}")


def _say(values: dict, spreads: dict, compared: dict, num: int) -> None:
    """The figures in a line each, beside the JSON."""
    for name, value in values.items():
        log.info("%s %s (%d images)", name, plus_minus(value, spreads[name]), num)
        if found := compared.get(name):
            verdicts = {True: "more than chance", False: "no more than chance", None: "not known if by chance"}
            change = plus_minus(found["difference"], found["spread"], "+.4g")
            log.info("  %s: %s, %s", compared["samples"], change, verdicts[found["differs"]])


def _rows(judges: Judges, stream: ImageStream, batch_size: int) -> Rows:
    number = -(-stream.num // batch_size)
    batches = tqdm(stream.batches(batch_size), total=number, desc=stream.path.name, unit="batch")
    labels = stream.labels
    return join_rows([judges.rows(batch, None if labels is None else labels[part]) for part, batch in batches])


def _repeats(times: int, judges: Judges, rows: Rows, num: int) -> dict:
    """Figures of equal parts of the samples: name -> values, their mean and deviation, and the best of them."""
    each = num // times
    apart = [judges.figures(take_rows(rows, slice(i * each, (i + 1) * each))) for i in range(times)]
    found: dict = {"num": times, "images_each": each}
    for name in apart[0]:
        values = [figures[name].value for figures in apart]
        best = {"minimum": min(values)} if judges.best[name] == "low" else {"maximum": max(values)}
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
        found[name] = {"values": values, "mean": mean, "deviation": deviation, **best}
    return found


def _compared(
    streams: list[ImageStream], sampling: list[dict], ours: Mapping[str, Figure], others: Mapping[str, Figure]
) -> dict:
    """name -> by how much the other samples exceed ours, the standard error of that, and whether chance explains it."""
    (a, b), seeds = streams, [note["seed"] for note in sampling]
    # whether image i of both comes from the same noise and label, as their notes say
    same_labels = a.labels is not None and b.labels is not None and np.array_equal(a.labels, b.labels)
    paired = same_labels and None not in seeds and seeds[0] == seeds[1]
    if a.num != b.num:
        log.warning(
            "%s holds %d images and %s %d: figures that depend on the number are not compared; give equal numbers",
            *(a.path, a.num, b.path, b.num),
        )
    found: dict = {"samples": str(b.path), "num_samples": b.num, "same_noise": paired}
    for name in (name for name in ours if name in others):
        change, spread = difference(others[name], ours[name], paired)
        unequal = ours[name].by_number and a.num != b.num
        differs = None if spread is None or unequal else bool(abs(change) > _STANDARD_ERRORS * spread)
        found[name] = {"value": others[name].value, "difference": change, "spread": spread, "differs": differs}
    return found


def _check(config: EvaluateConfig, stream: ImageStream, first: ImageStream, judges: Judges) -> None:
    """Raise ValueError for samples that cannot be judged as asked; warn of what would say nothing."""
    path, each = stream.path, stream.num // config.repeats
    if stream.size != first.size:
        got, wanted = map(size_words, (stream.size, first.size))
        raise ValueError(f"{path}: its images are {got}, those of {first.path} {wanted}; give images of one size")
    if stream.num % config.repeats:
        raise ValueError(
            f"repeats is {config.repeats}, which does not divide the {stream.num} images of {path}; give a number that "
            "does"
        )
    if config.repeats > 1 and isinstance(stream, FolderStream) and len(stream.classes) > 1:
        raise ValueError(
            f"repeats: {path} holds class folders, whose images come class by class, so that parts differ in their "
            "classes; give the samples.npz"
        )
    if config.reference and path.resolve() == Path(config.reference).resolve():
        log.warning("%s is judged against itself: its figures say nothing", path)
    if each < judges.least:
        of = "images" if config.repeats == 1 else "images in each of the repeats"
        raise ValueError(
            f"{path} holds {each} {of}, want at least {judges.least}: one per split, and more than there are "
            f"neighbours; draw more (the paper's figures are of 50000), or lower --splits (now {config.splits}) or "
            f"--neighbors (now {config.neighbors})"
        )
    judges.check(each)
    # A folder of a few sampled classes would be numbered 0, 1, ... whatever they are.
    if config.train and isinstance(stream, FolderStream):
        wanted = len([path for path in Path(config.train).iterdir() if path.is_dir()])
        if len(stream.classes) != wanted:
            raise ValueError(
                f"{path} has {len(stream.classes)} class folders and {config.train} {wanted}, so that their class "
                "indices differ; sample every class, or give the samples.npz, which knows its labels"
            )
