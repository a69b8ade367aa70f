"""Linear probe: how much of an image's class can be read off an encoder's feature at each noise level."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn as nn

from epg_fast.config import EvaluateConfig
from epg_fast.data import ImageFolder, ImageSource, center_crop
from epg_fast.diffusion import NoiseSchedule, PixelNormalization, shift
from epg_fast.diffusion.denoiser import per_sample, precondition
from epg_fast.environment import versions
from epg_fast.evaluation.images import read_image
from epg_fast.evaluation.small import check_folders
from epg_fast.wording import import_extra

Features = Callable[[torch.Tensor, float], torch.Tensor]
LabeledImages = tuple[torch.Tensor, np.ndarray]


def evaluate_probe(config: EvaluateConfig, encoder: nn.Module, normalization: str | None = None) -> dict:
    """Linear probe accuracy of an encoder's class-token feature at each of `config.sigmas`, as a dict that JSON holds.

    `encoder` has `image_size` and `encode(x [B, 3, H, W], t [B]) -> [B, E]`, like `RCMViT`; it runs in eval mode where
    its parameters are. `normalization`: the pixel scaling it was trained with; None takes it from the checkpoint
    (`from_pretrained`), else imagenet. Keys: `accuracy` ({sigma: share}), sizes, `protocol`. Raises ValueError for
    missing folders, for classes that do not line up and for sigmas <= 0.
    """
    check_folders(config)
    size = encoder.image_size
    train, test = load_rgb(config.train, size), load_rgb(config.test, size)
    metadata = getattr(encoder, "metadata", {})
    normalization = normalization or metadata.get("normalization") or "imagenet"
    features_of = encoder_features(encoder, NoiseSchedule(**metadata.get("noise", {})))
    accuracy = linear_probe(features_of, train, test, config.sigmas, normalization, config.seed)
    return {
        "kind": "probe",
        "probe": str(config.probe),
        "accuracy": {f"{sigma:g}": value for sigma, value in accuracy.items()},
        "num_train": len(train[1]),
        "num_test": len(test[1]),
        "image_size": size,
        "normalization": normalization,
        "seed": config.seed,
        "protocol": {
            "text": (
                f"Logistic regression on the standardised class-token feature of noisy {size}x{size} images at each "
                f"unshifted sigma; fitted on {len(train[1])} training images, accuracy on {len(test[1])} held-out ones."
            ),
            "versions": versions(next(encoder.parameters()).device),
        },
    }


def load_rgb(
    source: str | os.PathLike | ImageSource, image_size: int, chosen: Sequence[int] | None = None
) -> LabeledImages:
    """Read labelled images: (images uint8 [N, 3, S, S], labels int64 [N]), centre-cropped as in training.

    source: a folder of class folders, or images that are open. chosen: their places in it; None: all.
    Raises ValueError for a missing or empty folder and for files that are no images.
    """
    files = source if isinstance(source, ImageSource) else ImageFolder(source)
    chosen = range(len(files)) if chosen is None else chosen
    images = torch.empty(len(chosen), 3, image_size, image_size, dtype=torch.uint8)
    for image, i in zip(images, chosen, strict=True):
        image.copy_(torch.from_numpy(np.array(center_crop(read_image(files, i), image_size))).permute(2, 0, 1))
    return images, np.array([files.labels[i] for i in chosen], dtype=np.int64)


def evenly_chosen(labels: Sequence[int], num: int) -> np.ndarray:
    """Places of `num` images, or of all if there are fewer, spread evenly over the classes: rising, int64.

    Which images of a class is always the same: the first of a shuffled order, whose seed is fixed.
    """
    labels = np.asarray(labels)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    earlier = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])  # of the same class
    return np.sort(by_class[np.argsort(earlier, kind="stable")[:num]])


def encoder_features(encoder: nn.Module, schedule: NoiseSchedule) -> Features:
    """Return `features_of` for `linear_probe` from an encoder with `encode(x [B, 3, H, W], t [B]) -> [B, E]`.

    The encoder sees `c_in * x` and `250 ln sigma` at the shifted sigma (SPEC 2), in eval mode and without gradients, on
    the device of its parameters; its mode is restored after each call.
    """

    @torch.no_grad()
    def features_of(noisy: torch.Tensor, sigma: float) -> torch.Tensor:
        noisy = noisy.to(next(encoder.parameters()).device)
        training = encoder.training
        encoder.eval()
        try:
            level = per_sample(sigma * shift(noisy.shape[-1]), noisy)
            return encoder.encode(*precondition(noisy, level, schedule))
        finally:
            encoder.train(training)

    return features_of


def linear_probe(
    features_of: Features,
    train: LabeledImages,
    test: LabeledImages,
    sigmas: Sequence[float],
    normalization: str = "imagenet",
    seed: int = 0,
    batch_size: int = 256,
) -> dict[float, float]:
    """Accuracy on `test` of a logistic regression fitted to the features of `train`, for each noise level.

    `train`, `test`: images uint8 [N, 3, H, W] and labels int64 [N]. `sigmas`: unshifted; images get `sigma * H/64`
    times unit noise (SPEC 2) that depends on `seed`, the set and the position in it only, so that levels and encoders
    are compared on the same noise. `features_of(noisy [B, 3, H, W] float32 normalised, sigma unshifted) -> [B, E]`.
    Features are standardised by the training ones. Raises ValueError for sigmas <= 0 and
    features that are not finite.
    """
    require_sklearn()
    if not sigmas or min(sigmas) <= 0:
        raise ValueError(f"sigmas must be positive noise levels (the cleanest is 0.002): {list(sigmas)}")
    accuracy = {}
    for sigma in sigmas:
        fitted_on, judged_on = (
            noisy_features(features_of, images, sigma, normalization, (seed, number), range(len(images)), batch_size)
            for number, (images, _) in enumerate((train, test))
        )
        accuracy[sigma] = probe_accuracy((fitted_on, train[1]), (judged_on, test[1]), sigma)
    return accuracy


def require_sklearn() -> None:
    """Raise ImportError with the command that installs scikit-learn, unless it is there."""
    import_extra("sklearn.linear_model")


def noisy_features(
    features_of: Features,
    images: torch.Tensor,
    sigma: float,
    normalization: str,
    seeds: tuple[int, int],
    places: Sequence[int],
    batch_size: int = 256,
) -> torch.Tensor:
    """Features [N, E] of images uint8 [N, 3, H, W] at one noise level, float32 in host memory; see `linear_probe`.

    seeds: the probe's, and the set's number. places: of the images in their set, on which their noise depends.
    """
    level, normalize = sigma * shift(images.shape[-1]), PixelNormalization(normalization).normalize
    batches = []
    for start in range(0, len(images), batch_size):
        clean = normalize(images[start : start + batch_size])
        noise = torch.stack([_noise((*seeds, i), clean.shape[1:]) for i in places[start : start + batch_size]])
        batches.append(features_of(clean + level * noise, sigma).float().cpu())
    return torch.cat(batches)


def probe_accuracy(
    train: tuple[torch.Tensor, np.ndarray], test: tuple[torch.Tensor, np.ndarray], sigma: float
) -> float:
    """Accuracy on `test` of a logistic regression fitted to `train`: features [N, E] and labels [N] each.

    sigma: the noise level, for messages. Raises ValueError for features that are not finite.
    """
    linear_model, pipeline, preprocessing = (
        import_extra(f"sklearn.{name}") for name in ("linear_model", "pipeline", "preprocessing")
    )
    for features, _ in (train, test):
        if not features.isfinite().all():
            raise ValueError(f"the encoder's features at sigma {sigma:g} are not finite")
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=2000))
    return float(probe.fit(train[0].numpy(), train[1]).score(test[0].numpy(), test[1]))


def _noise(seeds: tuple[int, ...], shape: torch.Size) -> torch.Tensor:
    # SeedSequence mixes the numbers, so that neighbouring images do not share a stream.
    seed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
