"""Samples judged against real images without any network: are they recognised, and are they as varied?"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch

from epg_fast.config import JudgeConfig
from epg_fast.data import ImageFolder, images_of
from epg_fast.evaluation.figures import Frechet, Mean
from epg_fast.evaluation.frechet import gaussian_of
from epg_fast.evaluation.images import gray_vectors, load_images, open_stream, round_trip
from epg_fast.evaluation.reference import evenly
from epg_fast.wording import import_extra


class SmallJudge:
    """Judges images, reduced to small gray ones, by a classifier and by a Frechet distance in a PCA of the pixels.

    A support vector machine and the PCA are fitted on the real images of `config.train`; `config.test` are held-out
    ones, which the distance is to. Accuracy says nothing about variety: one perfect image per class scores 1. Both
    covariances of the distance are estimated, so that it is positive for two sets of one distribution and falls with
    their sizes: compare only distances of equally many images. The fit takes time quadratic in the training images:
    meant for thousands, not for millions. Its methods are those of `Judges`. Raises ValueError for folders that do not
    go together, and for more components than the images have.
    """

    name = "small"
    best = {"accuracy": "high", "frechet_distance": "low"}
    missing: dict[str, str] = {}
    least = 2

    def __init__(self, config: JudgeConfig):
        svm, decomposition = import_extra("sklearn.svm"), import_extra("sklearn.decomposition")
        check_folders(config)
        self.config = config
        self.train, self.test = (load_images(path, config.size) for path in (config.train, config.test))
        pixels, labels = self.train
        most = min(pixels.shape)
        if not 1 <= config.components <= most:
            raise ValueError(f"components is {config.components}, want 1 to {most} (training images, and their pixels)")
        # scikit-learn's own example for its 8 x 8 digits: pixels in 0..16 and gamma 0.001. Squared distances grow with
        # the number of pixels, so gamma shrinks with it. A seed of its own, or it would draw from NumPy's global one.
        self._machine = svm.SVC(gamma=0.001 * 64 / pixels.shape[1], random_state=0).fit(pixels * 16.0, labels)
        self._pca = decomposition.PCA(config.components, svd_solver="full").fit(pixels)
        self._real = self._gaussian(self.test[0])

    def rows(self, images, labels):
        if labels is None:
            raise ValueError("samples: no labels (arr_1), which accuracy needs; give a samples.npz or class folders")
        pixels, labels = gray_vectors(images, self.config.size), np.asarray(labels)
        unknown = np.setdiff1d(labels, self.train[1])
        if unknown.size:
            raise ValueError(f"samples have labels that no training image has: {unknown.tolist()[:10]}")
        return {
            "small/features": torch.from_numpy(self._pca.transform(pixels)),
            "small/right": torch.from_numpy(self._predicted(pixels) == labels),
            "small/label": torch.from_numpy(labels),
        }

    def figures(self, rows):
        return {
            "accuracy": Mean(lambda: rows["small/right"].numpy()),
            "frechet_distance": Frechet(self._real, rows["small/features"]),
        }

    @functools.cached_property
    def description(self):
        c, real = self.config, {}
        for name, (pixels, labels) in (("train", self.train), ("test", self.test)):
            digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()  # as they are compared
            real[name] = {"path": getattr(c, name), "sha256": digest}
        return real | {"size": c.size, "components": c.components}

    def facts(self, figures, rows, size):
        (test_x, test_y), pixels = self.test, min(size)
        right, labels = rows["small/right"].numpy(), rows["small/label"].numpy()
        return {
            "per_class_recall": {str(label): float(right[labels == label].mean()) for label in np.unique(labels)},
            "classifier_accuracy": float((self._predicted(test_x) == test_y).mean()),
            "baselines": self._baselines(len(labels), pixels),
            "num_train": len(self.train[0]),
            "num_test": len(test_x),
            "stored_size": pixels,
            "size": self.config.size,
            "components": self.config.components,
        }

    def _baselines(self, num: int, pixels: int) -> dict:
        """What real images and class means would score, with as many images as there are samples (or all there are)."""
        train_x, train_y = self.train
        # Files come sorted by class: evenly spaced ones keep the classes' shares.
        chosen = evenly(len(train_x), num)
        classes = np.unique(train_y)
        means = np.stack([train_x[train_y == label].mean(axis=0) for label in classes])
        real = {"real": train_x[chosen], "class_means": means[np.searchsorted(classes, train_y[chosen])]}
        if pixels > self.config.size:
            real["real_resized"] = round_trip(train_x[chosen], pixels)
            real["class_means"] = round_trip(real["class_means"], pixels)
        distances = {name: self._real.distance(self._gaussian(x)) for name, x in real.items()}
        return {
            "num_images": len(chosen),
            "real_frechet_distance": distances["real"],
            "real_resized_frechet_distance": distances.get("real_resized"),
            "class_means_frechet_distance": distances["class_means"],
            "class_means_accuracy": float((self._predicted(real["class_means"]) == train_y[chosen]).mean()),
        }

    def sentence(self, num, size):
        c, pixels, real_pixels = self.config, min(size), min(open_stream(self.config.test).size)
        reduced = f"{c.size}x{c.size}"
        stored = "as stored" if real_pixels == c.size else f"reduced from {real_pixels}x{real_pixels}"
        return (
            f"{num} samples of {pixels}x{pixels} pixels, compared as {reduced} grayscale (bicubic) with "
            f"{len(self.test[0])} held-out real images ({stored}). Accuracy: share recognised as their label by an SVC "
            f"fitted on {len(self.train[0])} real training images. Frechet distance: to the held-out images, in the "
            f"first {c.components} principal components of the training images' pixels in [0, 1]."
        )

    def check(self, num):
        pass  # figures of few images are compared with such of as few: the baselines

    def _predicted(self, pixels: np.ndarray) -> np.ndarray:
        return self._machine.predict(pixels * 16.0)

    def _gaussian(self, images: np.ndarray):
        return gaussian_of(torch.from_numpy(self._pca.transform(images)), "cpu")


def check_folders(config: JudgeConfig) -> None:
    """Raise ValueError unless both folders of real images are set, with the same classes, two at least."""
    paths, opened = {name: getattr(config, name) for name in ("train", "test")}, []
    if unset := next((name for name, path in paths.items() if not path), None):
        raise ValueError(
            f"evaluate: --{unset} is missing; pass --train and --test, folders of class folders of real images"
        )
    for name, path in paths.items():
        with images_of(name):
            opened.append(ImageFolder(path))
    images, (train, test) = opened[0], (folder.classes for folder in opened)
    if len(set(images.labels)) < 2:
        raise ValueError(
            f"evaluate: {config.train} has images of one class, {train[images.labels[0]]}, want two at least, which a "
            "classifier could tell apart; FID and others (--reference and --inception) ask for none"
        )
    if train != test:
        only_train, only_test = sorted(set(train) - set(test))[:5], sorted(set(test) - set(train))[:5]
        raise ValueError(
            f"train and test must have the same class folders: only train has {only_train}, only test has {only_test}"
        )
