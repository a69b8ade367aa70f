"""The `sample` command: labels, network, images, files."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from epg_fast.config import SampleConfig, SweepConfig
from epg_fast.distributed import Ranks, joined, resolve_device, resumable
from epg_fast.environment import versions
from epg_fast.files import OutputFolder, as_json
from epg_fast.flags import parse
from epg_fast.models import EPGViT, from_pretrained
from epg_fast.models.weight_files import state_sha256
from epg_fast.plans import PLAIN, Machine, choose_together
from epg_fast.runtime import suitable_threads
from epg_fast.sampling.engine import SamplingEngine
from epg_fast.sampling.labels import choose_labels
from epg_fast.sampling.outputs import Outputs, Parts, runs
from epg_fast.sampling.precision import image_error

log = logging.getLogger("epg_fast")

# Ranks meet only before the first image and after the last, and a slow one may have hours more to do. A rank that dies
# closes its connections, which the others notice at once.
PATIENCE = datetime.timedelta(days=30)
_ERROR = "precision.json"
_REFERENCE = {"precision": "fp32", "compile": "off", "cuda_graphs": False, "ops": PLAIN}
# How images are drawn and kept, which changes their last bits at most.
_HOW = ("outdir", "device", "batch_size", "npz", "png", "error_images", "compile", "cuda_graphs", "ops")
GIVES_WAY = ("precision", "parameterization", "normalization")
_NOT_COMPARED = ("checkpoint", "autoguidance", "evaluations", "drawn_with", "ema", "class_names")
CHECKSUMS = {"weights_sha256": "checkpoint", "autoguidance_sha256": "autoguidance", "labels_sha256": "labels"}
"""Of what settings.json holds a SHA-256, and the option that says where it is."""
# What a checkpoint says of how its weights were averaged.
_EMA = ("stage", "step", "ema_decay", "sigma_rel", "posthoc_ema")


def run(config: SampleConfig, expected: Mapping[str, str] | None = None) -> None:
    """Draw `config.num` images and write samples.npz, PNG files or both, and grid.png, to `config.outdir`.

    Under torchrun the ranks share the batches. Images are kept on disk batch by batch: the same command goes on where
    one that was stopped or killed had come, with any batch size and number of ranks, and leaves finished work alone.
    Raises ValueError for what the user can mend, before anything is written (checkpoint, labels, guidance, an output
    folder of other settings or in use); OSError when the disk fails; `Interrupted` after a signal. expected: checksums
    of weights and labels by their names in settings.json; others are refused, too.
    """
    _require_names(config)
    with joined(config.device, "gloo", PATIENCE) as ranks:
        _run(config, ranks, expected)


def check_command(config: SampleConfig) -> None:
    """Raise ValueError for what is wrong with a command before anything takes long."""
    _require_names(config)
    SampleFolder(config.outdir).require(requested(config))


def _require_names(config: SampleConfig) -> None:
    if not config.checkpoint or not config.outdir:
        raise ValueError("sample: --checkpoint and --outdir are needed")


def _run(config: SampleConfig, ranks: Ranks, expected: Mapping[str, str] | None = None) -> None:
    folder, settings = SampleFolder(config.outdir), requested(config)
    ranks.decide(lambda: folder.require(settings))  # before weights are read, which may take long
    model = load_generator(config.checkpoint, ranks.device)
    weak = load_generator(config.autoguidance, ranks.device) if config.autoguidance else None
    labels, names = labels_of(config, model), model.metadata.get("class_names", [])
    untrained = model.metadata.get("untrained_classes", [])
    if untrained and config.labels in ("balanced", "random"):
        left = model.num_classes - len(untrained)
        log.info("%s was trained on %d of its %d classes: these are drawn", config.checkpoint, left, model.num_classes)
    own = {"steps": config.steps, "guidance": config.guidance, "interval": tuple(config.interval)}
    options = engine_options(config) | own
    engine = SamplingEngine(model, weak=weak, ops=lambda case: choose_together(config.ops, case, ranks), **options)
    settings |= resolved(model, weak, labels, engine) | ({"class_names": names} if names else {})
    using = drawn_with(engine, alike(settings, ranks))
    _require_expected(config, settings, expected or {})
    outputs = Outputs(folder.path, labels, model.image_size, config.npz, config.png, names)
    with suitable_threads(engine.model, engine.chosen.threads), folder:
        missing = ranks.decide(lambda: _claim(folder, outputs, engine.batch_size, settings, using))
        if missing is None:
            log.info("%s already holds these samples", folder.path)
            return
        require_shared(folder, ranks)
        with resumable(folder.path):
            number = min(config.error_images, config.batch_size, config.num) if missing and ranks.main else 0
            if number and engine.precision != "fp32" and not (folder.path / _ERROR).exists():
                reference = SamplingEngine(model, weak=weak, **options | _REFERENCE)
                folder.write(_ERROR, _precision_error(config, engine, reference, labels, number))
                del reference
            del model, weak  # of which the engine may have a copy in 16 bits
            _draw(engine, outputs, missing, config.seed, ranks)
            if ranks.main:
                error = folder.read(_ERROR)
                outputs.finish(folder.read() | ({"precision_error": error} if error else {}))
                log.info("%d images in %s", len(labels), folder.path)


def _require_expected(config: SampleConfig, settings: dict, expected: Mapping[str, str]) -> None:
    """Raise ValueError for weights or labels of another checksum than is expected."""
    for name, wanted in expected.items():
        if settings[name] != wanted:
            option = CHECKSUMS[name]
            raise ValueError(
                f"{option}: {getattr(config, option)} gives other {'labels' if option == 'labels' else 'weights'} than "
                f"before (SHA-256 {settings[name]}, want {wanted}); give the same as then"
            )


def load_generator(source: str, device: torch.device) -> EPGViT:
    """The generator of a checkpoint. Raises ValueError for an encoder, which draws nothing."""
    model = from_pretrained(source, device=device)
    if not isinstance(model, EPGViT):
        raise ValueError(f"{source} holds a pre-trained encoder, which cannot draw images; fine-tune it first")
    return model


def labels_of(config: SampleConfig | SweepConfig, model: EPGViT) -> np.ndarray:
    """Labels [num] of the images that a command asks for."""
    metadata = model.metadata
    classes = model.num_classes, config.seed, metadata.get("untrained_classes", []), metadata.get("class_names", [])
    return np.array(choose_labels(config.labels, config.num, *classes))


def engine_options(config: SampleConfig | SweepConfig) -> dict:
    """Arguments of the engine that no setting of a sweep changes."""
    names = ("sampler", "clamp", "precision", "batch_size", "compile", "cuda_graphs")
    by_checkpoint = ("parameterization", "normalization")
    return {
        **{name: getattr(config, name) for name in names},
        **{name: None if getattr(config, name) == "auto" else getattr(config, name) for name in by_checkpoint},
        **config.churn,
    }


def alike(settings: dict, ranks: Ranks) -> list[str]:
    """The device names of all ranks. Raises ValueError on all of them when the settings of one differ."""
    everyone = ranks.gather((settings, Machine.here(ranks.device).device))
    different = [rank for rank, (theirs, _) in enumerate(everyone) if theirs != everyone[0][0]]
    if different:
        raise ValueError(f"rank {different[0]} has read other weights or labels than rank 0; give all the same files")
    return [name for _, name in everyone]


def _claim(folder: SampleFolder, outputs: Outputs, batch_size: int, settings: dict, using: dict) -> list[range] | None:
    """The images to draw, with the folder locked and its settings written; None when nothing is left to do."""
    folder.lock()
    folder.require(settings)
    outputs.scan()
    if outputs.finished:
        return None
    missing = outputs.missing(batch_size)
    if not folder.begun:
        (folder.path / _ERROR).unlink(missing_ok=True)  # of other settings, perhaps
    if missing:
        folder.note(settings, using)
    return missing


def require_shared(folder: OutputFolder, ranks: Ranks) -> None:
    """Raise ValueError on all ranks when one does not see what the main one has written."""
    blind = [rank for rank, sees in enumerate(ranks.gather(folder.marker.exists())) if not sees]
    if blind:
        raise ValueError(
            f"rank {blind[0]} does not see {folder.path} of rank 0; --outdir must be a folder that nodes share"
        )


def _precision_error(
    config: SampleConfig, engine: SamplingEngine, reference: SamplingEngine, labels: np.ndarray, number: int
) -> dict:
    """How far the engine's first images are from those in fp32."""
    want = reference(labels_for(engine, labels[:number]), seed=config.seed)
    # of a whole batch where another number of images would have to be compiled for
    drawn = labels[: engine.batch_size if engine.fills_batches else number]
    _, got = next(engine.stream(labels_for(engine, drawn), seed=config.seed))
    if not want.isfinite().all():
        raise ValueError(f"{config.checkpoint}: its images are not finite, also in fp32: the model diverged")
    if not got[:number].isfinite().all():
        raise ValueError(f"precision {engine.precision}: images of this model are not finite in it; take bf16 or fp32")
    error = image_error(got[:number], want)
    log.info(
        "%s: off by %.2g of fp32 (relative L2 norm), PSNR %.1f dB, in the first %d images",
        *(engine.precision, error["relative_l2"], error["psnr_db"], number),
    )
    return as_json({"precision": engine.precision, "images": number} | error)


def labels_for(engine: SamplingEngine, labels: np.ndarray) -> np.ndarray | int:
    """Labels as the engine takes them: their number for a model without classes."""
    return labels if engine.model.num_classes else len(labels)


def _draw(engine: SamplingEngine, outputs: Outputs, missing: list[range], seed: int, ranks: Ranks) -> None:
    """Draw this rank's share and wait for the others; then the main rank knows of all parts."""
    total, mine, written = len(outputs.labels), missing[ranks.rank :: ranks.world_size], []
    with shared_bar("sample", ranks, total - sum(map(len, missing)), total) as show:
        if mine:
            indices = np.concatenate([np.arange(images.start, images.stop) for images in mine])
            labels = labels_for(engine, outputs.labels[indices])
            for where, pixels in engine.stream(labels, indices, seed, as_uint8=True):
                for images in runs(indices[where]):
                    written.append(outputs.save_part(images.start, pixels[: len(images)]))
                    pixels = pixels[len(images) :]
                    show(len(images))
        everyone = ranks.gather(written, while_waiting=show)
        show()
    count_written(ranks, [[(outputs.parts, images) for images in written] for written in everyone])


@contextlib.contextmanager
def shared_bar(command: str, ranks: Ranks, done: int, total: int, counted: int = 0) -> Iterator[Callable[..., None]]:
    """A bar of the images of all ranks. Yields what shows it, and adds the images that this rank has drawn since.

    done: images of earlier commands, which are no speed. counted: what the ranks' common count has begun with.
    """
    name = command if ranks.world_size == 1 else f"{command} ({ranks.world_size} processes)"
    hidden = not ranks.main or done == total
    with tqdm(total=total, initial=done, desc=name, unit="image", disable=hidden) as bar:
        yield lambda drawn=0: bar.update(done + ranks.count(drawn) - counted - bar.n)


def count_written(ranks: Ranks, everyone: Sequence[Sequence[tuple[Parts, range]]]) -> None:
    """Count, on the main rank, the parts that each rank has written. Raises RuntimeError for one that it does not see.

    By name: the listing of a folder on another machine may be older than its files.
    """
    for rank, written in enumerate(everyone if ranks.main else []):
        for parts, images in written:
            if not parts.add(images):
                raise RuntimeError(
                    f"rank {rank} has written {parts.path(images)}, which rank 0 does not see; --outdir must be a "
                    "folder that nodes share"
                )


class SampleFolder(OutputFolder):
    """A folder that one `sample` at a time fills; settings.json holds what its images depend on."""

    def __init__(self, outdir: str | Path):
        super().__init__(outdir, "sample", "settings.json")

    @property
    def begun(self) -> bool:
        """Whether it holds an image; without any it is of no settings yet."""
        return any(any(self.path.glob(name)) for name in ("samples.npz", "grid.png", "parts/*.npy", "png/*/*.png"))

    def require(self, settings: dict) -> None:
        """Raise ValueError unless the folder is new, empty, or of these settings, which may be a part of them."""
        if self.check() and self.begun:
            before = self.read()
            self.require_same({name: before.get(name) for name in settings}, settings, _NOT_COMPARED)

    def note(self, settings: dict, using: dict) -> None:
        """Write settings.json, where `using`, what images are drawn with, joins that of earlier commands."""
        before = self.read().get("drawn_with", []) if self.begun else []
        self.write(self.marker.name, settings | {"drawn_with": before if using in before else [*before, using]})


def requested(config: SampleConfig | SweepConfig) -> dict:
    """The settings that the command line alone tells, as JSON reads them back."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _HOW}
    # what is done may be another one: a precision that the device has, and what `auto` stands for
    settings |= {f"wanted_{name}": settings.pop(name) for name in GIVES_WAY}
    return as_json(settings | ({"steps": 1} if config.sampler == "onestep" else {}))


def drawn_again(note: Mapping, outdir: str, **changed) -> SampleConfig:
    """The command that draws again the images of which `note` is: settings.json, or `metadata` of samples.npz.

    changed: fields with other values. What computes is the same on the same device, and chosen anew on another.
    Raises ValueError for a note that lacks a setting, and for values that are none.
    """
    names = [f.name for f in dataclasses.fields(SampleConfig) if f.name not in _HOW]
    lacking = [name for name in (*names, *CHECKSUMS, "drawn_with") if name not in note]
    if lacking or not note["drawn_with"]:
        raise ValueError(f"does not say how its images were drawn (no {', '.join(lacking) or 'drawn_with'})")
    using = note["drawn_with"][-1]
    values = {name: note[name] for name in names} | {"batch_size": using["batch_size"], "outdir": outdir} | changed
    if using["plan"] is None and using["device"] == Machine.here(resolve_device(changed.get("device", "auto"))).device:
        sites = [f"{site}={backend}" for site, backend in using["ops"].items()]
        values |= {"ops": ",".join(["plain", *sites]), **{k: using[k] for k in ("compile", "cuda_graphs")}}
    return parse([SampleConfig], [f"--{name}={_text(value)}" for name, value in values.items()], "sample")[0]


def _text(value) -> str:
    """A value of a note as it stands behind a flag."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return "null" if value is None else str(value)


def resolved(model: torch.nn.Module, weak: torch.nn.Module | None, labels: np.ndarray, engine: SamplingEngine) -> dict:
    """The settings that the command line leaves open, with checksums of weights and labels [N]."""
    return {
        **{name: getattr(engine, name) for name in GIVES_WAY},
        "evaluations": engine.evaluations,
        "weights_sha256": weights_sha256(model),
        "autoguidance_sha256": None if weak is None else weights_sha256(weak),
        "labels_sha256": hashlib.sha256(np.asarray(labels, "<i8").tobytes()).hexdigest(),
        "ema": {name: value for name, value in model.metadata.items() if name in _EMA},
    }


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 of the model's tensors, with names, dtypes and shapes, and of its checkpoint's metadata."""
    return state_sha256(model, json.dumps(model.metadata, sort_keys=True))


def drawn_with(engine: SamplingEngine, devices: list[str]) -> dict:
    """What the last bits of images may depend on: recorded, not compared. devices: the name of every rank's."""
    return versions(engine.device) | {
        "compile": engine.compile,
        "cuda_graphs": engine.cuda_graphs,
        "plan": engine.chosen.plan,
        "ops": engine.chosen.record()["ops"],
        "device": ", ".join(sorted(set(devices))),
        "processes": len(devices),
        "batch_size": engine.batch_size,
    }
