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
from epg_fast.data.loading import views
from epg_fast.data.loading.views import apply_view, draw_view
from tests.data.images import OFF, noise


def draw(image, config, count, which=0, size=None):
    rng = np.random.default_rng(7)
    drawn = [draw_view(image.width, image.height, rng, config, which) for _ in range(count)]
    return [np.asarray(apply_view(image, size or image.width, view)).astype(float) for view in drawn]


def assert_plausible(count, trials, probability):
    assert stats.binomtest(count, trials, probability).pvalue > 1e-3


# centre crop


def test_crop_of_a_large_image_halves_with_box_then_resizes_once_bicubic():
    image = noise(157, 130)
    # by hand: 157x130 -> 78x65 (65 < 2 * 33) -> short side 33: 78 * 33 / 65 = 39.6 -> 40 x 33 -> columns 3..35
    by_hand = image.resize((78, 65), Image.BOX).resize((40, 33), Image.BICUBIC)
    by_hand = np.asarray(by_hand)[:, 3:36]
    np.testing.assert_array_equal(np.asarray(center_crop(image, 33)), by_hand)


def test_crop_halves_twice_when_four_times_as_large():
    image = noise(64, 80)
    by_hand = image.resize((32, 40), Image.BOX).resize((16, 20), Image.BOX)
    np.testing.assert_array_equal(np.asarray(center_crop(image, 16)), np.asarray(by_hand)[2:18])


def test_crop_enlarges_small_images_bicubically():
    image = noise(8, 8)
    np.testing.assert_array_equal(np.asarray(center_crop(image, 32)), np.asarray(image.resize((32, 32), Image.BICUBIC)))


def test_crop_leaves_an_image_of_the_right_size_alone():
    image = noise(24, 24)
    assert center_crop(image, 24) is image


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 5), (300, 33), (31, 64)])
def test_crop_of_odd_shapes_has_the_size_asked_for(size):
    assert center_crop(noise(*size), 16).size == (16, 16)


# augmented views


@pytest.mark.parametrize("shape", [(200, 200), (240, 120)])
def test_crop_areas_ratios_and_positions_have_the_documented_distribution(shape):
    width, height = shape
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.arange(width)
    ramp[..., 1] = np.arange(height)[:, None]
    found = np.array([box_of(view) for view in draw(Image.fromarray(ramp), without(OFF, "crop"), 1200, size=32)])

    rng = np.random.default_rng(1)
    area = rng.uniform(0.08, 1, 60_000) * width * height
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), len(area)))
    w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
    fits = (w <= width) & (h <= height)
    w, h = w[fits], h[fits]
    x, y = rng.random(len(w)) * (width - w), rng.random(len(w)) * (height - h)
    for column, reference in zip(found.T, (x, y, w, h), strict=True):
        assert stats.ks_2samp(column, reference).pvalue > 1e-3
    assert stats.ks_2samp(found[:, 2] * found[:, 3], w * h).pvalue > 1e-3
    assert stats.ks_2samp(np.log(found[:, 2] / found[:, 3]), np.log(w / h)).pvalue > 1e-3


def without(config, *names):
    """`config` with the named parts back at the defaults of SPEC 1."""
    default = AugmentConfig()
    fields = [field for field in vars(default) if any(field.startswith(name) for name in names)]
    return replace(config, **{field: getattr(default, field) for field in fields})


def box_of(view):
    """Left, top, width and height of the crop, from a view of a picture that shows its own coordinates."""
    size = view.shape[0]
    inner = slice(4, size - 4)  # the picture's border repeats beyond its edge
    pixels = np.arange(size)[inner] + 0.5
    columns, rows = view[inner, inner, 0].mean(0), view[inner, inner, 1].mean(1)
    (slope_x, start_x), (slope_y, start_y) = np.polyfit(pixels, columns, 1), np.polyfit(pixels, rows, 1)
    return start_x + 0.5, start_y + 0.5, slope_x * size, slope_y * size


def test_an_image_too_narrow_for_any_crop_gets_its_largest_central_box():
    pixels = np.zeros((100, 400, 3), np.uint8)
    pixels[:, 150:250] = 255
    config = replace(OFF, crop_area=(1.0, 1.0), crop_ratio=(0.5, 1.0))
    (view,) = draw(Image.fromarray(pixels), config, 1, size=20)
    # resampling looks a pixel beyond the box at its two ends
    assert view[:, 1:-1].min() == 255 and 200 < view[:, [0, -1]].min() < 255


def test_tiny_images_have_many_crops():
    crops = {view.tobytes() for view in draw(noise(8, 8), without(OFF, "crop"), 50, size=32)}
    assert len(crops) == 50


@pytest.mark.parametrize(
    "name, low, high", [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2)]
)
def test_colour_factors_are_uniform(name, low, high):
    pixels = np.full((8, 8, 3), 128, np.uint8)
    if name == "contrast":
        pixels[:, :4], pixels[:, 4:] = 68, 188
    if name == "saturation":
        pixels[..., 0] = 228
    measure = {
        "brightness": lambda v: v.mean() / 128,
        "contrast": lambda v: (v[:, 4:].mean() - v[:, :4].mean()) / 120,
        "saturation": lambda v: (v[..., 0] - v[..., 1]).mean() / 100,
    }[name]
    config = replace(without(OFF, name), jitter_probability=1.0)
    factors = [measure(view) for view in draw(Image.fromarray(pixels), config, 600)]
    assert min(factors) > low - 0.02 and max(factors) < high + 0.02
    assert stats.kstest(factors, "uniform", (low, high - low)).pvalue > 1e-3


def test_hue_turns_by_up_to_a_tenth_in_both_directions():
    config = replace(without(OFF, "hue"), jitter_probability=1.0)
    image = Image.new("RGB", (4, 4), (40, 200, 40))
    hues = np.array([colorsys.rgb_to_hsv(*view[0, 0] / 255) for view in draw(image, config, 400)])
    assert np.abs(hues[:, 1] - 0.8).max() < 0.02 and np.abs(hues[:, 2] - 200 / 255).max() < 0.02
    assert stats.kstest(hues[:, 0] - 1 / 3, "uniform", (-0.1, 0.2)).pvalue > 1e-3
    wrapped = [
        colorsys.rgb_to_hsv(*v[0, 0] / 255)[0] for v in draw(Image.new("RGB", (4, 4), (200, 40, 40)), config, 50)
    ]
    assert any(0.88 < hue < 1 for hue in wrapped) and any(0 < hue < 0.12 for hue in wrapped)


def test_colour_jitter_comes_in_random_order_with_its_probability(monkeypatch):
    order = []
    for name, original in list(views._ENHANCERS.items()):
        monkeypatch.setitem(
            views._ENHANCERS, name, lambda image, name=name, original=original: order.append(name) or original(image)
        )
    original_hue = views._shift_hue
    monkeypatch.setattr(views, "_shift_hue", lambda image, turns: order.append("hue") or original_hue(image, turns))
    draw(noise(4, 4), without(OFF, "jitter", "brightness", "contrast", "saturation", "hue"), 1500)
    permutations = Counter(tuple(order[i : i + 4]) for i in range(0, len(order), 4))
    assert all(len(set(permutation)) == 4 for permutation in permutations) and len(permutations) == 24
    assert stats.chisquare(list(permutations.values())).pvalue > 1e-3
    assert_plausible(len(order) // 4, 1500, 0.8)


def test_grayscale_has_equal_channels_of_the_luma_with_its_probability():
    image = Image.new("RGB", (4, 4), (200, 30, 60))
    views_ = draw(image, without(OFF, "grayscale"), 800)
    gray = [view for view in views_ if np.ptp(view[0, 0]) == 0]
    assert_plausible(len(gray), 800, 0.2)
    assert abs(gray[0][0, 0, 0] - (0.299 * 200 + 0.587 * 30 + 0.114 * 60)) <= 1
    assert all((view == [200, 30, 60]).all() for view in views_ if np.ptp(view[0, 0]))


def test_blur_is_sure_in_view_1_and_rare_in_view_2():
    image = noise(16, 16)
    changed = [
        sum((view != np.asarray(image)).any() for view in draw(image, without(OFF, "blur_probability"), 600, which))
        for which in (0, 1)
    ]
    # sigmas just above 0.1 leave the pixels as they are
    assert changed[0] > 500
    assert_plausible(changed[1], 600, 0.1)


def test_blur_sigma_is_uniform_from_a_tenth_to_two_pixels():
    # a blurred edge rises like the Gaussian's integral; below half a pixel eight bits no longer resolve it
    edge = np.zeros((41, 41, 3), np.uint8)
    edge[:, 20:] = 255
    config = replace(without(OFF, "blur"), blur_probability=(1.0, 1.0))
    sigmas = []
    for view in draw(Image.fromarray(edge), config, 400):
        slope = np.diff(view[20, :, 0])
        position = np.arange(len(slope))
        centre = (position * slope).sum() / slope.sum()
        sigmas.append(np.sqrt(((position - centre) ** 2 * slope).sum() / slope.sum()))
    sigmas = np.array(sigmas)
    assert sigmas.max() < 2.1
    above = sigmas[sigmas > 0.5]
    assert stats.kstest(above, "uniform", (0.5, 1.5)).pvalue > 1e-3
    assert_plausible(len(above), 400, 1.5 / 1.9)


def test_solarise_inverts_from_128_on_and_only_in_view_2():
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))
    values = np.arange(256).reshape(16, 16)
    solarised = np.where(values < 128, values, 255 - values)
    first, second = (draw(ramp, without(OFF, "solarize"), 600, which) for which in (0, 1))
    assert all((view[..., 0] == values).all() for view in first)
    hits = [view for view in second if (view[..., 0] != values).any()]
    assert_plausible(len(hits), 600, 0.2)
    assert all((view == solarised[..., None]).all() for view in hits)


def test_flip_mirrors_left_and_right_with_its_probability():
    image = noise(6, 6)
    flipped = [(view == np.asarray(image)[:, ::-1]).all() for view in draw(image, without(OFF, "flip"), 600)]
    assert_plausible(sum(flipped), 600, 0.5)


# training views


def test_three_views_share_the_first_with_the_single_view():
    image = noise(50, 40)
    for seed in range(8):
        (alone,) = training_views(image, 32, np.random.default_rng(seed), 0.5)
        x, view1, view2 = training_views(image, 32, np.random.default_rng(seed), 0.5, AugmentConfig())
        np.testing.assert_array_equal(alone, x)
        assert all(view.shape == (32, 32, 3) and view.dtype == np.uint8 for view in (x, view1, view2))
        assert (view1 != view2).any()


def test_first_view_is_the_centre_crop_flipped_with_the_given_probability():
    image = noise(50, 40)
    crop = np.asarray(center_crop(image, 32))
    rng = np.random.default_rng(0)
    for probability, expected in ((0.0, crop), (1.0, crop[:, ::-1])):
        np.testing.assert_array_equal(training_views(image, 32, rng, probability)[0], expected)
    flips = sum((training_views(image, 32, rng, 0.3)[0] != crop).any() for _ in range(500))
    assert_plausible(flips, 500, 0.3)


def test_views_depend_on_the_given_generator_alone():
    image = noise(30, 20)

    def run(seed):
        np.random.seed(seed)
        random.seed(seed)
        return training_views(image, 16, np.random.default_rng(5), 0.5, AugmentConfig())

    state = np.random.get_state()
    try:
        for a, b in zip(run(0), run(1), strict=True):
            np.testing.assert_array_equal(a, b)
    finally:
        np.random.set_state(state)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"crop_area": (0.5, 1.2)}, "augment.crop_area"),
        ({"crop_area": (0.0, 1.0)}, "augment.crop_area"),
        ({"crop_ratio": (2.0, 1.0)}, "augment.crop_ratio"),
        ({"blur_sigma": (-1.0, 1.0)}, "augment.blur_sigma"),
        ({"blur_probability": (1.0, 1.5)}, "augment.blur_probability"),
        ({"jitter_probability": -0.1}, "augment.jitter_probability"),
        ({"hue": 0.6}, "augment.hue"),
    ],
)
def test_meaningless_settings_are_refused(change, message):
    views.check_augment(AugmentConfig())
    with pytest.raises(ValueError, match=message):
        views.check_augment(replace(AugmentConfig(), **change))
