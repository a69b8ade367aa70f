import itertools
import math
from importlib import import_module
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from scipy.ndimage import gaussian_filter

from epg_fast.data.loading.views import AugmentedView, apply_view
from epg_fast.ops.augment_view import SPEC, JitterOperation, augment_view
from tests.ops.kernel_checks import DEVICE, needs_extension

BACKENDS = pytest.mark.parametrize(
    "backend", [pytest.param("plain", marks=pytest.mark.slow), pytest.param("extension", marks=needs_extension)]
)
SIZES = sorted({shape[1:3] for shape in SPEC.odd_shapes})
JITTER = {operation.name.lower(): operation for operation in JitterOperation if operation}
PLAIN = AugmentedView((0, 0, 1, 1), (), False, None, False, False)


def augment(images, views, backend):
    """The views [B, H, W, 3] of the images by Pillow's parameters, and a check that the images stay as they were."""
    x = torch.from_numpy(np.stack(images))
    x = x.to(DEVICE) if backend == "plain" else x
    before = x.clone()
    out = augment_view(x, **parameters_of(views), backend=backend)
    assert torch.equal(x, before) and out.is_contiguous() and out.device == x.device
    return out.permute(0, 2, 3, 1).cpu().numpy()


def parameters_of(views):
    jitters = [[*view.jitter, *[("none", 0.0)] * (4 - len(view.jitter))] for view in views]
    codes = [[JITTER.get(name, JitterOperation.NONE) for name, _ in jitter] for jitter in jitters]
    return {
        "operations": torch.tensor(codes, dtype=torch.int8).view(-1, 4),
        "values": torch.tensor([[value for _, value in jitter] for jitter in jitters], dtype=torch.float64).view(-1, 4),
        "grayscale": torch.tensor([view.grayscale for view in views], dtype=torch.bool),
        "sigma": torch.tensor([view.blur or 0.0 for view in views], dtype=torch.float64),
        "solarize": torch.tensor([view.solarize for view in views], dtype=torch.bool),
        "flip": torch.tensor([view.flip for view in views], dtype=torch.bool),
    }


def pillow(image, view):
    """All of the view but its crop, of any shape."""
    with mock.patch.object(Image.Image, "resize", lambda image, *args, **kwargs: image):
        return np.asarray(apply_view(Image.fromarray(image), image.shape[0], view))


def make_image(rng, height, width):
    """Noise, noise of few values (grays and ties between the channels), or something smooth."""
    kind = rng.integers(3)
    if kind == 0:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == 1:
        return rng.choice([0, 1, 127, 128, 255], (height, width, 3)).astype(np.uint8)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 127 * np.sin(rng.random() * 6 + x * rng.random() / 3 + y * rng.random() / 3) for _ in range(3)]
    return np.clip(np.stack(waves, -1) + rng.normal(0, 2, (height, width, 3)), 0, 255).astype(np.uint8)


def make_view(rng, blur=None):
    """Factors of 0, 1, between and beyond; any order and number of operations, some twice."""
    jitter = []
    for name in rng.choice(list(JITTER), rng.integers(5), replace=bool(rng.integers(2))):
        factor = rng.choice([0.0, 1.0, rng.random(), 1 + rng.random(), 5 * rng.random()])
        jitter.append((str(name), float(rng.uniform(-1.5, 1.5) if name == "hue" else factor)))
    gray, solarize, flip = rng.random(3) < (0.2, 0.5, 0.5)
    return AugmentedView((0, 0, 1, 1), tuple(jitter), bool(gray), blur, bool(solarize), bool(flip))


@BACKENDS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_views_without_a_blur_are_pillows_bit_for_bit(size, backend):
    rng = np.random.default_rng(sum(size))
    images, views = [make_image(rng, *size) for _ in range(100)], [make_view(rng) for _ in range(100)]
    views = [view if view.jitter or i % 5 else PLAIN for i, view in enumerate(views)]
    wanted = [pillow(*pair) for pair in zip(images, views, strict=True)]
    for actual, pillows, view in zip(augment(images, views, backend), wanted, views, strict=True):
        np.testing.assert_array_equal(actual, pillows, err_msg=str(view))


@BACKENDS
def test_the_operations_are_applied_in_the_order_they_have(backend):
    rng = np.random.default_rng(1)
    operations = [("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.4), ("hue", 0.08)]
    views = [PLAIN._replace(jitter=order) for order in itertools.permutations(operations)]
    images = [rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)] * len(views)
    actual = augment(images, views, backend)
    np.testing.assert_array_equal(actual, [pillow(*pair) for pair in zip(images, views, strict=True)])
    assert len({result.tobytes() for result in actual}) == 24


@BACKENDS
def test_contrast_of_an_image_of_millions_of_pixels(backend):
    image = np.full((1500, 1450, 3), 255, np.uint8)
    image[1000:] = np.random.default_rng(8).integers(0, 20, (500, 1450, 3))
    view = PLAIN._replace(jitter=(("contrast", 0.3),))
    np.testing.assert_array_equal(augment([image], [view], backend)[0], pillow(image, view))


@BACKENDS
@pytest.mark.parametrize("shift", [1, 21, 127, 128, 254])
def test_hue_is_a_shift_in_hsv_for_any_colour(shift, backend):
    """A twentieth of all colours for each shift, the corners and edges of the cube among them."""
    codes = np.concatenate([np.arange(shift, 1 << 24, 20), [0, 0xFF, 0xFF00, 0xFF0000, 0xFFFF, 0xFFFF00, 0xFFFFFF]])
    image = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], -1).astype(np.uint8)[None]
    hsv = Image.fromarray(image).convert("HSV")
    wanted = ImageChops.add_modulo(hsv, Image.new("HSV", hsv.size, (shift, 0, 0))).convert("RGB")
    view = PLAIN._replace(jitter=(("hue", (shift + 0.5) / 255),))
    np.testing.assert_array_equal(augment([image], [view], backend)[0], np.asarray(wanted))


@BACKENDS
@pytest.mark.parametrize("turns", [0.0, 0.003, -0.003, 1.0, -1.0, 256 / 255, 0.5, -0.5, 1e6, -1e6])
def test_turns_of_the_hue_are_cut_to_a_shift_as_pillows(turns, backend):
    image = np.random.default_rng(2).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    view = PLAIN._replace(jitter=(("hue", turns),))
    np.testing.assert_array_equal(augment([image], [view], backend)[0], pillow(image, view))


def gaussian(image, sigma):
    options = {"mode": "nearest", "radius": math.ceil(4 * sigma), "axes": (0, 1)}
    return gaussian_filter(image.astype(np.float64), sigma, **options)


@BACKENDS
@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.5, 1.0, 2.0, 7.3, 50.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_blur_is_the_gaussian_rounded(size, sigma, backend):
    rng = np.random.default_rng(3)
    images = [make_image(rng, *size) for _ in range(3)]
    for actual, image in zip(augment(images, [PLAIN._replace(blur=sigma)] * 3, backend), images, strict=True):
        np.testing.assert_allclose(actual, gaussian(image, sigma), rtol=0, atol=0.501)


@BACKENDS
def test_blur_lies_between_the_grayscale_and_the_solarisation(backend):
    rng = np.random.default_rng(5)
    image, sigma = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8), 0.8
    view = PLAIN._replace(grayscale=True, blur=sigma, solarize=True, flip=True)
    gray = pillow(image, view._replace(blur=None, solarize=False, flip=False))
    blurred = augment([gray], [PLAIN._replace(blur=sigma)], backend)[0]
    wanted = pillow(blurred, PLAIN._replace(solarize=True, flip=True))
    np.testing.assert_array_equal(augment([image], [view], backend)[0], wanted)


@needs_extension
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_extension_is_the_reference_bit_for_bit_in_any_batch(size):
    rng = np.random.default_rng(6)
    images = [make_image(rng, *size) for _ in range(40)]
    views = [make_view(rng, rng.choice([None, 0.1, 1.0, 2 * rng.random() + 0.01, 9.0])) for _ in range(40)]
    wanted = augment(images, views, "plain")
    np.testing.assert_array_equal(augment(images, views, "extension"), wanted)
    for image, view, result in zip(images, views, wanted, strict=True):
        np.testing.assert_array_equal(augment([image], [view], "extension")[0], result)


def arguments(batch=2, **change):
    return {"x": torch.zeros(batch, 3, 5, 3, dtype=torch.uint8)} | parameters_of([PLAIN] * batch) | change


@needs_extension
def test_auto_takes_the_extension_on_a_cpu(monkeypatch):
    monkeypatch.setattr(import_module("epg_fast.ops.augment_view"), "augment_view_ref", None)
    augment_view(**arguments())


def filled(shape, value, dtype):
    return torch.full(shape, value, dtype=dtype)


CODES = torch.tensor([[0, 1, 2, 3], [4, 0, 0, 5]], dtype=torch.int8)
BRIGHTNESS, HUE = (filled((2, 4), code, torch.int8) for code in (1, 4))
NAN = filled((2, 4), math.nan, torch.float64)
WRONG_VALUES = [
    ({"operations": CODES}, r"got operations\[1, 3\] = 5, wanted codes 0 to 4", r"operations\[1\] must be 0 to 4"),
    ({"operations": -CODES}, r"got operations\[0, 1\] = -1, wanted codes", r"operations\[0\] must be 0 to 4"),
    ({"operations": HUE, "values": NAN}, r"got values\[0, 0\] = nan, wanted finite turns of the hue", r"values\[0\]"),
]
for value in (-0.1, math.nan, math.inf, 1e39):
    change = {"operations": BRIGHTNESS, "values": filled((2, 4), value, torch.float64)}
    WRONG_VALUES.append((change, r"\[0, 0\] = .*wanted a factor", "values"))
for value in (-1.0, math.nan, math.inf, 1025.0):
    change = {"sigma": filled((2,), value, torch.float64)}
    WRONG_VALUES.append((change, r"got sigma\[0\] = .*, wanted 0 to 1024 pixels", r"sigma\[0\] must"))
WRONG_TENSORS = [
    ({"x": torch.zeros(2, 3, 5, 3)}, "got x in torch.float32, wanted torch.uint8", "x must be uint8"),
    ({"x": filled((2, 3, 5), 0, torch.uint8)}, r"got x of shape \(2, 3, 5\), wanted \[B, H, W, 3\]", "x has 3 dim"),
    ({"x": filled((2, 3, 5, 4), 0, torch.uint8)}, r"got x of shape \(2, 3, 5, 4\)", "x must have the shape"),
    ({"x": filled((2, 3, 0, 3), 0, torch.uint8)}, r"got x of shape \(2, 3, 0, 3\)", "x must have the shape"),
    ({"x": filled((2, 3, 3, 5), 0, torch.uint8).permute(0, 1, 3, 2)}, "got x with strides", "x must be contiguous"),
]
for name, tensor in parameters_of([PLAIN] * 2).items():
    wrong = f"got {name} in torch.float16, wanted torch", f"{name} has the wrong dtype"
    WRONG_TENSORS.append(({name: tensor.half()}, *wrong))
    wrong = rf"{name} of shape \(1,.*\), wanted \(2,.*\)", rf"{name} must have the shape \[B"
    WRONG_TENSORS.append(({name: tensor[:1]}, *wrong))


@needs_extension
@pytest.mark.parametrize(("change", "message", "of_operator"), WRONG_VALUES + WRONG_TENSORS)
def test_a_mistake_is_answered_with_what_was_wanted_and_the_operator_refuses_it(change, message, of_operator):
    with pytest.raises(ValueError, match=f"augment_view: .*{message}.*; "):
        augment_view(**arguments(**change))
    out = filled((2, 3, 3, 5), 7, torch.uint8)
    with pytest.raises(RuntimeError, match=f"augment_view: .*{of_operator}"):
        torch.ops.epg_fast.augment_view_out(out, **arguments(**change))
    assert (out == 7).all()


@needs_extension
def test_operator_refuses_a_result_of_another_shape_and_over_its_input():
    inputs = arguments()
    with pytest.raises(RuntimeError, match="out must have the shape"):
        torch.ops.epg_fast.augment_view_out(filled((2, 3, 5, 3), 0, torch.uint8), **inputs)
    with pytest.raises(RuntimeError, match="must not overlap x"):
        torch.ops.epg_fast.augment_view_out(inputs["x"].view(2, 3, 3, 5), **inputs)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match=r"got flip on meta, wanted it on the CPU"):
        augment_view(**arguments(flip=torch.zeros(2, dtype=torch.bool, device="meta")))
    with pytest.raises(ValueError, match="got x on meta, wanted it on the CPU for backend='extension'"):
        augment_view(**arguments(x=torch.zeros(2, 3, 5, 3, dtype=torch.uint8, device="meta")), backend="extension")
