"""Figures of a set of images, each with its spread: how far it would be off with other images of the same kind.

`spread` is a standard error, found from `effects`: the first-order effect e_i of each image, the derivative of the
figure by the image's weight. Its square is sum(e_i^2) / N^2 (the infinitesimal jackknife). It costs one pass. The
bootstrap, `bootstrap`, judges images drawn with repetition again and again and needs no derivative. Effects also say
how far two sets differ whose images share their noise: image by image, where most of the chance cancels.

Source: Efron and Tibshirani, "An introduction to the bootstrap", 1993.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from epg_fast.evaluation.frechet import Gaussian, gaussian_of
from epg_fast.evaluation.generative import covered, squared_radii

_POINTS = 10
_GROUPS, _JACKKNIFED = 10, 2000


class Figure(abc.ABC):
    """A figure of images that are judged. What it costs is paid when it is first asked for.

    `value`: of all images. `effects`: float64 [N], or None where there are none. `spread`: standard error of the value,
    or None.
    """

    by_number = False
    """Whether it depends on the number of images, so that only equal numbers can be compared."""

    @functools.cached_property
    @abc.abstractmethod
    def value(self) -> float: ...

    @functools.cached_property
    def effects(self) -> np.ndarray | None:
        return None

    @functools.cached_property
    def spread(self) -> float | None:
        return None if self.effects is None else _standard_error(self.effects)

    def resampled(self, generator: np.random.Generator) -> float | None:
        """The figure of as many images, drawn from these with repetition; None where that says nothing."""
        return None


class Mean(Figure):
    """Mean of something that each image has, or each reference image. `values`: makes it, float or bool [N]."""

    def __init__(self, values: Callable[[], np.ndarray]):
        self._make = values

    @functools.cached_property
    def values(self) -> np.ndarray:
        return np.asarray(self._make(), np.float64)

    @functools.cached_property
    def value(self) -> float:
        return float(self.values.mean())

    @functools.cached_property
    def effects(self) -> np.ndarray:
        return self.values - self.value

    def resampled(self, generator):
        return float(self.values[_drawn(len(self.values), generator)].mean())


class Recall(Mean):
    """Share of the reference's features `real` [M, D] that the balls of the samples' cover; see `precision_recall`.

    Its effects are those of the reference's images, which both sides of a comparison share. Its spread is of other
    samples: each ball hangs on its neighbours, so that tenths of the samples are left out in turn (the delete-a-group
    jackknife). Of more than 2000 samples it is found on 2000, and scaled as one over the root of their number.
    """

    by_number = True

    def __init__(self, real: torch.Tensor, fake: torch.Tensor, k: int, device: torch.device | str):
        super().__init__(lambda: self._covered_by(fake))
        self._real, self._fake, self._k, self._device = real, fake, k, device

    def _covered_by(self, points: torch.Tensor) -> np.ndarray:
        radii = squared_radii(points, self._k, self._device)
        return covered(self._real, points, radii, self._device).numpy()

    @functools.cached_property
    def spread(self) -> float | None:
        num = len(self._fake)
        part = np.linspace(0, num - 1, min(num, _JACKKNIFED)).round().astype(int)
        if len(part) < 2 * _GROUPS:
            return None
        chosen = (torch.from_numpy(np.delete(part, slice(g, None, _GROUPS))) for g in range(_GROUPS))
        left_out = [self._covered_by(self._fake[rest]).mean() for rest in chosen]
        return float(np.sqrt((_GROUPS - 1) * np.var(left_out) * len(part) / num))

    def resampled(self, generator):
        return None  # duplicates would be each other's nearest neighbours


class InceptionScore(Figure):
    """Mean over `splits` of exp(E KL(p(y|x) || p(y))), in float64; `deviation` is that over the splits.

    `probabilities`: [N, C], rows that add up to 1. p(y) is the mean over the split, so a split of few classes scores
    too low: images are dealt to splits of N/splits each by a permutation drawn from `seed`, which is torch-fidelity's.
    ADM's evaluator takes 5000 at a time in the order of the file. Raises ValueError for fewer images than splits.
    Source: Salimans et al., "Improved techniques for training GANs", 2016.
    """

    by_number = True

    def __init__(self, probabilities: np.ndarray, splits: int = 10, seed: int = 2020):
        if np.ndim(probabilities) != 2 or not 1 <= splits <= len(probabilities):
            raise ValueError(
                f"splits is {splits}, want 1 to the number of images of probabilities [N, C], got "
                f"{list(np.shape(probabilities))}"
            )
        self._probabilities, self._splits, self._seed = probabilities, splits, seed

    @functools.cached_property
    def _scores(self) -> tuple[np.ndarray, np.ndarray]:
        """(score of each split, effect of each image on their mean).

        The mean of p(y) moves with the images, but to first order that changes no score: an image's effect is the score
        times what its own divergence exceeds the mean by.
        """
        num = len(self._probabilities)
        order = np.random.RandomState(self._seed).permutation(num)
        scores, effects = np.empty(self._splits), np.empty(num)
        for number in range(self._splits):
            chosen = order[number * num // self._splits : (number + 1) * num // self._splits]
            p = np.asarray(self._probabilities[chosen], dtype=np.float64)
            # 0 log 0 = 0
            log_ratio = np.log(np.where(p > 0, p, 1.0)) - np.log(np.where(p > 0, p.mean(axis=0), 1.0))
            divergence = (p * log_ratio).sum(axis=1)
            scores[number] = np.exp(divergence.mean())
            effects[chosen] = scores[number] * (divergence - divergence.mean())
        return scores, effects

    @functools.cached_property
    def value(self) -> float:
        return float(self._scores[0].mean())

    @property
    def deviation(self) -> float:
        return float(self._scores[0].std())

    @functools.cached_property
    def effects(self) -> np.ndarray:
        return self._scores[1]

    def resampled(self, generator):
        chosen = _drawn(len(self._probabilities), generator)
        return InceptionScore(self._probabilities[chosen], self._splits, self._seed).value


def inception_score(probabilities: np.ndarray, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation over `splits` of the score; see `InceptionScore`."""
    score = InceptionScore(probabilities, splits, seed)
    return score.value, score.deviation


class Frechet(Figure):
    """Frechet distance of `features` [N, D] to a reference. A covariance needs more images than features."""

    by_number = True

    def __init__(self, reference: Gaussian, features: torch.Tensor):
        self.reference, self.features, self.device = reference, features, reference.mean.device

    @functools.cached_property
    def _own(self) -> Gaussian:
        return gaussian_of(self.features, self.device)

    @functools.cached_property
    def value(self) -> float:
        return self.reference.distance(self._own)

    @functools.cached_property
    def effects(self) -> np.ndarray | None:
        if len(self.features) <= self.features.shape[1]:
            return None  # where a covariance is singular, its root has no derivative
        return self.reference.effects(self.features, self._own)

    def of(self, chosen: np.ndarray) -> float:
        """The distance of some of the images, numbers [n]."""
        return self.reference.distance(gaussian_of(self.features, self.device, chosen))

    def resampled(self, generator):
        return self.of(_drawn(len(self.features), generator))


class FrechetAtInfinity(Figure):
    """Where the distance of a `Frechet` tends to with ever more images: its bias falls as 1/N.

    A straight line in 1/n through the distances of parts of the images, from half of them to all, drawn from a fixed
    seed. `curve`: its points (n, distance). The spread joins that of the distance and of the line's end. `bias`: what
    the distance of these N images is too high by. Parts of few images do not lie on the line. In simulations with 256
    features, eigenvalues 1/k and a distance near 0, the end was off by a seventh of the bias, downwards, with N = 2.4
    times as many images as features, by 4% of it with 4.9 times, and by nothing visible with 24 times.
    Source: Chong and Forsyth, "Effectively unbiased FID and Inception Score and where to find them", 2020.
    """

    def __init__(self, distance: Frechet):
        self._distance = distance

    @staticmethod
    def possible(num: int, dim: int) -> bool:
        """Whether parts of `num` images determine a covariance of `dim` features."""
        return num // 2 > dim

    @functools.cached_property
    def curve(self) -> list[tuple[int, float]]:
        num, generator = len(self._distance.features), np.random.default_rng(0)
        sizes = np.rint(1 / np.linspace(2 / num, 1 / num, _POINTS)).astype(int)
        parts = [(int(n), self._distance.of(np.sort(generator.permutation(num)[:n]))) for n in sizes[:-1]]
        return [*parts, (num, self._distance.value)]

    @functools.cached_property
    def _line(self) -> tuple[float, float, float]:
        return _line(self.curve)

    @functools.cached_property
    def value(self) -> float:
        return self._line[0]

    @property
    def bias(self) -> float:
        return self._line[1] / len(self._distance.features)

    @functools.cached_property
    def spread(self) -> float | None:
        own = self._distance.spread
        return None if own is None else math.hypot(own, self._line[2])

    def paired_spread(self, other: FrechetAtInfinity) -> float | None:
        """Standard error of the difference to that of images that share their noise.

        The parts of both are of the same images, so that the line is that of the curves' difference.
        """
        spread = difference(self._distance, other._distance, paired=True)[1]
        (sizes, values), (other_sizes, other_values) = (np.array(x.curve).T for x in (self, other))
        if spread is None or not np.array_equal(sizes, other_sizes):
            return None
        return math.hypot(spread, _line(list(zip(sizes, values - other_values, strict=True)))[2])


def difference(a: Figure, b: Figure, paired: bool) -> tuple[float, float | None]:
    """(value of a - value of b, its standard error).

    paired: image i of both has the same noise and label, so that what chance they share cancels.
    """
    change = a.value - b.value
    if paired and isinstance(a, FrechetAtInfinity):
        return change, a.paired_spread(b)
    if paired and a.effects is not None and b.effects is not None and len(a.effects) == len(b.effects):
        return change, _standard_error(a.effects - b.effects)
    return change, None if None in (a.spread, b.spread) else math.hypot(a.spread, b.spread)


def measured(figures: Mapping[str, Figure]) -> dict:
    """`figures` (name -> value) and `spread` (name -> standard error or None), for JSON."""
    return {
        "figures": {name: figure.value for name, figure in figures.items()},
        "spread": {name: figure.spread for name, figure in figures.items()},
    }


def bootstrap(figures: Mapping[str, Figure], times: int) -> dict[str, float]:
    """Standard deviation of each figure over `times` sets drawn from its images; only those that can be resampled."""
    found = {}
    for name, figure in figures.items():
        generator = np.random.default_rng(0)  # the same images for each
        values = [figure.resampled(generator) for _ in range(times)]
        if times and None not in values:
            found[name] = float(np.std(values, ddof=1))
    return found


def _line(curve: list[tuple[int, float]]) -> tuple[float, float, float]:
    """(value at infinity, slope in 1/n, standard error of the value) of the straight line through (n, value)."""
    sizes, values = np.array(curve).T
    (slope, end), covariance = np.polyfit(1 / sizes, values, 1, cov=True)
    return float(end), float(slope), math.sqrt(max(covariance[1, 1], 0.0))


def _standard_error(effects: np.ndarray) -> float:
    return float(np.sqrt(np.mean(effects**2) / len(effects)))


def _drawn(num: int, generator: np.random.Generator) -> np.ndarray:
    return np.sort(generator.integers(num, size=num))
