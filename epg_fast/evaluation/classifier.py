"""Is a sample recognised as its label by a classifier that knows only real images?"""

from __future__ import annotations

import numpy as np

from epg_fast.evaluation.extras import import_extra


class Classifier:
    """A support vector machine of real images: `train_x` [M, D], pixels in [0, 1], and `train_y` [M], class indices.

    The fit takes time quadratic in M: meant for thousands of images, not for millions.
    """

    def __init__(self, train_x: np.ndarray, train_y: np.ndarray):
        svm = import_extra("sklearn.svm")
        _check("train", train_x, train_y)
        self.num_pixels, self.classes = train_x.shape[1], np.unique(train_y)
        # scikit-learn's own example for its 8 x 8 digits: pixels in 0..16 and gamma 0.001. Squared distances grow with
        # the number of pixels, so gamma shrinks with it. A seed of its own, or it would draw from NumPy's global one.
        machine = svm.SVC(gamma=0.001 * 64 / train_x.shape[1], random_state=0)
        self._machine = machine.fit(train_x * 16.0, train_y)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Classes [N] of images [N, D]."""
        return self._machine.predict(images * 16.0)

    def check(self, labels: np.ndarray, name: str = "samples") -> None:
        """Raise ValueError for labels that no training image has."""
        unknown = np.setdiff1d(labels, self.classes)
        if unknown.size:
            raise ValueError(f"{name} have labels that no training image has: {unknown.tolist()[:10]}")


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
    Raises ValueError for sizes that do not match and for labels that `train_y` lacks.
    """
    classifier = Classifier(train_x, train_y)
    right = _right(classifier, "samples", samples, labels)
    return {
        "accuracy": float(right.mean()),
        "per_class_recall": per_class(right, labels),
        "classifier_accuracy": None if reference is None else float(_right(classifier, "reference", *reference).mean()),
    }


def per_class(right: np.ndarray, labels: np.ndarray) -> dict[int, float]:
    """{class: share that is right} of images with labels [N] that are `right` or not, bool [N]."""
    return {int(label): float(right[labels == label].mean()) for label in np.unique(labels)}


def _right(classifier: Classifier, name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    _check(name, x, y)
    if x.shape[1] != classifier.num_pixels:
        raise ValueError(f"{name} have {x.shape[1]} pixels, the training images {classifier.num_pixels}")
    classifier.check(y, name)
    return classifier.predict(x) == y


def _check(name: str, x: np.ndarray, y: np.ndarray) -> None:
    if np.ndim(x) != 2 or len(x) == 0 or np.shape(y) != (len(x),):
        raise ValueError(
            f"{name}: expected images [N, D] and labels [N], got {list(np.shape(x))} and {list(np.shape(y))}"
        )
