"""Power-function averages of the weights, and how to represent one of them by others.

The average at step t with exponent gamma weighs the weights theta(tau) of the steps so far by the profile

    p_{t,gamma}(tau) = (gamma + 1) tau^gamma / t^(gamma+1)    for 0 <= tau <= t, else 0,

whose width (standard deviation) relative to t is

    sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2).

Updated once per step, with decay (1 - 1/t)^(gamma+1) at step t = 1, 2, ..., it is exact for weights that are constant
between the steps: theta(i) counts with the integral of the profile over [i - 1, i].

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (2024, arXiv 2312.02696),
section 3 and its appendix. All arithmetic is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from epg_fast.config import check_sigma_rel

# Directions of the profiles' span that are smaller than this, relatively, are rounding errors of the inner products.
_SMALLEST_EIGENVALUE = 1e-12


def gamma_of(sigma_rel: float) -> float:
    """Exponent gamma > 0 of the profile whose relative width is `sigma_rel`.

    The positive root of gamma^3 + 7 gamma^2 + (16 - s) gamma + (12 - s) with s = sigma_rel^-2. Raises ValueError
    unless 0 < sigma_rel < 12^(-1/2), the width at gamma = 0.
    """
    check_sigma_rel(sigma_rel)
    s = sigma_rel**-2
    gamma = float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max())
    # one Newton step takes away what the eigenvalue solver leaves
    value = ((gamma + 7) * gamma + 16 - s) * gamma + 12 - s
    return gamma - value / ((3 * gamma + 14) * gamma + 16 - s)


def sigma_rel_of(gamma: float) -> float:
    """Relative width of the profile with exponent `gamma`."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def power_decay(step: int, gamma: float) -> float:
    """Decay of the average at update `step` (1-based): (1 - 1/step)^(gamma+1); 0 at the first, which is copied."""
    return (1 - 1 / step) ** (gamma + 1)


def inner_products(steps_a, gammas_a, steps_b, gammas_b) -> np.ndarray:
    """Integral of p_a p_b over tau, with the arguments (floats or arrays) broadcast against each other.

    For t_a <= t_b: (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) * (t_a / t_b)^gamma_b / t_b.
    """
    steps_a, gammas_a, steps_b, gammas_b = (np.asarray(v, np.float64) for v in (steps_a, gammas_a, steps_b, gammas_b))
    earlier, later = np.minimum(steps_a, steps_b), np.maximum(steps_a, steps_b)
    gammas_of_later = np.where(steps_a <= steps_b, gammas_b, gammas_a)
    factor = (gammas_a + 1) * (gammas_b + 1) / (gammas_a + gammas_b + 1)
    return factor * (earlier / later) ** gammas_of_later / later


@dataclass(frozen=True)
class Fit:
    """How an average is put together: sum_i weights[i] * average i."""

    weights: np.ndarray
    """[N], with sum 1."""
    residual: float
    """L2 distance of the combined profile from the wanted one, over the L2 norm of the wanted one."""

    @property
    def gain(self) -> float:
        """Root of the sum of squares of the weights: what independent errors of the averages are multiplied by."""
        return float(np.sqrt(np.square(self.weights).sum()))


def fit_profile(steps: np.ndarray, gammas: np.ndarray, step: float, gamma: float) -> Fit:
    """Represent the profile (step, gamma) by the profiles (steps[i], gammas[i]): least squares, weights of sum 1.

    The sum is an addition to the paper's fit, whose networks normalise their weights: what does not change during
    training is reproduced whatever the residual. Rounding hides residuals below 1e-7; they are given as 0.
    """
    products = inner_products(steps[:, None], gammas[:, None], steps, gammas)
    wanted = inner_products(steps, gammas, step, gamma)
    norm = float(inner_products(step, gamma, step, gamma))
    scale = np.diagonal(products) ** -0.5
    values, vectors = np.linalg.eigh(products * scale[:, None] * scale)
    kept = values > _SMALLEST_EIGENVALUE * values[-1]
    values, vectors = values[kept], vectors[:, kept]

    def solve(right):
        return scale * (vectors @ (vectors.T @ (scale * right) / values))

    weights, of_ones = solve(wanted), solve(np.ones_like(wanted))
    weights += (1 - weights.sum()) / of_ones.sum() * of_ones
    residual = (norm - 2 * weights @ wanted + weights @ products @ weights) / norm
    return Fit(weights, math.sqrt(residual) if residual > 1e-14 else 0.0)
