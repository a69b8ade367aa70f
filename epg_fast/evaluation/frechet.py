"""Frechet distance between image sets in a PCA of their pixels: the idea of FID without a feature network."""

from __future__ import annotations

import numpy as np

from epg_fast.evaluation.extras import import_extra


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, in squared units of the features.

    `|mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^(1/2))`; means [D], covariances [D, D]. The last trace
    is the sum of the singular values of `cov1^(1/2) cov2^(1/2)`: both roots come from symmetric eigendecompositions, so
    unlike a general matrix root of the non-symmetric product this never turns complex, accepts singular covariances
    (fewer samples than dimensions) and gives the same value with the arguments exchanged. Raises ValueError for shapes
    that do not match and for values that are not finite. Source: Dowson and Landau, "The Frechet distance between
    multivariate normal distributions", 1982.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(array, dtype=np.float64) for array in (mean1, cov1, mean2, cov2))
    dim = mean1.size
    if mean1.shape != (dim,) or mean2.shape != (dim,) or cov1.shape != (dim, dim) or cov2.shape != (dim, dim):
        raise ValueError(
            f"expected means [D] and covariances [D, D], got {mean1.shape}, {cov1.shape}, {mean2.shape}, {cov2.shape}"
        )
    if not all(np.isfinite(array).all() for array in (mean1, cov1, mean2, cov2)):
        raise ValueError("means and covariances must be finite")
    root_trace = np.linalg.svd(_root(cov1) @ _root(cov2), compute_uv=False).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2.0 * root_trace)


def pca_frechet_distance(samples: np.ndarray, reference: np.ndarray, fit_on: np.ndarray, components: int = 20) -> float:
    """Frechet distance of `samples` to `reference` in the first principal components of `fit_on`.

    All arguments: float [N, D], pixels in [0, 1]; `fit_on` are the real training images and `reference` held-out ones.
    Both covariances are estimated, so the distance of two sets from one distribution is positive and falls with their
    sizes: compare only distances of equally many images. Raises ValueError for fewer than two images or when
    `components` exceeds what `fit_on` has.
    """
    decomposition = import_extra("sklearn.decomposition")
    for name, images in (("samples", samples), ("reference", reference), ("fit_on", fit_on)):
        if np.ndim(images) != 2 or len(images) < 2:
            raise ValueError(f"{name}: expected at least two images [N, D], got shape {list(np.shape(images))}")
    if not 1 <= components <= min(np.shape(fit_on)):
        raise ValueError(
            f"components must lie in 1..{min(np.shape(fit_on))} (images and pixels of fit_on): {components}"
        )
    pca = decomposition.PCA(components, svd_solver="full").fit(fit_on)
    return frechet_distance(*_moments(pca.transform(samples)), *_moments(pca.transform(reference)))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # cov returns a bare number for a single feature.
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def _root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    # Rounding makes the zero eigenvalues of a singular covariance slightly negative.
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
