"""Successive halving: rounds of images, and who goes on."""

import math

import numpy as np
import pytest

from epg_fast.sweep.halving import Judged, cut, ranked, round_sizes


def test_rounds_grow_fourfold_in_whole_batches():
    assert round_sizes(10_000, 500, 64) == [640, 2560, 10_000]
    assert round_sizes(10_000, 2500, 64) == [2560, 10_000]
    assert round_sizes(400, 100, 7) == [105, 400]
    assert round_sizes(10, 1, 64) == [10]
    assert round_sizes(1000, 1, 10) == [10, 20, 70, 250, 1000]


def judged(value, spread=None, common=None, count=100):
    """A figure whose effects are those of `common` noise and of its own, with the given standard error alone."""
    if spread is None:
        return Judged(value, None, None)
    own = np.resize([1.0, -1.0], count) * spread * math.sqrt(count)
    return Judged(value, spread, own + (0 if common is None else common))


def test_the_best_share_stays_whichever_direction_is_best():
    found = {n: judged(float(value), 0.01) for n, value in enumerate([5, 3, 8, 1, 7, 2, 6, 4])}
    assert cut(found, "low", 0.25)["kept"] == [3, 5]
    assert cut(found, "high", 0.25)["kept"] == [2, 4]
    assert cut(found, "low", 0.26)["kept"] == [3, 5, 1]
    assert cut(found, "low", 0.25)["order"] == [3, 5, 1, 7, 0, 6, 4, 2]


def test_who_is_within_the_paired_spread_of_the_last_that_stays_stays_too_up_to_half():
    rng = np.random.default_rng(0)
    common = rng.normal(size=100) * 50  # far larger than any difference, and the same in all
    values = [1.0, 2.0, 2.05, 2.08, 2.09, 2.5, 3.0, 4.0]
    found = {n: judged(value, 0.0 if n == 1 else 0.1, common) for n, value in enumerate(values)}
    decided = cut(found, "low", 0.25)  # unpaired, all would be within the spread of the common noise
    assert (decided["kept"], decided["kept_within_spread"], decided["out_within_spread"]) == ([0, 1, 2, 3], [2, 3], [4])
    # where there is no spread half stay
    decided = cut({n: judged(float(n)) for n in range(9)}, "low", 0.25)
    assert decided["kept"] == [0, 1, 2, 3, 4] and not decided["out_within_spread"]


def test_what_is_no_number_is_last_in_both_directions():
    found = {0: judged(math.nan, 0.1), 1: judged(2.0, 0.1), 2: judged(1.0, 0.1), 3: judged(math.inf, 0.1)}
    assert ranked(found, "low") == [2, 1, 3, 0]
    assert ranked(found, "high") == [3, 1, 2, 0]
    assert cut(found, "low", 0.25)["kept"] == [2]


@pytest.mark.parametrize("seed", range(20))
def test_halving_never_drops_the_best_of_a_planted_landscape(seed):
    """Figures are means of image scores: a parabola of 48 settings, noise that all share, and a little of their own."""
    rng = np.random.default_rng(seed)
    planted = 0.002 * (np.arange(48) - rng.integers(48)) ** 2
    common = rng.normal(size=10_000)
    own = rng.normal(size=(48, 10_000)) * 0.01
    alive, drawn = list(range(48)), 0
    for images in round_sizes(10_000, 500, 64):
        scores = {n: planted[n] + common[:images] + own[n, :images] for n in alive}
        drawn += images * len(alive)
        found = {n: Judged(x.mean(), float(x.std() / math.sqrt(images)), x - x.mean()) for n, x in scores.items()}
        alive = cut(found, "low", 0.25)["kept"]
        assert int(planted.argmin()) in alive
    assert ranked(found, "low")[0] == planted.argmin()
    assert drawn < 0.4 * 48 * 10_000
