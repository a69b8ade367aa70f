import math

import numpy as np
import pytest
import torch
import torch.nn as nn

from epg_fast.diffusion import PixelNormalization
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


def pixels(noisy, sigma):
    return noisy.flatten(1)


class Recorder:
    """Features that keep what the probe passed in."""

    def __init__(self):
        self.calls = []

    def __call__(self, noisy, sigma):
        self.calls.append((noisy, sigma))
        return noisy.flatten(1)


def noise_seen(normalization="imagenet", **options):
    images, labels = labelled_images(num=9)
    recorder = Recorder()
    linear_probe(recorder, (images, labels), (images, labels), [0.4], normalization, **options)
    seen = torch.cat([noisy for noisy, _ in recorder.calls])
    clean = PixelNormalization(normalization).normalize(images)
    return seen[:9] - clean, seen[9:] - clean


def test_informative_features_of_any_scale_are_read_and_drown_in_noise():
    train, test = labelled_images(num=300, seed=0), labelled_images(num=300, seed=1)
    for scale in (1, 1e-6):
        accuracy = linear_probe(lambda x, s: channel_means(x, s) * scale, train, test, [0.01, 1000.0])  # noqa: B023
        assert list(accuracy) == [0.01, 1000.0]
        assert accuracy[0.01] == 1 and accuracy[1000.0] < 0.55
    shuffled = np.random.default_rng(0).permutation(train[1])
    assert linear_probe(channel_means, (train[0], shuffled), test, [0.01])[0.01] < 0.75


def test_noise_has_the_shifted_level_and_is_fresh_for_each_image_and_set():
    train, test = noise_seen()
    assert train.std().item() == pytest.approx(0.4 * 16 / 64, rel=0.03)
    assert abs(train.mean().item()) < 0.01
    stacked = torch.cat([train, test]).flatten(1)
    correlation = torch.corrcoef(stacked).fill_diagonal_(0).abs().max()
    assert correlation < 0.25


def test_noise_depends_on_the_seed_only():
    once, again, in_small_batches, other = noise_seen(), noise_seen(), noise_seen(batch_size=2), noise_seen(seed=1)
    assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])
    assert torch.equal(once[0], in_small_batches[0]) and torch.equal(once[1], in_small_batches[1])
    assert not torch.allclose(once[0], other[0])


def test_images_are_normalised_as_asked():
    images, labels = labelled_images(num=9)
    recorder = Recorder()
    linear_probe(recorder, (images, labels), (images, labels), [1e-8], normalization="simple")
    assert torch.allclose(recorder.calls[0][0], images.float() / 127.5 - 1, atol=1e-5)


def test_mistakes_are_named():
    data = labelled_images(num=9)
    for features, test, sigmas, message in (
        (pixels, data, [0.0], "sigmas must be positive"),
        (pixels, data, [], "sigmas must be positive"),
        (lambda x, s: x.flatten(1) / 0, data, [1.0], "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_probe(features, data, test, sigmas)


class FakeEncoder(nn.Module):
    image_size = 16

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = None

    def encode(self, x, t):
        self.seen = x, t, self.training, torch.is_grad_enabled()
        return x.mean(dim=(2, 3)) * self.weight


def test_encoder_sees_scaled_input_and_the_time_of_the_shifted_level():
    encoder = FakeEncoder().train()
    noisy = torch.randn(5, 3, 16, 16)
    features = encoder_features(encoder)(noisy, 2.0)
    x, t, training, grad = encoder.seen
    shifted = 2.0 * 16 / 64
    assert torch.allclose(x, noisy / math.sqrt(shifted**2 + 0.25))
    assert torch.allclose(t, torch.full((5,), 250 * math.log(shifted)))
    assert not training and not grad and encoder.training
    assert features.shape == (5, 3) and not features.requires_grad


def test_load_rgb_gives_square_uint8_images_and_class_indices(digits):
    images, labels = load_rgb(digits / "test", 16)
    assert images.shape == (450, 3, 16, 16) and images.dtype == torch.uint8 and images.is_contiguous()
    assert labels.dtype == np.int64 and np.bincount(labels).tolist() == sorted_counts(digits / "test")
    assert torch.equal(images[:, 0], images[:, 2])


def sorted_counts(folder):
    return [len(list(entry.iterdir())) for entry in sorted(folder.iterdir())]
