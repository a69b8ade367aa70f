"""Spreads against what chance really does, figures of parts against figures made anew, comparisons."""

import numpy as np
import pytest
import torch

from epg_fast.evaluation import frechet_distance
from epg_fast.evaluation.figures import (
    Frechet,
    FrechetAtInfinity,
    InceptionScore,
    Mean,
    Recall,
    bootstrap,
    difference,
    measured,
)
from epg_fast.evaluation.frechet import Gaussian

DIM = 6
MIX = np.eye(DIM) + 0.3 * np.random.default_rng(9).normal(size=(DIM, DIM))
SHIFT = 0.3
REFERENCE = Gaussian(torch.zeros(DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64))
TRUTH = frechet_distance(np.full(DIM, SHIFT), MIX @ MIX.T, np.zeros(DIM), np.eye(DIM))


def images(seed, num=400, shift=SHIFT):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num, DIM)) @ MIX.T + shift)


def probabilities(seed, num=600):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(7, 0.3), size=num))


def test_the_distance_of_features_is_that_of_their_moments():
    x = images(0)
    figure, some = Frechet(REFERENCE, x), np.array([3, 3, 7, 11, 20, 50, 51, 52, 60])
    for value, rows in ((figure.value, x.numpy()), (figure.of(some), x.numpy()[some])):
        wanted = frechet_distance(rows.mean(0), np.cov(rows.T), np.zeros(DIM), np.eye(DIM))
        assert value == pytest.approx(wanted, rel=1e-9)


KINDS = {
    "frechet": (lambda x: Frechet(REFERENCE, x), images),
    "score": (lambda p: InceptionScore(p.numpy(), 1), probabilities),
    "mean": (lambda x: Mean(lambda: x.numpy()[:, 0]), images),
}


@pytest.mark.parametrize(("make", "data"), KINDS.values(), ids=KINDS)
def test_an_effect_is_the_derivative_by_the_weight_of_an_image(make, data):
    rows = data(1, 40)
    figure = make(rows)
    assert figure.effects.mean() == pytest.approx(0, abs=1e-12 * abs(figure.effects).max())
    # Every image 200 times, image 5 once more: its weight grows by (1 - 1/N) / 8001, the others' shrink.
    times, num = 200, len(rows)
    many = torch.cat([rows.repeat(times, 1), rows[5:6]])
    once = make(many[:-1]).value
    slope = (make(many).value - once) * (times * num + 1)
    # The divisor num - 1 of covariances, and terms of second order, are of relative size 1 / 8000 and 40 / 8000.
    assert slope == pytest.approx(figure.effects[5], abs=0.02 * abs(figure.effects).max())


@pytest.mark.parametrize(("make", "data"), KINDS.values(), ids=KINDS)
def test_spreads_are_what_other_images_of_the_same_kind_would_make_of_the_figure(make, data):
    figures = [make(data(seed)) for seed in range(150)]
    real = np.std([figure.value for figure in figures], ddof=1)
    # the deviation of 150 values is known to 1 / sqrt(300) = 6%: three of these, and what first order leaves out
    assert np.mean([figure.spread for figure in figures]) == pytest.approx(real, rel=0.25)
    # of 200 sets to 5%, of ten images' mean better
    found = np.mean([bootstrap({"x": figure}, 40)["x"] for figure in figures[:10]])
    assert found == pytest.approx(real, rel=0.25)


def test_the_distance_at_infinity_has_no_bias_where_that_of_few_images_has():
    distances = [Frechet(REFERENCE, images(seed, 120)) for seed in range(400)]
    ends = [FrechetAtInfinity(distance) for distance in distances]
    values = np.array([[d.value, e.value] for d, e in zip(distances, ends, strict=True)])
    errors = values.std(axis=0, ddof=1) / 20  # of the means of 400
    bias = values.mean(axis=0) - TRUTH
    assert bias[0] > 5 * errors[0] and abs(bias[1]) < 3 * errors[1]
    assert np.mean([end.bias for end in ends]) == pytest.approx(bias[0], rel=0.5)
    assert np.mean([end.spread for end in ends]) == pytest.approx(errors[1] * 20, rel=0.35)
    curve = ends[0].curve
    assert curve[0][0] == 60 and curve[-1] == (120, distances[0].value) and len(curve) == 10


@pytest.mark.parametrize("at_infinity", [False, True])
def test_shared_noise_makes_small_differences_visible(at_infinity):
    changes, paired, apart = [], [], []
    for seed in range(40 if at_infinity else 60):
        noise = images(seed, 300)
        a, b = (Frechet(REFERENCE, x) for x in (noise, noise + 0.01))
        a, b = (FrechetAtInfinity(a), FrechetAtInfinity(b)) if at_infinity else (a, b)
        changes.append(difference(b, a, paired=True)[0])
        paired.append(difference(b, a, paired=True)[1])
        apart.append(difference(b, a, paired=False)[1])
    assert changes[-1] == b.value - a.value
    assert np.mean(paired) == pytest.approx(np.std(changes, ddof=1), rel=0.6 if at_infinity else 0.4)
    assert np.mean(apart) > (5 if at_infinity else 10) * np.mean(paired)


def test_few_images_have_a_distance_and_no_spread():
    figure = Frechet(REFERENCE, images(0, DIM))
    assert figure.value > 0 and figure.spread is None and not FrechetAtInfinity.possible(2 * DIM + 1, DIM)
    other = Frechet(REFERENCE, images(0))
    assert difference(figure, other, paired=True)[1] is None and measured({"x": figure})["spread"] == {"x": None}


def test_the_spread_of_recall_is_that_of_other_samples_not_of_other_real_images():
    # Few samples and many real images: of which other ones would hardly move it.
    real = torch.from_numpy(np.random.default_rng(0).normal(size=(2000, 16)))

    def recall(seed):
        return Recall(real, torch.from_numpy(0.9 * np.random.default_rng(seed).normal(size=(60, 16))), 3, "cpu")

    figures = [recall(seed) for seed in range(1, 41)]
    real_deviation = np.std([figure.value for figure in figures], ddof=1)
    # 40 values are known to 11%, ten jackknives of ten groups each to 1 / sqrt(2 * 9 * 10) = 7%
    assert np.mean([figure.spread for figure in figures[:10]]) == pytest.approx(real_deviation, rel=0.4)
    assert real_deviation > 3 * np.mean([figure.effects.std() / 2000**0.5 for figure in figures])
    assert figures[0].resampled(np.random.default_rng(0)) is None
