"""The Frechet distance of Gaussians, and moments that come in batches; other libraries': test_other_libraries.py."""

import numpy as np
import pytest
import torch

from epg_fast.evaluation import frechet_distance
from epg_fast.evaluation.frechet import RunningMoments


def test_agrees_with_the_matrix_root_of_scipy():
    linalg, rng = pytest.importorskip("scipy.linalg"), np.random.default_rng(1)
    (cov1, cov2), (mean1, mean2) = (np.cov(rng.normal(size=(20, 41))) for _ in range(2)), rng.normal(size=(2, 20))
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * linalg.sqrtm(cov1 @ cov2).real)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances_keep_the_closed_form():
    # tr (u u^T v v^T)^(1/2) = |u . v|
    u, v, zero = np.array([1.0, 2.0, 0.0, 0.5]), np.array([-3.0, 1.0, 1.0, 0.0]), np.zeros(4)
    expected = u @ u + v @ v - 2 * abs(u @ v)
    # An eigenvalue of 0 is known to 4 eps of the largest, its root to the root of that: in either of two factors, three
    # times, doubled.
    error = 2 * 3 * 2 * np.sqrt(4 * np.finfo(float).eps * (u @ u) * (v @ v))
    assert frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(expected, abs=error)


def test_batches_of_any_size_give_the_moments_of_the_whole_in_float64():
    rows = (1000 + np.random.default_rng(0).normal(size=(4096, 2))).astype(np.float32)
    moments = RunningMoments(2)
    for batch in np.split(rows, [1, 40, 43, *range(64, 4096, 64)]):
        moments.update(torch.from_numpy(batch))
    found = moments.gaussian()
    assert moments.num == 4096
    assert np.allclose(found.mean, rows.mean(axis=0, dtype=float), rtol=4096 * np.finfo(float).eps)  # of like terms
    assert np.allclose(found.covariance, np.cov(rows.astype(float), rowvar=False), rtol=1e-9)


def test_what_has_no_distance_is_refused():
    with pytest.raises(ValueError, match="covariances"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(np.zeros(2), np.eye(2), np.array([0, np.nan]), np.eye(2))
    moments = RunningMoments(2)
    moments.update(torch.ones(1, 2))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments.gaussian()
