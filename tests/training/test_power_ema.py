"""The profiles of power-function averages and the fit of one by others, against quadrature and direct sums."""

import numpy as np
import pytest

from epg_fast.training.power_ema import fit_profile, gamma_of, inner_products, power_decay, sigma_rel_of


def direct_weights(steps, gamma):
    """How much theta(1..steps) count: the profile integrated over each step; [steps]."""
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    return np.diff(edges)


def test_the_papers_widths_have_the_papers_exponents():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [1e-4, 0.01, 0.05, 0.1, 0.2, 0.2886])
def test_width_and_exponent_are_inverse(sigma_rel):
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.1, 0.25])
def test_the_width_is_the_standard_deviation_of_the_steps_that_count(sigma_rel):
    weights, steps = direct_weights(20_000, gamma_of(sigma_rel)), np.arange(20_000) + 0.5
    mean = weights @ steps
    assert weights.sum() == pytest.approx(1)
    assert np.sqrt(weights @ (steps - mean) ** 2) / 20_000 == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_widths_that_no_average_has_are_refused(sigma_rel):
    with pytest.raises(ValueError, match="want more than 0 and less than 0.2887"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_the_decays_give_the_integrated_profile(sigma_rel):
    gamma, weights = gamma_of(sigma_rel), np.zeros(50)
    for i in range(50):
        weights *= power_decay(i + 1, gamma)
        weights[i] += 1 - power_decay(i + 1, gamma)
    np.testing.assert_allclose(weights, direct_weights(50, gamma), rtol=1e-12)


def test_inner_products_agree_with_quadrature():
    nodes, quadrature = np.polynomial.legendre.leggauss(80)
    for step_a, sigma_a, step_b, sigma_b in [
        (3, 0.05, 3, 0.05),
        (7, 0.05, 2, 0.1),
        (2, 0.25, 9, 0.07),
        (5, 0.1, 6, 0.1),
    ]:
        a, b, end = gamma_of(sigma_a), gamma_of(sigma_b), min(step_a, step_b)
        tau = end * (nodes + 1) / 2
        product = (a + 1) * tau**a / step_a ** (a + 1) * (b + 1) * tau**b / step_b ** (b + 1)
        got = inner_products(step_a, a, step_b, b)
        assert got == pytest.approx(end / 2 * quadrature @ product, rel=1e-9)


def tracked(count, widths=(0.05, 0.1), every=10.0):
    """Profiles of `count` snapshots: (steps, gammas)."""
    return np.repeat(np.arange(1, count + 1) * every, len(widths)), np.tile([gamma_of(w) for w in widths], count)


@pytest.mark.parametrize(
    ("count", "sigma_rel", "residual"),
    [(4, 0.075, 3.3e-2), (20, 0.075, 2.3e-3), (100, 0.075, 9.2e-5), (100, 0.15, 2.4e-4), (100, 0.03, 1.2e-3)],
)
def test_the_residual_is_the_distance_of_the_profiles(count, sigma_rel, residual):
    steps, gammas = tracked(count)
    fit = fit_profile(steps, gammas, count * 10, gamma_of(sigma_rel))
    assert fit.weights.sum() == pytest.approx(1, abs=1e-9)
    assert fit.residual == pytest.approx(residual, rel=0.05)
    tau = (np.arange(20_000) + 0.5) / 20_000 * count * 10
    profiles = [(g + 1) * (tau / t) ** g / t * (tau <= t) for t, g in zip(steps, gammas, strict=True)]
    gamma = gamma_of(sigma_rel)
    wanted = (gamma + 1) * (tau / count / 10) ** gamma / count / 10
    distance = np.linalg.norm(fit.weights @ np.array(profiles) - wanted) / np.linalg.norm(wanted)
    assert distance == pytest.approx(fit.residual, rel=0.05)


def test_no_weights_of_sum_1_fit_better():
    steps, gammas = tracked(6)
    gamma = gamma_of(0.07)
    fit = fit_profile(steps, gammas, 60, gamma)
    products, wanted = (
        inner_products(steps[:, None], gammas[:, None], steps, gammas),
        inner_products(steps, gammas, 60, gamma),
    )
    gradient = products @ fit.weights - wanted
    np.testing.assert_allclose(gradient, gradient.mean(), atol=1e-9 * abs(wanted).max())


@pytest.mark.parametrize("widths", [(0.05, 0.1), (0.1,), (0.1, 0.1001, 0.1002)])
def test_a_tracked_width_at_the_last_snapshot_is_that_snapshot(widths):
    steps, gammas = tracked(50, widths)
    fit = fit_profile(steps, gammas, 500, gamma_of(widths[-1]))
    assert fit.residual < 1e-6 and fit.gain <= 1 + 1e-6
    if len(widths) < 3:  # averages that are nearly the same can stand for each other
        np.testing.assert_allclose(fit.weights, np.eye(len(steps))[-1], atol=1e-8)
