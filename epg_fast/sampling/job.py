"""The `sample` command: labels, network, images, files."""

from __future__ import annotations

import datetime
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from epg_fast.config import SampleConfig
from epg_fast.distributed import Ranks, joined, resumable
from epg_fast.files import open_atomically
from epg_fast.models import EPGViT, from_pretrained
from epg_fast.plans import PLAIN, Case, Chosen, Machine, choose, require_like_machines
from epg_fast.runtime import suitable_threads
from epg_fast.sampling.engine import SamplingEngine
from epg_fast.sampling.folder import SampleFolder
from epg_fast.sampling.image_writer import ImageWriter, png_threads
from epg_fast.sampling.images import Images
from epg_fast.sampling.labels import choose_labels
from epg_fast.sampling.precision import image_error
from epg_fast.sampling.settings import device_name, drawn_with, requested, resolved
from epg_fast.sampling.writers import finite, save_grid, write_npz

log = logging.getLogger("epg_fast")
_GRID = 100
# Ranks meet only before the first image and after the last, and a slow one may have hours more to do. A rank that dies
# closes its connections, which the others notice at once.
_PATIENCE = datetime.timedelta(days=30)
_ERROR = "precision.json"


def run(config: SampleConfig) -> None:
    """Draw `config.num` images and write samples.npz, PNG files or both, and grid.png, to `config.outdir`.

    Under torchrun the ranks share the batches. Images are kept on disk batch by batch: the same command goes on where
    one that was stopped or killed had come, with any batch size and number of ranks, and leaves finished work alone.
    Raises ValueError for what the user can mend, before anything is written (checkpoint, labels, guidance, an output
    folder of other settings or in use); OSError when the disk fails; `Interrupted` after a signal.
    """
    _require_names(config)
    with joined(config.device, "gloo", _PATIENCE) as ranks:
        _run(config, ranks)


def check_command(config: SampleConfig) -> None:
    """Raise ValueError for what is wrong with a command before anything takes long."""
    _require_names(config)
    SampleFolder(config.outdir).require(requested(config))


def _require_names(config: SampleConfig) -> None:
    if not config.checkpoint or not config.outdir:
        raise ValueError("sample: --checkpoint and --outdir are needed")


def _run(config: SampleConfig, ranks: Ranks) -> None:
    outdir, device, folder = Path(config.outdir), ranks.device, SampleFolder(config.outdir)
    ranks.decide(lambda: folder.require(requested(config)))  # before weights are read, which may take long
    model = _generator(config.checkpoint, config, device)
    weak = _generator(config.autoguidance, config, device) if config.autoguidance else None
    untrained = model.metadata.get("untrained_classes", [])
    if untrained and config.labels in ("balanced", "random"):
        left = model.num_classes - len(untrained)
        log.info("%s was trained on %d of its %d classes: these are drawn", config.checkpoint, left, model.num_classes)
    labels = np.array(choose_labels(config.labels, config.num, model.num_classes, config.seed, untrained))
    engine = SamplingEngine(model, weak=weak, ops=lambda case: _agreed(config, case, device, ranks), **_options(config))
    settings = resolved(config, model, weak, labels, engine)
    everyone = ranks.gather((settings, device_name(device)))
    different = [rank for rank, (theirs, _) in enumerate(everyone) if theirs != everyone[0][0]]
    if different:
        raise ValueError(f"rank {different[0]} has read other weights or labels than rank 0; give all the same files")
    using = drawn_with(config, engine, [name for _, name in everyone])
    images = Images(outdir, labels, model.image_size)
    with suitable_threads(engine.model, engine.chosen.threads), folder:
        missing = ranks.decide(lambda: _claim(config, images, settings, using, folder))
        if missing is None:
            log.info("%s already holds these samples", outdir)
            return
        _check_shared(outdir, ranks)
        with resumable(outdir):
            if ranks.main and missing and _wants_error(config, engine, images):
                _report_error(config, engine, model, weak, images)
            del model, weak  # of which the engine may have a copy in 16 bits
            _draw_missing(config, engine, images, missing, ranks)
            if ranks.main:
                _finish(config, images)


def _agreed(config: SampleConfig, case: Case, device: torch.device, ranks: Ranks) -> Chosen:
    """What the main rank chooses, on every rank. Raises ValueError, on all of them, where their devices differ."""
    chosen = ranks.decide(lambda: choose(config.ops, case, device))
    require_like_machines(chosen, ranks.gather(Machine.here(device)))
    return chosen


def _claim(
    config: SampleConfig, images: Images, settings: dict, using: dict, folder: SampleFolder
) -> list[range] | None:
    """The images to draw, with the folder locked and its settings written; None when nothing is left to do."""
    outdir = images.outdir
    folder.require(settings)
    if images.finished(config.npz, config.png):
        return None
    folder.lock()
    folder.require(settings)  # of another command, which has just ended
    images.scan()
    missing = images.missing(config.batch_size)
    if sum(map(len, missing)) == config.num:
        (outdir / _ERROR).unlink(missing_ok=True)  # of a start with other settings, which left no image
    folder.note(settings, using if missing else None)
    return missing


def _check_shared(outdir: Path, ranks: Ranks) -> None:
    """Raise ValueError on all ranks when one does not see what the main one has written."""
    blind = [rank for rank, sees in enumerate(ranks.gather((outdir / "settings.json").exists())) if not sees]
    if blind:
        raise ValueError(f"rank {blind[0]} does not see {outdir} of rank 0; --outdir must be a folder that nodes share")


def _draw_missing(
    config: SampleConfig, engine: SamplingEngine, images: Images, missing: list[range], ranks: Ranks
) -> None:
    """Draw this rank's share and wait for the others; then the main rank knows of all images."""
    pieces = missing[ranks.rank :: ranks.world_size]
    with _Progress(images, missing, ranks) as progress:
        with ImageWriter(images, part=config.npz, png=config.png) as writer:
            if pieces:
                indices = np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces])
                stream = engine.stream(
                    _labels(engine.model, images.labels[indices]), indices, config.seed, as_uint8=True
                )
                for where, pixels in stream:
                    writer.add(indices[where], pixels)
                    progress.drawn(len(pixels))
        everyone = ranks.gather(writer.written, while_waiting=lambda: progress.drawn(0))
        progress.drawn(0)
    if not ranks.main:
        return
    for rank, written in enumerate(everyone):
        unseen = [piece for piece in written if not images.take_in(piece, part=config.npz, png=config.png)]
        if unseen:
            raise RuntimeError(
                f"rank {rank} has written images {unseen[0].start}..{unseen[0].stop - 1}, which rank 0 does not see in "
                f"{images.outdir}; --outdir must be a folder that nodes share"
            )


class _Progress:
    """Bar of the main rank: images of all ranks; those of earlier commands count as done, not as speed."""

    def __init__(self, images: Images, missing: list[range], ranks: Ranks):
        total = len(images.labels)
        self.start, self.ranks = total - sum(map(len, missing)), ranks
        name = "sample" if ranks.world_size == 1 else f"sample ({ranks.world_size} processes)"
        hidden = not ranks.main or not missing
        self.bar = tqdm(total=total, initial=self.start, desc=name, unit="image", disable=hidden)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def drawn(self, number: int) -> None:
        """Count images of this rank and show those of all."""
        count = self.ranks.count(number)
        self.bar.update(self.start + count - self.bar.n)


def _finish(config: SampleConfig, images: Images) -> None:
    """Write what is wanted and not there yet, from whatever holds the images; the parts go last."""
    everything = np.ones(len(images.labels), bool)
    if config.png:
        with ThreadPoolExecutor(png_threads()) as pool:
            for start, pixels in images.read(~images.has_png):
                list(pool.map(images.save_png, range(start, start + len(pixels)), pixels))
    if not images.grid.exists():
        first = np.concatenate([pixels for _, pixels in images.read(np.arange(len(everything)) < _GRID)])
        save_grid(first, images.grid)
    if config.npz and not images.npz.exists():
        log.info("writing %s", images.npz)
        chunks = (pixels for _, pixels in images.read(everything))
        write_npz(
            images.npz, chunks, images.labels, images.shape, SampleFolder(images.outdir).read() | _noted_error(images)
        )
    images.discard_parts()
    log.info("%d images in %s", len(everything), images.outdir)


def _wants_error(config: SampleConfig, engine: SamplingEngine, images: Images) -> bool:
    return bool(config.error_images and engine.precision != "fp32" and not (images.outdir / _ERROR).exists())


def _report_error(config: SampleConfig, engine: SamplingEngine, model: EPGViT, weak: EPGViT | None, images: Images):
    """Draw the first images in fp32, too, and write down how far they are from those of the engine."""
    number = min(config.error_images, config.batch_size, config.num)
    options = _options(config) | {"precision": "fp32", "compile": "off", "cuda_graphs": False, "ops": PLAIN}
    want = SamplingEngine(model, weak=weak, **options)(_labels(model, images.labels[:number]), seed=config.seed)
    # of a whole batch where another number of images would have to be compiled for
    drawn = images.labels[: config.batch_size if engine.fills_batches else number]
    _, got = next(engine.stream(_labels(model, drawn), seed=config.seed))
    if not want.isfinite().all():
        raise ValueError(f"{config.checkpoint}: its images are not finite, also in fp32: the model diverged")
    if not got[:number].isfinite().all():
        raise ValueError(f"precision {engine.precision}: images of this model are not finite in it; take bf16 or fp32")
    error = image_error(got[:number], want)
    found = {"precision": engine.precision, "images": number} | error
    with open_atomically(images.outdir / _ERROR) as file:
        file.write((json.dumps(finite(found), indent=2) + "\n").encode())
    log.info(
        "%s: off by %.2g of fp32 (relative L2 norm), PSNR %.1f dB, in the first %d images",
        *(engine.precision, error["relative_l2"], error["psnr_db"], number),
    )


def _labels(model: EPGViT, labels: np.ndarray) -> np.ndarray | int:
    """Labels as the engine takes them: their number for a model without classes."""
    return labels if model.num_classes else len(labels)


def _options(config: SampleConfig) -> dict:
    """Arguments of the engine."""
    auto = {"auto": None}
    names = ("sampler", "steps", "guidance", "clamp", "precision", "batch_size", "compile", "cuda_graphs")
    churn = ("s_churn", "s_min", "s_max", "s_noise") if config.sampler == "edm_sde" else ()
    return {name: getattr(config, name) for name in names + churn} | {
        "interval": tuple(config.interval),
        "parameterization": auto.get(config.parameterization, config.parameterization),
        "normalization": auto.get(config.normalization, config.normalization),
    }


def _noted_error(images: Images) -> dict:
    path = images.outdir / _ERROR
    try:
        return {"precision_error": json.loads(path.read_bytes())} if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it") from None


def _generator(source: str, config: SampleConfig, device: torch.device) -> EPGViT:
    model = from_pretrained(source, device=device)
    if not isinstance(model, EPGViT):
        raise ValueError(f"{source} holds a pre-trained encoder, which cannot draw images; fine-tune it first")
    return model
