import numpy as np
import pytest
import torch

from epg_fast.diffusion import PixelNormalization

# SPEC 1, written out per channel
FORMULAS = {
    "imagenet": lambda v: np.stack(
        [(v[:, 0] - 0.485) / 0.458, (v[:, 1] - 0.456) / 0.448, (v[:, 2] - 0.406) / 0.45], axis=1
    ),
    "simple": lambda v: 2 * v - 1,
}


def random_images(shape=(4, 3, 9, 7)):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.uint8, 1e-6), (torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)],
)
def test_pixels_follow_the_formula_floating_ones_from_0_to_1(name, dtype, tolerance):
    images = random_images()
    given = images if dtype == torch.uint8 else (images.double() / 255).to(dtype)
    x = PixelNormalization(name).normalize(given)
    assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    values = given.double().numpy() / (255 if dtype == torch.uint8 else 1)
    np.testing.assert_allclose(x.numpy(), FORMULAS[name](values), atol=tolerance)


@pytest.mark.parametrize("name", FORMULAS)
def test_every_pixel_value_survives_the_round_trip(name):
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    normalization = PixelNormalization(name)
    back = normalization.denormalize(normalization.normalize(images))
    assert torch.equal((back * 255).round().to(torch.uint8), images)


@pytest.mark.parametrize("name", FORMULAS)
def test_bounds_are_the_values_of_black_and_white_and_denormalize_clips_beyond_them(name):
    normalization = PixelNormalization(name)
    low, high = normalization.bounds()
    assert low.shape == high.shape == (1, 3, 1, 1)
    black, white = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    torch.testing.assert_close(normalization.normalize(black), low.expand(1, 3, 2, 2))
    torch.testing.assert_close(normalization.normalize(white), high.expand(1, 3, 2, 2))
    assert torch.all(normalization.denormalize(low - 0.5) == 0) and torch.all(
        normalization.denormalize(high + 0.5) == 1
    )


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'imagenett' .did you mean 'imagenet'.*wanted one of imagenet, simple"):
        PixelNormalization("imagenett")
    with pytest.raises(ValueError, match=r"\[3, 8, 8\].*\[B, 3, H, W\]"):
        PixelNormalization("simple").normalize(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="int64.*uint8"):
        PixelNormalization("simple").normalize(torch.zeros(1, 3, 8, 8, dtype=torch.int64))
