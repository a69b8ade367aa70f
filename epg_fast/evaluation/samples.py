"""Samples judged against real images without any network: are they recognised, and are they as varied?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from epg_fast.config import EvaluateConfig
from epg_fast.data import ImageFolder
from epg_fast.evaluation.classifier import class_accuracy
from epg_fast.evaluation.frechet import pca_frechet_distance
from epg_fast.evaluation.images import load_images, round_trip, stored_size
from epg_fast.evaluation.record import sampling_record


def evaluate_samples(config: EvaluateConfig) -> dict:
    """Accuracy and Frechet distance of `config.samples` against real images, as a dict that JSON holds.

    Keys: `accuracy`, `frechet_distance`, `per_class_recall`, `classifier_accuracy` (on held-out real images),
    `baselines` (what real images and class means would score), sizes, `protocol` (a sentence) and `sampling` (how
    the samples were drawn: see `sampling_record`). Raises ValueError for missing folders and for classes that do not
    line up.
    """
    check_folders(config, config.samples, "samples")
    _check_sampled_classes(config)
    samples, labels = load_images(config.samples, config.size)
    train_x, train_y = load_images(config.train, config.size)
    test_x, test_y = load_images(config.test, config.size)
    pixels = stored_size(config.samples)
    recognised = class_accuracy(samples, labels, train_x, train_y, reference=(test_x, test_y))
    return {
        "kind": "samples",
        "samples": str(config.samples),
        "accuracy": recognised["accuracy"],
        "frechet_distance": pca_frechet_distance(samples, test_x, train_x, config.components),
        "per_class_recall": {str(label): share for label, share in recognised["per_class_recall"].items()},
        "classifier_accuracy": recognised["classifier_accuracy"],
        "baselines": _baselines(config, len(samples), pixels, train_x, train_y, test_x),
        "num_samples": len(samples),
        "num_train": len(train_x),
        "num_test": len(test_x),
        "stored_size": pixels,
        "size": config.size,
        "components": config.components,
        "protocol": _protocol(config, len(samples), pixels, len(train_x), len(test_x), stored_size(config.test)),
        "sampling": sampling_record(config.samples, len(samples)),
    }


def _baselines(config, num, pixels, train_x, train_y, test_x) -> dict:
    """What real images and class means would score, with as many images as there are samples (or all there are)."""
    # Files come sorted by class: evenly spaced ones keep the classes' shares.
    chosen = np.linspace(0, len(train_x) - 1, min(num, len(train_x))).round().astype(int)
    classes = np.unique(train_y)
    means = np.stack([train_x[train_y == label].mean(axis=0) for label in classes])
    real = {"real": train_x[chosen], "class_means": means[np.searchsorted(classes, train_y[chosen])]}
    if pixels > config.size:
        real["real_resized"] = round_trip(train_x[chosen], pixels)
        real["class_means"] = round_trip(real["class_means"], pixels)
    distances = {name: pca_frechet_distance(x, test_x, train_x, config.components) for name, x in real.items()}
    accuracy = class_accuracy(real["class_means"], train_y[chosen], train_x, train_y)["accuracy"]
    return {
        "num_images": len(chosen),
        "real_frechet_distance": distances["real"],
        "real_resized_frechet_distance": distances.get("real_resized"),
        "class_means_frechet_distance": distances["class_means"],
        "class_means_accuracy": accuracy,
    }


def _protocol(config, num, pixels, num_train, num_test, real_pixels) -> str:
    reduced = f"{config.size}x{config.size}"
    stored = "as stored" if real_pixels == config.size else f"reduced from {real_pixels}x{real_pixels}"
    return (
        f"{num} samples of {pixels}x{pixels} pixels, compared as {reduced} grayscale (bicubic) with {num_test} "
        f"held-out real images ({stored}). Accuracy: share recognised as their label by an SVC fitted on {num_train} "
        "real training images. Frechet distance: to the held-out images, in the first "
        f"{config.components} principal components of the training images' pixels in [0, 1]."
    )


def check_folders(config: EvaluateConfig, judged: str | None, name: str) -> None:
    """Raise ValueError unless what is judged is set, and the real images have the same classes, two at least."""
    for field, value in ((name, judged), ("train", config.train), ("test", config.test)):
        if not value:
            raise ValueError(f"evaluate: `{field}` is not set")
    images = ImageFolder(config.train)
    train, test = images.classes, ImageFolder(config.test).classes
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


def _check_sampled_classes(config: EvaluateConfig) -> None:
    # A folder of a few sampled classes would be numbered 0, 1, ... whatever they are.
    if Path(config.samples).is_dir():
        samples, train = len(ImageFolder(config.samples).classes), len(ImageFolder(config.train).classes)
        if samples != train:
            raise ValueError(
                f"{config.samples} has {samples} class folders and {config.train} {train}, so that their class indices "
                "differ; sample every class, or give the samples.npz, which knows its labels"
            )
