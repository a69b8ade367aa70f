"""What a run makes of its weights beside training: when it is due, where it goes; two for pre-training.

A measurement comes after the checkpoint of its step, so that a kill while it takes long loses nothing, and is a
function of the weights of that step. A run that goes on from a checkpoint makes those of its step that are missing:
nothing is lost, and no line of metrics.jsonl comes twice.

The linear probe and the measures of collapse stand here; previews and evaluations are samples, see
`epg_fast.training.evaluation`.
"""

from __future__ import annotations

import abc
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from epg_fast.config import PretrainConfig, RunConfig
from epg_fast.data import LABELS_WANTED, NO_LABELS, ImageSource, PillowLoader, images_of, open_images
from epg_fast.diffusion import NoiseSchedule
from epg_fast.evaluation.probe import (
    encoder_features,
    evenly_chosen,
    load_rgb,
    noisy_features,
    probe_accuracy,
    require_sklearn,
)
from epg_fast.training.draws import Draws
from epg_fast.training.metrics import Metrics, figures_at
from epg_fast.training.state import RunState

log = logging.getLogger("epg_fast")
_MOST_IMAGES = 1024
"""In the batch that collapse is measured on."""


class BrokenOff(Exception):
    """The run is to end."""


class Measurement(abc.ABC):
    """Something to make of the weights as they are now, every so many steps."""

    name: str
    """Its group in the configuration, which has `every`."""
    prefix: str
    """How the name of one of its figures, at least, begins."""

    @abc.abstractmethod
    def figures(self) -> dict[str, float]:
        """The figures on the main rank. All ranks call it at the same point, and training is left as it is.

        Raises ValueError for what cannot be measured now; no other rank waits for one that does. Raises `BrokenOff` on
        all ranks when the run is to end before that.
        """

    @classmethod
    def every(cls, config: RunConfig) -> int:
        """Steps between two of them; 0 for none."""
        return getattr(getattr(config, cls.name, None), "every", 0)

    @classmethod
    def is_due(cls, config: RunConfig, step: int) -> bool:
        """Whether one is made of the weights of `step`."""
        return config.is_due(step, cls.every(config))

    @classmethod
    def is_missing(cls, outdir: Path, step: int) -> bool:
        """Whether that of `step` has not been made."""
        return not any(figure.startswith(cls.prefix) for figure in figures_at(outdir, step))


def measure(measurements: Iterable[Measurement], metrics: Metrics, step: int, stop: bool = False) -> bool:
    """Make the measurements and write what they find.

    False if the run is to end before that, as `stop` says or one of them finds meanwhile.
    """
    for measurement in measurements:
        begin, figures = time.perf_counter(), {}
        try:
            if stop:
                raise BrokenOff
            with metrics.paused():
                figures = measurement.figures()
        except BrokenOff:
            log.warning("step %d: no result of %s yet; the same command begins with it", step, measurement.name)
            return False
        except ValueError as error:
            log.warning("step %d: no result of %s: %s; training goes on", step, measurement.name, error)
        if figures:
            metrics.write_figures(step, figures)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            log.info("step %d: %s, measured in %.3g s", step, shown, time.perf_counter() - begin)
    return True


def effective_rank(features: torch.Tensor) -> float:
    """Effective rank of the covariance matrix of features [N, E]: 1 to min(E, N - 1).

    exp of the entropy of the eigenvalues over their sum; where k eigenvalues are equal and the others 0, it is k. 1 for
    features that are all the same, up to rounding of float32.

    Source: Roy & Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007).
    """
    features = features.double()
    centred = features - features.mean(dim=0)
    if centred.square().mean() <= torch.finfo(torch.float32).eps ** 2 * features.square().mean():
        return 1.0
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0)
    return float(torch.special.entr(eigenvalues / eigenvalues.sum()).sum().exp())


def alignment(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean squared distance, 0 to 4, of the L2-normalised features of two views of the same images, [N, P] each.

    Source: Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere" (2020, arXiv 2005.10242), with alpha = 2.
    """
    one, other = (F.normalize(features.double(), dim=-1) for features in (one, other))
    return float((one - other).square().sum(dim=-1).mean())


def uniformity(features: torch.Tensor) -> float:
    """log of the mean of exp(-2 d^2) over pairs of different images, d the distance of L2-normalised features [N, P].

    0 for features that are all the same; about -4, the least in many dimensions, for those spread evenly; N >= 2.

    Source: as for `alignment`, with t = 2.
    """
    unit = F.normalize(features.double(), dim=-1)
    squares = 2 - 2 * unit @ unit.T
    rows, columns = torch.triu_indices(*squares.shape, offset=1, device=squares.device)
    return float((-2 * squares[rows, columns].clamp_min(0)).logsumexp(dim=0)) - math.log(len(rows))


class Collapse(Measurement):
    """Ranks of the encoder's features and of their projections, alignment and uniformity of the latter.

    On two views of a fixed batch of training images, as the contrastive term has them: projected with the BatchNorm
    statistics of the batch.
    """

    name, prefix = "collapse", "collapse/"

    def __init__(self, state: RunState):
        """Reads the images: the same at every step, after a resume and with any loader of the run.

        Raises ValueError when too many are bad.
        """
        self._state, config, ranks = state, state.config, state.ranks
        size = min(config.batch_size, max(_MOST_IMAGES // ranks.world_size, 2) * ranks.world_size)
        log.info("collapse: reading two views of %d training images", size)
        with PillowLoader(
            state.source,
            image_size=state.stage.network.image_size,
            batch_size=size,
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            augment=config.data.augment,
            max_bad_fraction=config.data.max_bad_fraction,
            workers=0,
        ) as loader:
            batch = next(loader)
        self._views, self._count = (batch["view1"], batch["view2"]), len(batch["x"])
        self._draws = Draws(config.seed, 0, ranks.rank * self._count, self._count, ranks.device)

    def figures(self):
        state = self._state
        found = state.parallel.observe(self._features)
        views = [(state.ranks.gather_tensors(feature)(), state.ranks.gather_tensors(p)()) for feature, p in found]
        if not state.ranks.main:
            return {}
        (feature1, projection1), (feature2, projection2) = views
        if not all(t.isfinite().all() for view in views for t in view):
            raise ValueError("the features are not finite")
        return {
            "collapse/feature_rank": effective_rank(torch.cat([feature1, feature2])),
            "collapse/projection_rank": effective_rank(F.normalize(torch.cat([projection1, projection2]), dim=-1)),
            "collapse/alignment": alignment(projection1, projection2),
            "collapse/uniformity": (uniformity(projection1) + uniformity(projection2)) / 2,
        }

    def _features(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(features [B, E], projections [B, P]) of each view, in float32; encoded in parts of a micro-batch at most."""
        state, config = self._state, self._state.config
        size = max(config.batch_size // (state.ranks.world_size * config.gradient_accumulation), 1)
        parts = []
        for i in range(0, self._count, size):
            draws = self._draws.part(i, min(size, self._count - i))
            views = [state.stage.normalization.normalize(v[i : i + size].to(state.ranks.device)) for v in self._views]
            noise = draws.normal("noise", *views[0].shape[1:])
            parts.append(state.stage.objective(draws, 0).clean_features(*views, noise).chunk(2))
        features = [torch.cat(part) for part in zip(*parts, strict=True)]
        return [(f.float(), state.stage.network.projection_head(f).float()) for f in features]


class Probe(Measurement):
    """Accuracy of a logistic regression on the encoder's features at each noise level; see `evaluation.probe`.

    The noise of an image is always the same, so that steps, and numbers of ranks, are compared on the same images.
    """

    name, prefix = "probe", "probe_accuracy/"

    def __init__(self, state: RunState):
        """Reads the images. Raises ValueError for what `check_probe` refuses, and for an image that cannot be read."""
        self._state, sources = state, check_probe(state.config, state.source)
        chosen = [evenly_chosen(s.labels, num) for s, num in zip(sources, state.config.probe.num, strict=True)]
        said = [f"{len(places)} images of {source.root}" for source, places in zip(sources, chosen, strict=True)]
        log.info("probe: reading %s", " and ".join(said))
        self._sets = [_Share(source, places, state) for source, places in zip(sources, chosen, strict=True)]
        self._features_of = encoder_features(state.stage.network, NoiseSchedule(**vars(state.config.noise)))

    def figures(self):
        ranks, sigmas, mine = self._state.ranks, self._state.config.probe.sigmas, {}
        for i, sigma in enumerate(sigmas):
            features = [self._features(share, sigma, number) for number, share in enumerate(self._sets)]
            if i % ranks.world_size == ranks.rank:
                mine[sigma] = zip(features, [share.labels for share in self._sets], strict=True)
        fitted = ranks.together(lambda: {sigma: probe_accuracy(*sets, sigma) for sigma, sets in mine.items()})
        found = {sigma: accuracy for part in fitted for sigma, accuracy in part.items()}
        return {f"probe_accuracy/{sigma:g}": found[sigma] for sigma in sigmas}

    def _features(self, share: _Share, sigma: float, number: int) -> torch.Tensor:
        """Of all images of a set, on every rank, in the set's order."""
        state = self._state
        own = noisy_features(
            lambda noisy, sigma: state.parallel.observe(self._features_of, noisy, sigma),
            share.images,
            sigma,
            state.config.data.normalization,
            (state.config.seed, number),
            share.places,
        )
        everyone = state.ranks.gather_tensors(own.to(state.ranks.device))().cpu()  # one rank's after the other's
        return everyone.unflatten(0, (-1, len(own))).transpose(0, 1).flatten(0, 1)[: len(share.labels)]


class _Share:
    """What a rank encodes of a set of images: every so manyth, as many on all ranks, some twice if need be."""

    def __init__(self, source: ImageSource, chosen: np.ndarray, state: RunState):
        rank, world_size = state.ranks.rank, state.ranks.world_size
        self.labels = np.asarray(source.labels, np.int64)[chosen]
        count = -(-len(chosen) // world_size)
        self.places = [i % len(chosen) for i in range(rank, count * world_size, world_size)]
        self.images = load_rgb(source, state.stage.network.image_size, chosen[self.places])[0]


def check_probe(config: PretrainConfig, source: ImageSource) -> tuple[ImageSource, ImageSource]:
    """The images of `probe.train` and `probe.test`. source: those of `data.path`.

    Raises ValueError for images without classes, with one, or of other classes than the others, and for fewer images
    than classes; ImportError without scikit-learn.
    """
    require_sklearn()
    train, test = (_opened(name, getattr(config.probe, name), source) for name in ("train", "test"))
    if len(set(train.labels)) < 2:
        raise ValueError(
            f"probe.train: {train.root} has images of one class, {train.classes[train.labels[0]]}, want two at least"
        )
    if train.classes != test.classes:
        only = [sorted(set(one.classes) - set(other.classes))[:3] for one, other in ((train, test), (test, train))]
        raise ValueError(
            f"probe.test: got other classes than those of {train.root}: only that has {only[0]}, only {test.root} has "
            f"{only[1]}; want the same names"
        )
    for images, num in zip((train, test), config.probe.num, strict=True):
        if num < len(images.classes):
            raise ValueError(f"probe.num: got {num}, want at least the {len(images.classes)} classes of {images.root}")
    return train, test


def _opened(name: str, path: str, otherwise: ImageSource) -> ImageSource:
    with images_of(f"probe.{name}"):
        images = open_images(path) if path else otherwise
    if images.classes == NO_LABELS:
        raise ValueError(f"probe.{name}: {images.root} has no labels; {LABELS_WANTED}")
    return images
