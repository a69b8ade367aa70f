"""The linear probe: what it reads, the noise that it adds, what the encoder sees."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

from epg_fast.config import EvaluateConfig
from epg_fast.diffusion import NoiseSchedule, PixelNormalization
from epg_fast.evaluation import evaluate_probe
from epg_fast.evaluation.probe import encoder_features, linear_probe, load_rgb

pytest.importorskip("sklearn")


def labelled_images(num=120, size=16, seed=0):
    """Uint8 images whose class (of 3) is the brightest channel, on a noisy background."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 3
    images = rng.integers(90, 130, (num, 3, size, size))
    images[np.arange(num), labels] += 60
    return torch.from_numpy(images.astype(np.uint8)), labels


def channel_means(noisy, sigma):
    return noisy.mean(dim=(2, 3))


def noise_seen(normalization="imagenet", sigma=0.4, **options):
    """Of the images that are fitted on, and of those that are judged."""
    data, seen = labelled_images(num=9), []
    linear_probe(lambda x, s: seen.append(x) or x.flatten(1), data, data, [sigma], normalization, **options)
    return (torch.cat(seen).unflatten(0, (2, 9)) - PixelNormalization(normalization).normalize(data[0])).unbind()


def test_informative_features_of_any_scale_are_read_and_drown_in_noise():
    train, test = labelled_images(num=300, seed=0), labelled_images(num=300, seed=1)
    for scale in (1, 1e-6):
        accuracy = linear_probe(lambda x, s: channel_means(x, s) * scale, train, test, [0.01, 1000.0])  # noqa: B023
        assert list(accuracy) == [0.01, 1000.0]
        assert accuracy[0.01] == 1 and accuracy[1000.0] < 0.55
    shuffled = np.random.default_rng(0).permutation(train[1])
    assert linear_probe(channel_means, (train[0], shuffled), test, [0.01])[0.01] < 0.75


def test_noise_has_the_shifted_level_is_fresh_for_each_image_and_set_and_depends_on_the_seed_only():
    train, test = once = noise_seen()
    assert train.std().item() == pytest.approx(0.4 * 16 / 64, rel=0.03)
    assert abs(train.mean().item()) < 0.01
    correlation = torch.corrcoef(torch.cat([train, test]).flatten(1)).fill_diagonal_(0).abs().max()
    assert correlation < 0.25
    for again in (noise_seen(), noise_seen(batch_size=2)):
        assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])
    assert not torch.allclose(once[0], noise_seen(seed=1)[0])
    assert noise_seen("simple", 1e-8)[0].abs().max() < 1e-5  # images are normalised as asked


def test_mistakes_are_named():
    data = labelled_images(num=9)
    for features, sigmas, message in (
        (channel_means, [0.0], "sigmas must be positive"),
        (channel_means, [], "sigmas must be positive"),
        (lambda x, s: x.flatten(1) / 0, [1.0], "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_probe(features, data, data, sigmas)


class PixelEncoder(nn.Module):
    """The input itself as the feature: a probe of it is a linear classifier of noisy pixels."""

    image_size = 16

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def encode(self, x, t):
        self.seen = x, t, self.training, torch.is_grad_enabled()
        return nn.functional.avg_pool2d(x[:, :1], 2).flatten(1) * self.scale


def test_encoder_sees_scaled_input_and_the_time_of_the_shifted_level():
    encoder, noisy = PixelEncoder().train(), torch.randn(5, 3, 16, 16)
    features = encoder_features(encoder, NoiseSchedule())(noisy, 2.0)
    x, t, training, grad = encoder.seen
    shifted = 2.0 * 16 / 64
    assert torch.allclose(x, noisy / math.sqrt(shifted**2 + 0.25))
    assert torch.allclose(t, torch.full((5,), 250 * math.log(shifted)))
    assert not training and not grad and encoder.training
    assert features.shape == (5, 64) and not features.requires_grad


def test_probe_reads_digits_from_pixels_until_noise_covers_them(digits):
    config = EvaluateConfig(train=str(digits / "train"), test=str(digits / "test"), probe="run", sigmas=[0.002, 100.0])
    encoder = PixelEncoder()
    result = evaluate_probe(config, encoder, "simple")
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert list(result["accuracy"]) == ["0.002", "100"]
    assert result["accuracy"]["0.002"] > 0.93 and result["accuracy"]["100"] < 0.3
    assert (result["num_train"], result["num_test"], result["image_size"]) == (1347, 450, 16)
    assert "1347 training images" in result["protocol"]["text"]
    # the pixel scaling, and the noise, are those of the checkpoint
    config.sigmas = [0.5]
    assert evaluate_probe(config, encoder)["normalization"] == "imagenet"
    encoder.metadata = {"normalization": "simple", "noise": {"sigma_data": 0.7}}
    assert evaluate_probe(config, encoder) == evaluate_probe(config, encoder, "simple")
    assert evaluate_probe(config, encoder, "imagenet")["normalization"] == "imagenet"


def test_load_rgb_gives_square_uint8_images_and_class_indices(digits):
    images, labels = load_rgb(digits / "test", 16)
    assert images.shape == (450, 3, 16, 16) and images.dtype == torch.uint8 and images.is_contiguous()
    counts = [len(list(entry.iterdir())) for entry in sorted((digits / "test").iterdir())]
    assert labels.dtype == np.int64 and np.bincount(labels).tolist() == counts
    assert torch.equal(images[:, 0], images[:, 2])
