"""Is a sample recognised as its label by a classifier that knows only real images?"""

from __future__ import annotations

import numpy as np

from epg_fast.evaluation.extras import import_extra


def class_accuracy(
    samples: np.ndarray,
    labels: np.ndarray,
    train_x: np.ndarray,
    train_y: np.ndarray,
    reference: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict:
    """Share of the samples that a support vector machine, fitted on real images, recognises as their label.

    `samples` [N, D], `train_x` [M, D]: pixels in [0, 1]; `labels` [N], `train_y` [M]: class indices. `reference`:
    held-out real images and labels, on which the classifier itself is judged. Returns `accuracy`, `per_class_recall`
    ({class: share}, classes that were sampled) and `classifier_accuracy` (None without `reference`). Accuracy says
    nothing about variety: one perfect image per class scores 1, so read it together with the Frechet distance.
    The fit takes time quadratic in M: meant for thousands of training images, not for millions. Raises ValueError for
    sizes that do not match and for labels that `train_y` lacks.
    """
    svm = import_extra("sklearn.svm")
    _check("train", train_x, train_y)
    _check("samples", samples, labels, train_x, train_y)
    # scikit-learn's own example for its 8 x 8 digits: pixels in 0..16 and gamma 0.001. Squared distances grow with the
    # number of pixels, so gamma shrinks with it.
    classifier = svm.SVC(gamma=0.001 * 64 / train_x.shape[1]).fit(train_x * 16.0, train_y)
    result = _scores(classifier.predict(samples * 16.0), labels)
    result["classifier_accuracy"] = None
    if reference is not None:
        _check("reference", *reference, train_x, train_y)
        result["classifier_accuracy"] = _scores(classifier.predict(reference[0] * 16.0), reference[1])["accuracy"]
    return result


def _scores(predicted: np.ndarray, labels: np.ndarray) -> dict:
    right = predicted == labels
    return {
        "accuracy": float(right.mean()),
        "per_class_recall": {int(label): float(right[labels == label].mean()) for label in np.unique(labels)},
    }


def _check(name, x, y, train_x=None, train_y=None) -> None:
    if np.ndim(x) != 2 or len(x) == 0 or np.shape(y) != (len(x),):
        raise ValueError(
            f"{name}: expected images [N, D] and labels [N], got {list(np.shape(x))} and {list(np.shape(y))}"
        )
    if train_x is None:
        return
    if x.shape[1] != train_x.shape[1]:
        raise ValueError(f"{name} have {x.shape[1]} pixels, the training images {train_x.shape[1]}")
    unknown = np.setdiff1d(y, train_y)
    if unknown.size:
        raise ValueError(f"{name} have labels that no training image has: {unknown.tolist()[:10]}")
