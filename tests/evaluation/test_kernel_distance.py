"""KID against plain loops, and its standard error against samples that are drawn anew."""

import numpy as np
import pytest
import torch

from epg_fast.evaluation import kernel_distance as module
from epg_fast.evaluation.kernel_distance import Kernel


def normal(num, dim=5, shift=0.0, seed=0):
    return shift + torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def kernel(a, b):
    return (float(np.dot(a, b)) / len(a) + 1) ** 3


def plain(x, y):
    """Unbiased squared MMD of equally many rows, one pair at a time."""
    m = len(x)
    inner = sum(kernel(a[i], a[j]) for a in (x, y) for i in range(m) for j in range(m) if i != j)
    return inner / (m * (m - 1)) - 2 * sum(kernel(a, b) for a in x for b in y) / m**2


@pytest.mark.parametrize("num", [30, 9])
def test_mean_and_deviation_are_those_of_plain_loops_over_subsets_drawn_from_the_seed(num):
    """A set smaller than the subsets is taken whole."""
    samples, reference, size = normal(num, shift=0.4), normal(25, seed=1), min(num, 12)
    rng, values = np.random.RandomState(7), []
    for _ in range(4):
        x, y = (rows.double().numpy()[rng.choice(len(rows), size, replace=False)] for rows in (samples, reference))
        values.append(plain(x, y))
    found = Kernel(samples, reference, subsets=4, size=12, seed=7)
    assert found.value == pytest.approx(np.mean(values), rel=1e-12)
    assert found.facts == {"std": pytest.approx(np.std(values)), "subsets": 4, "subset_size": size}
    assert Kernel(samples, reference, subsets=4, size=12, seed=8).value != found.value


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.3])
def test_spread_is_the_deviation_over_samples_drawn_anew(shift):
    reference = normal(1000, 16, seed=1)
    found = [Kernel(normal(200, 16, shift, seed=10 + i), reference, subsets=5, size=100, seed=i) for i in range(120)]
    # Of 120 values the deviation has a standard error of 6%. At no shift the spread errs upwards, by 41% at most.
    ratio = np.mean([f.spread**2 for f in found]) ** 0.5 / np.std([f.value for f in found])
    assert 0.85 < ratio < (1.15 if shift == 0.3 else 1.41 * 1.15)


def test_spread_and_effects_do_not_hang_on_the_blocks_and_count_the_choice_of_subsets(monkeypatch):
    samples, reference = normal(50, shift=0.3), normal(40, seed=1)
    x, y = samples.double().numpy(), reference.double().numpy()
    projections = [
        np.mean([kernel(a, b) for j, b in enumerate(x) if j != i]) - np.mean([kernel(a, b) for b in y])
        for i, a in enumerate(x)
    ]
    for name, blocks, tolerance in ((None, 0, 1e-12), ("_ROWS", 7, 1e-12), ("_COLUMNS", 30, 0.3)):
        if name:
            monkeypatch.setattr(module, name, blocks)
        found = Kernel(samples, reference, subsets=5, size=20)
        wanted = 4 * np.var(projections, ddof=1) / 50 + found.facts["std"] ** 2 / 5
        assert found.spread == pytest.approx(wanted**0.5, rel=tolerance)
        if name != "_COLUMNS":  # which takes some of the images
            assert np.allclose(found.effects, 2 * (projections - np.mean(projections)), rtol=1e-9)


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"got \[5, 2\] and \[5, 3\]"):
        Kernel(torch.zeros(5, 2), torch.zeros(5, 3))
    for num, subsets, size in ((2, 10, 2), (5, 0, 5), (5, 10, 1)):
        with pytest.raises(ValueError, match=rf"got {num} samples, 5 reference images and {subsets} subsets of {size}"):
            Kernel(torch.zeros(num, 2), torch.zeros(5, 2), subsets=subsets, size=size)
