"""Inception Score, precision and recall against closed forms and plain loops."""

import numpy as np
import pytest
import torch

from epg_fast.evaluation import generative, inception_score, precision_recall


def brute_force(real, fake, k):
    """(precision, recall) from all distances, one pair at a time."""
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)

    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)[k - 1]

    def covered(points, centres):
        radii = [radius(centres, i) for i in range(len(centres))]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    return covered(fake, real), covered(real, fake)


def test_the_score_has_its_closed_forms_and_counts_all_images():
    assert inception_score(np.full((20, 7), 1 / 7), splits=2) == (pytest.approx(1), pytest.approx(0))
    assert inception_score(np.eye(5)[np.arange(100) % 5], splits=1) == (pytest.approx(5), 0)
    p = np.random.default_rng(0).dirichlet(np.full(4, 0.3), size=103)
    # splits of one image score 1 each, whatever the image
    assert inception_score(p[:5], splits=5) == (pytest.approx(1), pytest.approx(0))
    scores = []
    for part in np.split(p[np.random.RandomState(2020).permutation(103)], [25, 51, 77]):
        kl = (part * np.log(part / part.mean(axis=0))).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    assert inception_score(p, splits=4) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))


@pytest.fixture(params=[(2048, 8192), (7, 5), (4, 3)])
def _blocks(request, monkeypatch):
    """Pairs are computed in blocks of so many rows and columns."""
    monkeypatch.setattr(generative, "_ROWS", request.param[0])
    monkeypatch.setattr(generative, "_COLUMNS", request.param[1])


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_the_plain_loop_and_duplicates_cover_one_another_whatever_the_blocks(k):
    generator = torch.Generator().manual_seed(k)
    real = torch.randn(40, 3, generator=generator)
    fake = 0.7 * torch.randn(33, 3, generator=generator) + 1.1
    expected = brute_force(real, fake, k)
    assert 0 < expected[1] < expected[0] < 1
    assert precision_recall(real, fake, k) == expected
    # every point has three duplicates, so that up to k = 3 balls have no extent
    points = (torch.rand(3, 50, generator=generator) * 37).repeat_interleave(4, dim=0)
    assert precision_recall(points, points.flip(0), k) == (1.0, 1.0)
    assert precision_recall(points, points + 1e-3, k) == (0.0, 0.0)


def test_a_point_on_the_border_of_a_ball_lies_in_it_however_the_products_round():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        # 24 bits each, and sums that float32 holds: four points in a row at exactly the same distances
        start = torch.randint(2**23, 3 * 2**22, (64,), generator=generator).float() / 2**13
        step = torch.randint(0, 2**20, (64,), generator=generator).float() / 2**13
        real = torch.stack([start + step, start + 2 * step])
        fake = torch.stack([start, start + 3 * step])
        assert precision_recall(real, fake, 1) == (1.0, 1.0)
        assert precision_recall(real, torch.stack([start - step / 64, start + 3.02 * step]), 1)[0] == 0.0


def test_sets_that_cannot_be_compared_and_splits_that_cannot_be_are_refused():
    for real, fake, k, message in (
        ((4, 2), (4, 3), 3, r"got \[4, 2\] and \[4, 3\]"),
        ((5, 2), (3, 2), 3, "k is 3, .* 5 real and 3 fake"),
        ((5, 2), (3, 2), 0, "k is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            precision_recall(torch.zeros(real), torch.zeros(fake), k)
    for splits in (0, 4):
        with pytest.raises(ValueError, match=rf"splits is {splits}, .*\[3, 2\]"):
            inception_score(np.full((3, 2), 0.5), splits)
