import math

import pytest
import torch

from epg_fast.ops.philox import _philox4x32, philox_normal_of


def normals(seed, first, batch, shape):
    return philox_normal_of(first + torch.arange(batch), seed, shape)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    got = _philox4x32([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
    assert tuple(int(word) for word in got) == words


def test_the_first_normals_are_those_of_the_published_words():
    w0, w1, w2, w3 = 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8
    wanted = []
    for first, second in ((w0, w1), (w2, w3)):
        radius, angle = math.sqrt(-2 * math.log((first + 0.5) / 2**32)), 2 * math.pi * second / 2**32
        wanted += [radius * math.cos(angle), radius * math.sin(angle)]
    torch.testing.assert_close(normals(0, 0, 1, (2, 2)).flatten(), torch.tensor(wanted), rtol=1e-5, atol=1e-5)


def test_drawn_noise_is_standard_normal_and_independent_between_samples_and_seeds():
    noise = normals(1, 0, 4, (3, 128, 128)).flatten(1).double()
    count = noise.shape[1]
    torch.testing.assert_close(torch.cov(noise), torch.eye(4).double(), rtol=0, atol=5 / count**0.5)
    quantiles = torch.special.ndtr(noise.sort(dim=1)[0])
    wanted = (torch.arange(count) + 0.5) / count
    assert (quantiles - wanted).abs().max() < 2 / count**0.5  # Kolmogorov-Smirnov: 1.63 / sqrt(n) at 1%
    other = normals(2, 0, 1, (3, 128, 128)).flatten().double()
    assert abs((noise[0] * other).mean()) < 5 / count**0.5


def test_the_noise_of_a_sample_depends_on_neither_the_batch_nor_the_rank():
    shape = (3, 5, 7)
    together = normals(9, 6, 4, shape)
    apart = torch.cat([normals(9, 6, 1, shape), normals(torch.tensor(9), torch.tensor(7), 3, shape)])
    assert torch.equal(together, apart)
    assert not torch.equal(normals(9, 0, 1, shape), normals(9, 2**32, 1, shape))
    assert not torch.equal(normals(9, 0, 1, shape), normals(9 + 2**32, 0, 1, shape))
    assert not torch.equal(normals(9, 0, 1, shape), philox_normal_of(torch.arange(1), 9, shape, draw=1))
