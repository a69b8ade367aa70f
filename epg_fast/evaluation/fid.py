"""FID, Inception Score, precision and recall of samples against a reference."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from epg_fast.config import EvaluateConfig
from epg_fast.distributed import resolve_device
from epg_fast.evaluation.frechet import frechet_distance
from epg_fast.evaluation.generative import RunningMoments, inception_score, precision_recall
from epg_fast.evaluation.inception import FeatureNetwork
from epg_fast.evaluation.record import sampling_record
from epg_fast.evaluation.reference import Reference, open_reference
from epg_fast.evaluation.sources import ImageStream, open_stream

log = logging.getLogger("epg_fast")
# Precision and recall compare all pairs and keep all features: of larger sets they take images at even distances.
_MOST_COMPARED = 50_000


def evaluate_fid(config: EvaluateConfig) -> dict:
    """Figures of `config.samples` against `config.reference` with the network in `config.inception`, for JSON.

    Keys: `fid`, `inception_score` and its `inception_score_std` over splits, `precision` and `recall` (null with the
    reason in `precision_recall_missing` when the reference holds no images), numbers of images, `inception` (which
    network), `protocol` (a sentence) and `sampling` (how the samples were drawn: see `sampling_record`). What can be
    checked is checked before the network runs. Raises ValueError for files that do not fit.
    """
    device = resolve_device(config.device)
    samples = open_stream(config.samples)
    sampling = sampling_record(config.samples, samples.num)
    network = FeatureNetwork(config.inception, device)
    reference = open_reference(config.reference, network.num_features, samples.size)
    _check_numbers(config, samples, reference)
    _warn_of_few(samples.num, network.num_features)
    drawn = _extract(samples, network, config.batch_size, "samples", with_probabilities=True)
    real = _extract(reference.images, network, config.batch_size, "reference") if reference.images else None
    mean, covariance = reference.statistics or (real.moments.mean, real.moments.covariance())
    score, score_std = inception_score(drawn.probabilities, config.splits)
    precision, recall = (
        precision_recall(real.features, drawn.features, config.neighbors, device) if real else (None, None)
    )
    return {
        "kind": "fid",
        "samples": config.samples,
        "reference": config.reference,
        "fid": frechet_distance(drawn.moments.mean, drawn.moments.covariance(), mean, covariance),
        "inception_score": score,
        "inception_score_std": score_std,
        "precision": precision,
        "recall": recall,
        "precision_recall_missing": None if real else f"{config.reference} holds statistics but no images (arr_0)",
        "num_samples": samples.num,
        "num_reference_images": reference.images.num if real else None,
        "image_size": list(samples.size),
        "neighbors": config.neighbors,
        "splits": config.splits,
        "inception": network.description,
        "protocol": _protocol(config, samples, reference, network),
        "sampling": sampling,
    }


@dataclass
class _Extracted:
    moments: RunningMoments
    features: torch.Tensor
    probabilities: np.ndarray | None


def _extract(
    images: ImageStream, network: FeatureNetwork, batch_size: int, name: str, with_probabilities: bool = False
) -> _Extracted:
    """Run all images through the network: moments of all features, and the features that are compared pairwise."""
    moments, features, probabilities = RunningMoments(network.num_features), [], []
    compared = np.zeros(images.num, dtype=bool)
    compared[np.linspace(0, images.num - 1, min(images.num, _MOST_COMPARED)).round().astype(int)] = True
    batches = tqdm(images.batches(batch_size), total=-(-images.num // batch_size), desc=name, unit="batch")
    for batch in batches:
        if with_probabilities:
            found, p = network.features_and_probabilities(batch)
            probabilities.append(p)
        else:
            found = network.features(batch)
        features.append(found[compared[moments.num : moments.num + len(batch)]])
        moments.update(found.numpy())
    return _Extracted(moments, torch.cat(features), torch.cat(probabilities).numpy() if probabilities else None)


def _check_numbers(config: EvaluateConfig, samples: ImageStream, reference: Reference) -> None:
    if samples.num < max(2, config.splits):
        raise ValueError(
            f"{config.samples} holds {samples.num} images, want at least 2 and one per split; draw more (the paper's "
            f"figures are of 50000) or lower --splits (now {config.splits})"
        )
    for path, images in ((config.samples, samples), (config.reference, reference.images)):
        if reference.images and images.num <= config.neighbors:
            raise ValueError(
                f"{path} holds {images.num} images, want more than the {config.neighbors} neighbours of precision and "
                "recall; give more images or lower --neighbors"
            )


def _warn_of_few(num: int, num_features: int) -> None:
    if num <= num_features:
        log.warning(
            "%d samples do not determine a covariance of %d features: their FID is far too high, compare it with "
            "nothing but FIDs of as many samples (published figures are of 50000)",
            num,
            num_features,
        )


def _protocol(config: EvaluateConfig, samples: ImageStream, reference: Reference, network: FeatureNetwork) -> str:
    images = reference.images
    real = f"{images.num} reference images" if images else "a reference without images"
    against = "the mean and covariance stored in the reference" if reference.statistics else real
    numbers = [min(n, _MOST_COMPARED) for n in (samples.num, images.num if images else 0)]
    pairwise = (
        f"Precision and recall: {numbers[0]} samples and {numbers[1]} reference images, {config.neighbors} neighbours."
        if images
        else "Precision and recall: not computed."
    )
    return (
        f"{samples.num} samples of {samples.size[1]}x{samples.size[0]} pixels, {network.num_features} features of the "
        f"{network.kind} network in float32. FID: against {against}. Inception Score: {config.splits} splits of the "
        f"samples in an order drawn from seed 0. {pairwise}"
    )
