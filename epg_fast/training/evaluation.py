"""Samples of a run's EMA weights while it trains, which change nothing of the training: previews and evaluations.

For an evaluation all ranks draw images, each its batches, with the settings of `preview` and the run's precision and
plan. What judges keep of an image is a row; the image goes. The main rank makes figures of all rows in the images'
order. Labels, noise and how batches are cut are the same every time and for any number of ranks, and so are the
figures.

What it leaves in the run folder, in this order:
    best.safetensors              the weights with the best figure so far; which that is stands in its metadata
    evaluation/step_<step>.json   figures with their spreads, and how they were made
    a line of metrics.jsonl       figures as `fid`, of a post-hoc width as `fid/sigma_rel_0.05`, their spreads as
                                  `fid/spread`; `evaluation_seconds`
The line comes last: a run that goes on from a step without one begins with that evaluation.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from epg_fast.config import RunConfig
from epg_fast.evaluation.figures import measured
from epg_fast.evaluation.judge import Judges, Rows, check_judges, join_rows, open_judges
from epg_fast.evaluation.protocol import protocol, protocol_changes
from epg_fast.files import write_atomically
from epg_fast.models import EPGViT, generator_from_config, save_weights
from epg_fast.models.weight_files import open_safetensors
from epg_fast.runtime import autocast
from epg_fast.sampling import SamplingEngine, sample
from epg_fast.sampling.labels import choose_labels
from epg_fast.sampling.outputs import captions, quantize, save_grid
from epg_fast.training.checkpoint import UNREADABLE, step_path
from epg_fast.training.measuring import BrokenOff, Measurement
from epg_fast.training.metrics import Metrics
from epg_fast.training.stages import Stage, network_config
from epg_fast.training.state import RunState

T = TypeVar("T")
log = logging.getLogger("epg_fast")

FOLDER, BEST = "evaluation", "best.safetensors"
_EMA = "ema"


def check_evaluation(config: RunConfig) -> None:
    """Raise ValueError for judges that cannot be, before anything takes long."""
    if Evaluation.every(config):
        with _named_as_flags():
            check_judges(config.evaluate, config.evaluate.best, "best")


def sampling_options(stage: Stage) -> dict:
    """Arguments of `SamplingEngine` that say which images the run's samples are."""
    p = stage.config.preview
    return {
        "sampler": p.sampler,
        "steps": p.steps,
        "guidance": p.guidance if stage.network.num_classes else 1.0,
        "interval": tuple(p.interval),
        "parameterization": stage.parameterization,
        "normalization": stage.config.data.normalization,
        "noise_schedule": stage.config.noise,
    }


class Preview(Measurement):
    """A grid of samples, previews/step_<step>.png, from the same labels and noise every time, to compare steps.

    Sharded weights take all ranks, which all sample the same; the main rank alone writes. EMA in host memory are copied
    to the device for as long as it takes.
    """

    name = "preview"

    def __init__(self, state: RunState, metrics: Metrics):
        self._state, self._metrics = state, metrics

    @classmethod
    def is_missing(cls, outdir, step):
        return not cls._path(outdir, step).exists()

    @staticmethod
    def _path(outdir: Path, step: int) -> Path:
        return step_path(outdir / "previews", step, ".png")

    def figures(self):
        """None. A disk that does not take the picture is reported: it must not end a run."""
        state, stage, config = self._state, self._state.stage, self._state.config
        if not (stage.ranks.main or stage.sharded):
            return {}
        state.host_ema.wait()
        p, network, step = config.preview, stage.ema, state.iteration
        if config.offload_ema:
            network = copy.deepcopy(network).to(stage.ranks.device)
        labels = choose_labels("balanced", p.num, network.num_classes, 0, stage.untrained_classes)
        # autocast, where the precisions of `sample` make a copy of the weights
        with autocast(stage.ranks.device, config.precision):
            images = sample(
                network,
                torch.tensor(labels) if network.num_classes else p.num,
                **sampling_options(stage),
                ops=network.ops,  # of the run; a plan for sampling is not asked for
            )
        if stage.ranks.main:
            if not images.isfinite().all():
                log.warning("step %d: some preview samples are not finite and are shown black", step)
            path = self._path(state.outdir, step)
            with _reported(step, "no preview"):
                path.parent.mkdir(exist_ok=True)
                save_grid(quantize(images.nan_to_num(0.0)).numpy(), path, captions(labels, stage.class_names))
                with Image.open(path) as picture:
                    self._metrics.add_image("samples", np.asarray(picture.convert("RGB")), step)
        return {}


class Evaluation(Measurement):
    """The evaluations of a run. All ranks make it, and call its methods, together.

    Args:
        stop: whether the run is to end; all ranks ask together, and get the same answer.

    Raises ValueError for judges that cannot be opened. What they see of their reference is kept in evaluation/.
    """

    name, prefix = "evaluate", "evaluation_"

    @torch.no_grad()
    def __init__(self, state: RunState, stop: Callable[[], bool]):
        self._state, self._stage, self._ranks, self._stop = state, state.stage, state.ranks, stop
        c, self._outdir, self._best = state.config.evaluate, state.outdir, None
        self._config, self._size = c, min(c.batch_size, c.num)
        tracked = zip(state.posthoc_ema.sigma_rel, state.posthoc_ema.networks, strict=False)
        self._networks = {_EMA: state.stage.ema} | {_name_of(sigma_rel): network for sigma_rel, network in tracked}
        """As the run has them; not those that another rank has."""
        network, untrained = self._stage.network, self._stage.untrained_classes
        self._labels = torch.tensor(choose_labels("balanced", c.num, network.num_classes, c.seed, untrained))
        with _named_as_flags():
            judges = self._judges(self._ranks)
            self._figure = judges.decisive(c.best, "best")
            self._sign = 1 if judges.best[self._figure] == "low" else -1
            if c.num < judges.least:
                raise ValueError(f"num is {c.num}, want at least {judges.least}, for as many do the judges need")
            judges.check(c.num)
            labels, size = self._labels[: self._size], network.image_size
            black = torch.zeros(len(labels), 3, size, size, dtype=torch.uint8)
            judges.rows(black, labels)  # raises for what cannot judge such images
            if self._ranks.main:
                self._protocol = _finite(protocol(judges, c, self._sampling(), c.num, (size, size), self._ranks.device))
        log.info(
            "every %d steps %d images are drawn and judged against %s; %s has the weights with the best %s",
            *(c.every, c.num, c.reference or c.test, BEST, self._figure),
        )

    @torch.no_grad()
    def figures(self):
        """Those of the weights as they are, for metrics.jsonl, on every rank; all other files are written.

        Judges may draw at random: training reads no generator but those that it seeds for a step.
        """
        step, begin = self._state.iteration, time.perf_counter()
        self._ask()
        self._state.host_ema.wait()
        try:
            judges = self._on_all(lambda: self._judges(None))
            names = (_EMA, *map(_name_of, self._config.sigma_rel or ()))
            found = {name: self._figures(name, judges) for name in names}
        finally:
            gc.collect()  # compiled networks are in cycles
        self._keep_best(step, found)
        seconds = time.perf_counter() - begin
        if self._ranks.main:
            content = {"step": step, "weights": found, "best": self._best, "seconds": seconds}
            text = json.dumps(content | {"protocol": self._protocol}, indent=2) + "\n"
            with _reported(step, "its figures are in metrics.jsonl alone"):
                write_atomically(step_path(self._outdir / FOLDER, step, ".json"), text)
        return _line(found) | {"evaluation_seconds": seconds}

    def _figures(self, name: str, judges: Judges) -> dict:
        """Figures and spreads of weights, on every rank."""
        log.info("%d images are drawn from the weights %s, and judged", self._config.num, name)
        everyone = self._ranks.gather_to_main(self._rows(name, judges))

        def judge() -> dict:
            in_order = [part for turn in itertools.zip_longest(*everyone) for part in turn if part]
            black = sum(count for _, count in in_order)
            if black:
                log.warning("%s: %d of the images drawn are not finite, and judged as black", name, black)
            rows = join_rows([rows for rows, _ in in_order])
            for copies in (everyone, in_order):  # half a gigabyte each of 50000 images
                copies.clear()
            with _as_value_errors():
                return _finite(measured(judges.figures(rows)) | {"not_finite": black})

        return self._ranks.decide(judge)

    def _rows(self, name: str, judges: Judges) -> list[tuple[Rows, int]]:
        """What this rank's batches are judged by; the ranks take turns."""
        ranks, batches = self._ranks, -(-self._config.num // self._size)
        drawn = self._drawn(self._on_device(name), judges, range(ranks.rank, batches, ranks.world_size))
        parts: list[tuple[Rows, int]] = []
        for _ in range(-(-batches // ranks.world_size)):
            self._ask()
            self._on_all(lambda: parts.extend(itertools.islice(drawn, 1)))
        return parts

    def _drawn(self, network: EPGViT, judges: Judges, batches: range) -> Iterator[tuple[Rows, int]]:
        """(rows, how many images are not finite) of these batches.

        All batches have one size, the last filled up with images that are not judged, so that each is computed in the
        same way whichever rank it falls to.
        """
        if not batches:
            return
        c, size, config = self._config, self._size, self._state.config
        engine = SamplingEngine(
            network,
            **sampling_options(self._stage),
            batch_size=size,
            precision=config.precision,
            compile=config.compile,
            # Recording one forbids other threads, which load data, to allocate memory meanwhile.
            cuda_graphs=False,
            ops=network.ops,
        )
        numbers = [min(i, c.num - 1) for batch in batches for i in range(batch * size, (batch + 1) * size)]
        labels = self._labels[numbers]
        stream = engine.stream(labels if network.num_classes else len(numbers), indices=numbers, seed=c.seed)
        for batch, (where, images) in zip(batches, stream, strict=True):
            images = images[: c.num - batch * size]
            black = int((~images.isfinite()).flatten(1).any(dim=1).sum())
            pixels = quantize(images.nan_to_num(0.0)).permute(0, 3, 1, 2).contiguous()
            yield judges.rows(pixels, labels[where][: len(pixels)]), black

    def _on_device(self, name: str) -> EPGViT:
        """The network of these weights on this rank's device: a copy, where it is sharded or in host memory."""
        network, config = self._networks.get(name), self._state.config
        if not self._stage.sharded and not config.offload_ema:
            return network
        with torch.device("meta"):
            copy = generator_from_config(network_config(config))
        copy.use_ops(self._stage.network.ops).to_empty(device=self._ranks.device).eval().requires_grad_(False)
        source = {} if network is None else network.state_dict()
        for key, tensor in copy.state_dict().items():
            whole = self._state.parallel.whole({key: source[key]} if source else {}, {})
            if self._ranks.main:
                tensor.copy_(whole[key])
            if self._ranks.world_size > 1:
                dist.broadcast(tensor, 0)
        return copy

    def _keep_best(self, step: int, found: dict[str, dict]) -> None:
        """Put the best weights of this step into best.safetensors if they are better than those in it."""

        def choose() -> str | None:
            values = {name: m["figures"][self._figure] for name, m in found.items()}
            values = {name: self._sign * value for name, value in values.items() if value is not None}
            self._best = before = self._best_so_far(step)
            name = min(values, key=values.get, default=None)
            return name if name and (before is None or values[name] < self._sign * before["value"]) else None

        name = self._ranks.decide(choose)
        if name is None:
            return
        self._state.writer.wait()  # one copy at a time in host memory
        network = self._networks.get(name)
        weights = self._state.parallel.whole({} if network is None else network.state_dict(), {})
        if self._ranks.main:
            value, spread = (found[name][kind][self._figure] for kind in ("figures", "spread"))
            best = {"step": step, "weights": name, "figure": self._figure, "value": value, "spread": spread}
            metadata = self._stage.metadata() | {"step": step, "best": best | {"protocol": self._protocol}}
            with _reported(step, "the best weights so far are not kept"):
                save_weights(self._outdir / BEST, weights, metadata)
                self._best = best
                log.info("step %d: %s has the weights %s, the best so far", step, BEST, name)

    def _best_so_far(self, step: int) -> dict | None:
        """What best.safetensors says of itself. One that was chosen in another way is set aside."""
        path = self._outdir / BEST
        if not path.exists():
            return None
        try:
            with open_safetensors(path) as file:
                best = json.loads(file.metadata()["epg_fast"])["best"]
            changed = "; ".join(protocol_changes(*map(_yardstick, (best["protocol"], self._protocol))))
            if best["figure"] != self._figure:
                changed = f"by {best['figure']}"
        except UNREADABLE as error:
            changed = f"it cannot be read: {error}"
        if not changed:
            return {name: value for name, value in best.items() if name != "protocol"}
        aside = path.with_name(f"best_until_step_{step:09d}.safetensors")
        try:
            os.replace(path, aside)
        except OSError as error:
            raise ValueError(f"{path} cannot be renamed to {aside.name} ({error.strerror})") from None
        log.warning(
            "%s was chosen in another way (%s): it is %s now, and the best is sought anew", *(path, changed, aside.name)
        )
        return None

    def _judges(self, ranks) -> Judges:
        """Judges with their networks on the device. ranks: those that share what is to be seen of the reference.

        None: it has been seen, and the main rank alone needs it.
        """
        size = self._stage.network.image_size
        cache = self._outdir / FOLDER if ranks or self._ranks.main else None
        return open_judges(self._config, (size, size), self._ranks.device, cache, ranks)

    def _sampling(self) -> dict:
        """How images are drawn, as a protocol says it."""
        config, stage, device = self._state.config, self._stage, self._ranks.device
        options = sampling_options(stage)
        options["noise_schedule"] = dataclasses.asdict(options["noise_schedule"])
        using = {
            "compile": config.compile,
            "plan": stage.chosen.plan,
            "ops": stage.chosen.record()["ops"],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": self._ranks.world_size,
            "batch_size": self._size,
        }
        return {
            "num": self._config.num,
            "labels": "balanced",
            "untrained_classes": list(stage.untrained_classes),
            "seed": self._config.seed,
            "precision": config.precision,
            **options,
            "drawn_with": [using],
        }

    def _ask(self) -> None:
        if self._stop():
            raise BrokenOff

    def _on_all(self, act: Callable[[], T]) -> T:
        """What `act` returns here. Raises ValueError on every rank where it fails on one."""
        found = []

        def attempt() -> None:
            with _as_value_errors():
                found.append(act())

        self._ranks.together(attempt)
        return found[0]


@contextlib.contextmanager
def _as_value_errors() -> Iterator[None]:
    """What may go wrong with an evaluation is no reason to end a run: files, a GPU's memory, images without figures."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise ValueError((str(error).partition("\n")[0] or type(error).__name__)[:300]) from error


@contextlib.contextmanager
def _reported(step: int, effect: str) -> Iterator[None]:
    """A disk that does not take a file of an evaluation ends no run."""
    try:
        yield
    except OSError as error:
        log.warning("step %d: %s (%s); training goes on", step, effect, error)


@contextlib.contextmanager
def _named_as_flags() -> Iterator[None]:
    """Errors name the flags as they are called in training."""
    try:
        yield
    except ValueError as error:
        text = str(error).removeprefix("evaluate: ")
        raise ValueError("evaluate: " + re.sub(r"--(?=\w)", "--evaluate.", text)) from error


def _yardstick(protocol: Mapping) -> dict:
    """A protocol without what does not change figures by more than rounding."""
    sampling = {name: value for name, value in protocol["sampling"].items() if name != "drawn_with"}
    return {"sampling": sampling, "judging": protocol["judging"], "versions": {}}


def _name_of(sigma_rel: float) -> str:
    return f"sigma_rel_{sigma_rel:g}"


def _line(found: dict[str, dict]) -> dict[str, float]:
    """The figures for a line of metrics, without those that are none."""
    line = {}
    for name, m in found.items():
        suffix = "" if name == _EMA else f"/{name}"
        for figure, value in m["figures"].items():
            line |= {f"{figure}{suffix}": value, f"{figure}{suffix}/spread": m["spread"].get(figure)}
    return {name: value for name, value in line.items() if value is not None}


def _finite(value):
    """`value` with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
