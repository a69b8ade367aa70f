"""The centre crop and the augmented views: what is drawn for them, and what Pillow makes of what was drawn."""

import colorsys
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from epg_fast.config import AugmentConfig
from epg_fast.data import center_crop, training_views
from epg_fast.data.loading.views import AugmentedView, apply_view, draw_view
from tests.data.images import OFF, noise

# centre crop


def test_crop_of_a_large_image_halves_with_box_then_resizes_once_bicubic():
    image = noise(157, 130)
    # by hand: 157x130 -> 78x65 (65 < 2 * 33) -> short side 33: 78 * 33 / 65 = 39.6 -> 40 x 33 -> columns 3..35
    by_hand = image.resize((78, 65), Image.BOX).resize((40, 33), Image.BICUBIC)
    np.testing.assert_array_equal(np.asarray(center_crop(image, 33)), np.asarray(by_hand)[:, 3:36])
    image = noise(64, 80)
    twice = image.resize((32, 40), Image.BOX).resize((16, 20), Image.BOX)
    np.testing.assert_array_equal(np.asarray(center_crop(image, 16)), np.asarray(twice)[2:18])
    image = noise(8, 8)
    np.testing.assert_array_equal(np.asarray(center_crop(image, 32)), np.asarray(image.resize((32, 32), Image.BICUBIC)))
    assert center_crop(image, 8) is image
    for size in ((1, 1), (1, 40), (37, 5), (300, 33), (31, 64)):
        assert center_crop(noise(*size), 16).size == (16, 16)


# what is drawn


def draw(count, width, height, config, which=0):
    rng = np.random.default_rng(7)
    return [draw_view(width, height, rng, config, which) for _ in range(count)]


def reference_box(width, height):
    """SPEC 1 with Python's random module: left, top, width, height."""
    while True:
        area = width * height * random.uniform(0.08, 1)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if w <= width and h <= height:
            return random.uniform(0, width - w), random.uniform(0, height - h), w, h


@pytest.mark.parametrize("width, height", [(200, 200), (240, 120), (8, 8)])
def test_boxes_have_the_documented_distribution(width, height):
    boxes = np.array([view.box for view in draw(1500, width, height, AugmentConfig())])
    x, y, w, h = boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    random.seed(1)
    left, top, wide, high = np.array([reference_box(width, height) for _ in range(20_000)]).T
    pairs = (x, left), (y, top), (w, wide), (h, high), (w * h, wide * high), (w / h, wide / high)
    for found, wanted in pairs:
        assert stats.ks_2samp(found, wanted).pvalue > 1e-3
    assert len({tuple(box) for box in boxes}) > 1490  # tiny images have many crops too
    # one too narrow for any crop gets its largest central box
    assert draw(1, 400, 100, replace(OFF, crop_ratio=(0.5, 1.0)))[0].box == (150, 0, 250, 100)


@pytest.mark.parametrize("which", [0, 1])
def test_colours_blur_and_flips_have_the_documented_distributions(which):
    count, views = 3000, draw(3000, 20, 20, AugmentConfig(), which)

    def plausible(found, probability):
        return stats.binomtest(int(found), count, probability).pvalue > 1e-3

    jitters = [view.jitter for view in views if view.jitter]
    assert plausible(len(jitters), 0.8)
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        values = [dict(jitter)[name] for jitter in jitters]
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3
    orders = Counter(tuple(name for name, _ in jitter) for jitter in jitters)
    assert len(orders) == 24 and stats.chisquare(list(orders.values())).pvalue > 1e-3
    assert plausible(sum(view.grayscale for view in views), 0.2)
    assert plausible(sum(view.flip for view in views), 0.5)
    sigmas = [view.blur for view in views if view.blur is not None]
    assert stats.kstest(sigmas, "uniform", (0.1, 1.9)).pvalue > 1e-3
    # blur is sure in the first view and rare in the second, which alone is solarised
    assert len(sigmas) == count if which == 0 else plausible(len(sigmas), 0.1)
    solarised = sum(view.solarize for view in views)
    assert solarised == 0 if which == 0 else plausible(solarised, 0.2)


# what is made of it


def apply(image, size=None, **changes):
    nothing = AugmentedView((0, 0, *image.size), (), False, None, False, False)
    return np.asarray(apply_view(image, size or image.width, nothing._replace(**changes))).astype(float)


COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
PIXELS = Image.fromarray(COLOURS.astype(np.uint8))
LUMA = COLOURS @ [0.299, 0.587, 0.114]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, COLOURS),
        ({"jitter": (("brightness", 1.3),)}, 1.3 * COLOURS),
        ({"jitter": (("contrast", 0.7),)}, LUMA.mean() + 0.7 * (COLOURS - LUMA.mean())),
        ({"jitter": (("saturation", 0.8),)}, LUMA[..., None] + 0.8 * (COLOURS - LUMA[..., None])),
        ({"jitter": (("brightness", 2.0), ("brightness", 0.5))}, 0.5 * (2 * COLOURS).clip(0, 255)),
        ({"grayscale": True}, np.repeat(LUMA[..., None], 3, 2)),
        ({"solarize": True}, np.where(COLOURS < 128, COLOURS, 255 - COLOURS)),
        ({"flip": True}, COLOURS[:, ::-1]),
        ({"grayscale": True, "flip": True}, np.repeat(LUMA[:, ::-1, None], 3, 2)),
        ({"box": (2, 2, 6, 6), "size": 4}, COLOURS[2:6, 2:6]),
    ],
)
def test_each_operation_follows_its_formula(changes, expected):
    # Pillow rounds the luma, its mean and the result
    assert np.abs(apply(PIXELS, **changes) - expected.clip(0, 255)).max() <= 1.5


def test_hue_turns_by_its_share_of_the_circle_in_both_directions():
    for turns in (-0.1, -0.05, 0.05, 0.1):
        turned = apply(Image.new("RGB", (4, 4), (200, 40, 40)), jitter=(("hue", turns),))
        hue, *others = colorsys.rgb_to_hsv(*turned[0, 0] / 255)
        assert abs((hue - turns + 0.5) % 1 - 0.5) < 0.01
        np.testing.assert_allclose(others, (0.8, 200 / 255), atol=0.02)
    np.testing.assert_array_equal(apply(PIXELS, jitter=(("hue", 0.001),)), COLOURS)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0])
def test_a_blurred_edge_rises_like_the_gaussians_integral(sigma):
    edge = np.zeros((41, 41, 3), np.uint8)
    edge[:, 20:] = 255
    slope = np.diff(apply(Image.fromarray(edge), blur=sigma)[20, :, 0])
    position = np.arange(len(slope))
    centre = (position * slope).sum() / slope.sum()
    assert abs(np.sqrt(((position - centre) ** 2 * slope).sum() / slope.sum()) - sigma) < 0.1


# training views


def test_the_first_view_is_the_centre_crop_maybe_flipped_and_the_same_with_two_more():
    image, rng = noise(50, 40), np.random.default_rng(0)
    crop = np.asarray(center_crop(image, 32))
    for probability, expected in ((0.0, crop), (1.0, crop[:, ::-1])):
        np.testing.assert_array_equal(training_views(image, 32, rng, probability)[0], expected)
    flips = 0
    for seed in range(500):
        (alone,) = training_views(image, 32, np.random.default_rng(seed), 0.3)
        flips += (alone != crop).any()
        if seed < 8:
            x, view1, view2 = training_views(image, 32, np.random.default_rng(seed), 0.3, AugmentConfig())
            np.testing.assert_array_equal(alone, x)
            assert all(view.shape == (32, 32, 3) and view.dtype == np.uint8 for view in (x, view1, view2))
            assert (view1 != view2).any()
    assert stats.binomtest(int(flips), 500, 0.3).pvalue > 1e-3


def test_meaningless_settings_are_refused():
    for name, value in (
        ("crop_area", (0.5, 1.2)),
        ("crop_area", (0.0, 1.0)),
        ("crop_ratio", (2.0, 1.0)),
        ("blur_sigma", (-1.0, 1.0)),
        ("blur_probability", (1.0, 1.5)),
        ("jitter_probability", -0.1),
        ("hue", 0.6),
    ):
        with pytest.raises(ValueError, match=f"{name} is "):
            AugmentConfig(**{name: value})
