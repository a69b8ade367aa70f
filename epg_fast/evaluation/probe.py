"""Linear probe: how much of an image's class can be read off an encoder's feature at each noise level."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn as nn

from epg_fast.config import EvaluateConfig
from epg_fast.data import ImageFolder, center_crop
from epg_fast.diffusion import NoiseSchedule, PixelNormalization, shift
from epg_fast.diffusion.denoiser import per_sample, precondition
from epg_fast.evaluation.extras import import_extra
from epg_fast.evaluation.images import read_image
from epg_fast.evaluation.small import check_folders

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
        "protocol": (
            f"Logistic regression on the standardised class-token feature of noisy {size}x{size} images at each "
            f"unshifted sigma; fitted on {len(train[1])} training images, accuracy on {len(test[1])} held-out ones."
        ),
    }


def load_rgb(folder: str | os.PathLike, image_size: int) -> LabeledImages:
    """Read a folder of class folders: (images uint8 [N, 3, S, S], labels int64 [N]), centre-cropped as in training.

    Raises ValueError for a missing or empty folder and for files that are no images.
    """
    files = ImageFolder(folder)
    crops = [np.asarray(center_crop(read_image(files, i), image_size)) for i in range(len(files))]
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    return images, np.array(files.labels, dtype=np.int64)


def encoder_features(encoder: nn.Module, schedule: NoiseSchedule | None = None) -> Features:
    """Return `features_of` for `linear_probe` from an encoder with `encode(x [B, 3, H, W], t [B]) -> [B, E]`.

    The encoder sees `c_in * x` and `250 ln sigma` at the shifted sigma (SPEC 2), in eval mode and without gradients, on
    the device of its parameters; its mode is restored after each call. `schedule`: default as in `NoiseSchedule`.
    """
    schedule = schedule or NoiseSchedule()

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
    Features are standardised by the training ones. Raises ValueError for sigmas <= 0, sizes that do not match and
    features that are not finite.
    """
    linear_model = import_extra("sklearn.linear_model")
    pipeline = import_extra("sklearn.pipeline")
    preprocessing = import_extra("sklearn.preprocessing")
    if not sigmas or min(sigmas) <= 0:
        raise ValueError(f"sigmas must be positive noise levels (the cleanest is 0.002): {list(sigmas)}")
    for name, (images, labels) in (("train", train), ("test", test)):
        if images.ndim != 4 or len(images) == 0 or np.shape(labels) != (len(images),):
            got = f"{list(images.shape)} and {list(np.shape(labels))}"
            raise ValueError(f"{name}: expected images [N, 3, H, W] and labels [N], got {got}")
    normalize = PixelNormalization(normalization).normalize
    accuracy = {}
    for sigma in sigmas:
        fitted_on, judged_on = (
            _features(features_of, images, sigma, normalize, (seed, number), batch_size)
            for number, (images, _) in enumerate((train, test))
        )
        probe = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=2000))
        accuracy[sigma] = float(probe.fit(fitted_on, train[1]).score(judged_on, test[1]))
    return accuracy


def _features(features_of, images, sigma, normalize, seeds, batch_size) -> np.ndarray:
    level = sigma * shift(images.shape[-1])
    batches = []
    for start in range(0, len(images), batch_size):
        clean = normalize(images[start : start + batch_size])
        noise = torch.stack([_noise((*seeds, start + i), clean.shape[1:]) for i in range(len(clean))])
        batches.append(features_of(clean + level * noise, sigma).float().cpu())
    features = torch.cat(batches).numpy()
    if not np.isfinite(features).all():
        raise ValueError(f"the encoder's features at sigma {sigma:g} are not finite")
    return features


def _noise(seeds: tuple[int, ...], shape: torch.Size) -> torch.Tensor:
    # SeedSequence mixes the numbers, so that neighbouring images do not share a stream.
    seed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
