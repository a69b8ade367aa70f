"""Linear probe of the encoder while it is trained: each rank encodes its share of the images, one fits a level."""

from __future__ import annotations

import logging

import numpy as np
import torch

from epg_fast.config import PretrainConfig
from epg_fast.data import LABELS_WANTED, NO_LABELS, ImageSource, images_of, open_images
from epg_fast.diffusion import NoiseSchedule
from epg_fast.evaluation.probe import (
    encoder_features,
    evenly_chosen,
    load_rgb,
    noisy_features,
    probe_accuracy,
    require_sklearn,
)
from epg_fast.training.measuring import Measurement
from epg_fast.training.state import RunState

log = logging.getLogger("epg_fast")


class Probe(Measurement):
    """Accuracy of a logistic regression on the encoder's features at each noise level; see `evaluation.probe`.

    The noise of an image is always the same, so that steps, and numbers of ranks, are compared on the same images.
    """

    name = "probe"

    def __init__(self, state: RunState):
        """Reads the images. Raises ValueError for what `check_probe` refuses, and for an image that cannot be read."""
        self._state = state
        chosen = [
            (source, evenly_chosen(source.labels, num))
            for source, num in zip(check_probe(state.config, state.source), state.config.probe.num, strict=True)
        ]
        log.info(
            "probe: reading %s", " and ".join(f"{len(places)} images of {source.root}" for source, places in chosen)
        )
        self._sets = [_Share(*both, state) for both in chosen]
        self._features_of = encoder_features(state.stage.network, NoiseSchedule(**vars(state.config.noise)))

    def figures(self) -> dict[str, float]:
        ranks, sigmas = self._state.ranks, self._state.config.probe.sigmas
        mine, found = {}, {}
        for i, sigma in enumerate(sigmas):
            features = [self._features(share, sigma, number) for number, share in enumerate(self._sets)]
            if i % ranks.world_size == ranks.rank:
                mine[sigma] = features
        labels = [share.labels for share in self._sets]
        for sigma, features in mine.items():
            try:
                found[sigma] = probe_accuracy(*zip(features, labels, strict=True), sigma)
            except ValueError as error:
                found[sigma] = error
        everyone = {sigma: value for part in ranks.gather(found) for sigma, value in part.items()}
        for value in everyone.values():
            if isinstance(value, ValueError):
                raise value
        return {f"probe_accuracy/{sigma:g}": everyone[sigma] for sigma in sigmas}

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
        return share.whole(state.ranks.gather_tensors(own.to(state.ranks.device))().cpu())


class _Share:
    """What a rank encodes of a set of images: every so manyth, as many on all ranks, some twice if need be."""

    def __init__(self, source: ImageSource, chosen: np.ndarray, state: RunState):
        ranks = state.ranks
        self.labels = np.asarray(source.labels, np.int64)[chosen]
        self._count = -(-len(chosen) // ranks.world_size)
        self.places = [i % len(chosen) for i in range(ranks.rank, self._count * ranks.world_size, ranks.world_size)]
        self.images = load_rgb(source, state.stage.network.image_size, chosen[self.places])[0]

    def whole(self, gathered: torch.Tensor) -> torch.Tensor:
        """The features of all images, once, from those of all ranks, one rank's after the other's."""
        return gathered.unflatten(0, (-1, self._count)).transpose(0, 1).flatten(0, 1)[: len(self.labels)]


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
