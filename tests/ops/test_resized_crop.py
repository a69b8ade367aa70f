import math
import threading
from importlib import import_module
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.data.loading.views import center_crop, crop_geometry
from epg_fast.ops.resized_crop import FILTERS, resized_crop
from tests.ops.kernel_checks import DEVICE, needs_extension

BACKENDS = pytest.mark.parametrize(
    "backend", [pytest.param("plain", marks=pytest.mark.slow), pytest.param("extension", marks=needs_extension)]
)
EACH_FILTER = pytest.mark.parametrize("filter", FILTERS)


class Crop(NamedTuple):
    image: np.ndarray
    halvings: int
    box: tuple[float, float, float, float]
    resized: tuple[int, int]
    offset: tuple[int, int]


def whole(image, resized, offset=(0, 0)):
    return Crop(image, 0, (0, 0, image.shape[1], image.shape[0]), resized, offset)


def run(crops, size, filter, backend):
    """The crops [B, size, size, 3], and a check that the inputs stay as they were."""
    images = [torch.from_numpy(crop.image.copy()) for crop in crops]
    images = [image.to(DEVICE) for image in images] if backend == "plain" else images
    parameters = parameters_of(crops)
    before = [tensor.clone() for tensor in (*images, *parameters.values())]
    out = resized_crop(images, **parameters, size=size, filter=filter, backend=backend)
    assert all(map(torch.equal, before, (*images, *parameters.values())))
    assert out.is_contiguous() and out.dtype == torch.uint8 and out.shape == (len(crops), size, size, 3)
    return out.cpu().numpy()


def parameters_of(crops):
    def tensor(name, dtype, columns):
        return torch.tensor([getattr(crop, name) for crop in crops], dtype=dtype).view(-1, *columns)

    return {
        "halvings": tensor("halvings", torch.int64, ()),
        "boxes": tensor("box", torch.float64, (4,)),
        "resized": tensor("resized", torch.int64, (2,)),
        "offsets": tensor("offset", torch.int64, (2,)),
    }


def passes(image, box, resized, filter, order="xy"):
    """All of the resized box, [h, w, 3]: Pillow's two passes, each of which rounds, one after the other."""
    pillow = Image.fromarray(image)
    for direction in order:
        width, height = pillow.size
        if direction == "x":
            sides, edges = (resized[0], height), (box[0], 0, box[2], height)
        else:
            sides, edges = (width, resized[1]), (0, box[1], width, box[3])
        pillow = pillow.resize(sides, Image.Resampling[filter.upper()], box=edges)
    return np.asarray(pillow)


def pillow_goes_along_x_first(shape, resized):
    """Version 13 does not where the image gets lower, and loses more than twice as many rows as columns."""
    lost_x, lost_y = shape[1] - resized[0], shape[0] - resized[1]
    return lost_y <= max(0, 2 * lost_x)


def resize(image, box, resized, filter):
    """The resized box along x first, which is Pillow's wherever Pillow has this order."""
    wanted = passes(image, box, resized, filter)
    pillows = np.asarray(Image.fromarray(image).resize(resized, Image.Resampling[filter.upper()], box=box))
    if not np.array_equal(pillows, wanted):
        assert not pillow_goes_along_x_first(image.shape, resized), (image.shape, box, resized)
        np.testing.assert_array_equal(pillows, passes(image, box, resized, filter, "yx"))
        # no sum of these filters leaves 0..255, so that only roundings differ
        assert filter == "bicubic" or np.abs(pillows.astype(int) - wanted).max() <= 1
    return wanted


def expected(crop, size, filter):
    image = crop.image
    for _ in range(crop.halvings):
        height, width = image.shape[:2]
        image = resize(image, (0, 0, width, height), (width // 2, height // 2), "box")
    left, top = crop.offset
    return resize(image, crop.box, crop.resized, filter)[top : top + size, left : left + size]


def check(crops, size, filter, backend):
    for actual, crop in zip(run(crops, size, filter, backend), crops, strict=True):
        np.testing.assert_array_equal(actual, expected(crop, size, filter), err_msg=str(crop[1:]))


def make_image(rng, height, width):
    """Noise, noise of extremes (bicubic sums leave 0..255, box sums end in a half), or something smooth."""
    kind = rng.integers(3)
    if kind == 0:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == 1:
        return rng.choice([0, 1, 254, 255], (height, width, 3)).astype(np.uint8)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 127 * np.sin(rng.random() * 6 + x * rng.random() / 3 + y * rng.random() / 3) for _ in range(3)]
    return np.stack(waves, -1).astype(np.uint8)


def make_span(rng, length):
    """Fractional or whole pixels, often up to a border."""
    low, high = sorted(rng.random(2) * length)
    kind = rng.integers(5)
    if kind == 0:
        low, high = math.floor(low), math.ceil(high)
    return 0.0 if kind == 1 else float(low), float(length) if kind in (1, 2) else float(high)


def make_crop(rng, size, longest=90, halvings=0):
    least = 1 << halvings
    height, width = (int(side) for side in rng.integers(least, least + longest, 2))
    spans = [make_span(rng, side >> halvings) for side in (width, height)]
    resized = tuple(int(size + extra) for extra in rng.integers(0, 40, 2))
    offset = tuple(int(rng.integers(0, side - size + 1)) for side in resized)
    box = (spans[0][0], spans[1][0], spans[0][1], spans[1][1])
    return Crop(make_image(rng, height, width), halvings, box, resized, offset)


@BACKENDS
@EACH_FILTER
@pytest.mark.parametrize("size", [1, 7, 16, 33])
def test_windows_of_resized_boxes_are_pillows_bit_for_bit(size, filter, backend):
    """Images of 90 different sizes in one call, enlarged and shrunk."""
    rng = np.random.default_rng(size)
    check([make_crop(rng, size) for _ in range(90)], size, filter, backend)


@BACKENDS
@EACH_FILTER
@pytest.mark.parametrize("halvings", range(6))
def test_halvings_are_pillows_box_filter_one_after_the_other(halvings, filter, backend):
    rng = np.random.default_rng(halvings)
    check([make_crop(rng, 5, longest=150, halvings=halvings) for _ in range(12)], 5, filter, backend)


@BACKENDS
@pytest.mark.parametrize("size", [16, 32, 100])
@pytest.mark.parametrize(
    "sides", [(375, 500), (500, 375), (200, 200), (97, 130), (130, 97), (33, 32), (16, 64), (150, 80), (7, 9)], ids=str
)
def test_a_centre_crop_is_pillows(sides, size, backend):
    """Landscapes, squares, portraits up to 1 : 2, enlarged too: Pillow goes along x first in all of them."""
    image = make_image(np.random.default_rng(sum(sides)), *sides)
    geometry = crop_geometry(sides[1], sides[0], size)
    crop = Crop(image, geometry.halvings, (0, 0, *geometry.halved), geometry.resized, (geometry.left, geometry.top))
    actual = run([crop], size, "bicubic", backend)[0]
    np.testing.assert_array_equal(actual, np.asarray(center_crop(Image.fromarray(image), size)))


@BACKENDS
@EACH_FILTER
def test_an_image_of_one_pixel_is_one_colour(filter, backend):
    image = np.array([[[0, 77, 255]]], dtype=np.uint8)
    boxes = [(0, 0, 1, 1), (0.2, 0.9, 0.3, 1), (0, 0, 1e-3, 1e-3), (0.999, 0.999, 1, 1)]
    crops = [Crop(image, 0, box, (size, 4), (size - 4, 0)) for box in boxes for size in (4, 9)]
    assert (run(crops, 4, filter, backend) == image[0, 0]).all()
    check(crops, 4, filter, backend)


@BACKENDS
@EACH_FILTER
def test_resizing_to_the_same_size_changes_nothing(filter, backend):
    image = make_image(np.random.default_rng(3), 21, 40)
    crops = [whole(image, (40, 21), (11, 5)), Crop(image, 0, (7, 3, 37, 21), (30, 18), (4, 2))]
    for actual in run(crops, 16, filter, backend):
        np.testing.assert_array_equal(actual, image[5:21, 11:27])
    # the same scale along one of the directions, or not by whole pixels
    boxes = [(7, 3, 37, 20.5), (7, 3, 36, 21), (6.5, 3, 36.5, 21), (7, 2.25, 37, 20.25), (7.1, 3, 37.1, 21)]
    check([Crop(image, 0, box, (30, 18), (4, 2)) for box in boxes], 16, filter, backend)


@BACKENDS
@EACH_FILTER
@pytest.mark.parametrize("width", [1e-3, 1e-5, 0.4])
def test_narrow_boxes_at_every_border_are_pillows(width, filter, backend):
    rng = np.random.default_rng(4)
    image = rng.choice([0, 255], (9, 13, 3)).astype(np.uint8)
    spans = [[(low * (side - width), low * (side - width) + width) for low in (0, 0.5, 1)] for side in (13, 9)]
    boxes = [(x[0], y[0], min(x[1], 13), min(y[1], 9)) for x in spans[0] for y in spans[1]]
    boxes += [(0, 4, 13, 4 + width), (4, 0, 4 + width, 9)]
    check([Crop(image, 0, box, resized, (0, 0)) for box in boxes for resized in ((5, 5), (8, 300))], 5, filter, backend)


@BACKENDS
@EACH_FILTER
@pytest.mark.parametrize("sides", [(1, 100_000), (100_000, 1), (2, 70_001)], ids=str)
def test_very_long_images_are_pillows(sides, filter, backend):
    """Sums of 100,000 weights, of a white image too."""
    rng = np.random.default_rng(5)
    noise, white = rng.choice([0, 255], (*sides, 3)).astype(np.uint8), np.full((*sides, 3), 255, dtype=np.uint8)
    boxes = [(0, 0, sides[1], sides[0]), (sides[1] * 0.7, sides[0] * 0.7, sides[1], sides[0])]
    crops = [Crop(image, 0, box, (n, n), (0, 0)) for image in (noise, white) for box in boxes for n in (1, 3)]
    check(crops, 1, filter, backend)


def in_a_new_thread(function):
    """The result in a thread that has never cropped, and so keeps no memory of an image before."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@needs_extension
@pytest.mark.parametrize(("halvings", "filter"), [(0, "box"), (1, "bilinear"), (2, "bicubic"), (3, "bicubic")])
def test_a_crop_does_not_depend_on_the_ones_before_it(halvings, filter):
    """A thread keeps memory: a large image before a small one and the reverse, also within one call."""
    rng = np.random.default_rng(8)
    large = Crop(make_image(rng, 401, 299), halvings, (0, 0, 25.3, 40), (70, 64), (1, 0))
    small = Crop(make_image(rng, 17, 19), halvings, (0, 0.5, 2, 1.6), (65, 64), (0, 0))
    alone = [in_a_new_thread(lambda crop=crop: run([crop], 64, filter, "extension")) for crop in (large, small)]
    for crops, wanted in (((large, small), alone), ((small, large), alone[::-1])):
        one_by_one = in_a_new_thread(lambda crops=crops: [run([crop], 64, filter, "extension") for crop in crops])
        together = in_a_new_thread(lambda crops=crops: run(crops, 64, filter, "extension"))
        np.testing.assert_array_equal(np.concatenate(one_by_one), np.concatenate(wanted))
        np.testing.assert_array_equal(together, np.concatenate(wanted))
    check([large, small], 64, filter, "extension")


IMAGE = torch.zeros(6, 8, 3, dtype=torch.uint8)


def arguments(batch=2, **change):
    parameters = parameters_of([Crop(None, 1, (0, 0, 4, 3), (6, 5), (2, 1))] * batch)
    return {"images": [IMAGE] * batch} | parameters | {"size": 4, "filter": "bicubic"} | change


@needs_extension
def test_auto_takes_the_extension_for_contiguous_images_only(monkeypatch):
    image = torch.from_numpy(np.random.default_rng(9).integers(0, 256, (16, 12, 3), dtype=np.uint8))[::2, :8]
    inputs = arguments(boxes=torch.tensor([[0, 0, 4, 4.0]] * 2).double())
    turned = resized_crop(**inputs | {"images": [image.transpose(0, 1)] * 2})
    monkeypatch.setattr(import_module("epg_fast.ops.resized_crop"), "resized_crop_ref", None)
    assert torch.equal(turned, resized_crop(**inputs | {"images": [image.transpose(0, 1).contiguous()] * 2}))


def operator_arguments(out=None, filter=2, **change):
    inputs = arguments(**change)
    del inputs["size"], inputs["filter"]
    out = torch.full((len(inputs["images"]), 4, 4, 3), 7, dtype=torch.uint8) if out is None else out
    return out, *inputs.values(), filter


@needs_extension
def test_parameters_may_be_views():
    inputs = arguments(images=[torch.from_numpy(make_image(np.random.default_rng(10), 6, 8))] * 2)
    views = {name: inputs[name].repeat_interleave(2, 0)[::2] for name in ("halvings", "boxes", "resized", "offsets")}
    assert not any(view.is_contiguous() for view in views.values())
    assert torch.equal(*(resized_crop(**inputs | given, backend="extension") for given in (views, {})))


def second(name, dtype, *values):
    """This parameter with these values for the second image."""
    return {name: torch.stack([arguments()[name][0].to(dtype), torch.tensor(values, dtype=dtype).squeeze()])}


def box(*values):
    return second("boxes", torch.float64, *values)


def integers(name, *values):
    return second(name, torch.int64, *values)


HALVINGS = r"got halvings\[1\]=.* for 8 x 6 pixels, wanted at least 0 and a pixel left", "image 1 .*cannot be halved"
BOX = r"got boxes\[1\]=.*wanted left < right and top < bottom within 4 x 3", "image 1 has a box that is empty or not"
WINDOW = r"got a window of 4 pixels at offsets\[1\]=.*, wanted it within resized\[1\]=", "image 1 has a window that is"
SMALLEST, LARGEST = -(2**63), 2**63 - 1
# Equal numbers once they are float32.
NEARLY = 3 - 1e-9
INF, NAN = math.inf, math.nan
WRONG_BOXES = [(-1e-6, 0, 4, 3), (0, -1, 4, 3), (0, 0, 4.001, 3), (0, 0, 4, 3.1), (2, 0, 2, 3), (3, 0, 2, 3)]
WRONG_BOXES += [(0, 2, 4, 1), (0, NEARLY, 4, 3), (-INF, 0, 4, 3), (0, 0, INF, 3), (0, 0, 4, 1e300)]
WRONG_BOXES += [(NAN, 0, 4, 3), (0, NAN, 4, 3), (0, 0, NAN, 3), (0, 0, 4, NAN)]
WRONG_VALUES = [
    *((integers("halvings", n), *HALVINGS) for n in (-1, 3, 31, 32, 64, SMALLEST, LARGEST)),
    *((box(*edges), *BOX) for edges in WRONG_BOXES),
    *((integers("offsets", *o), *WINDOW) for o in ((-1, 0), (0, -1), (3, 0), (0, 2), (SMALLEST, 0), (0, LARGEST))),
    *((integers("resized", *sides), *WINDOW) for sides in ((5, 5), (6, 4), (0, 5), (6, -6), (SMALLEST, 5))),
    *((integers("resized", *sides), *WINDOW) for sides in ((2**20 + 1, 5), (6, LARGEST))),
]
TRANSPOSED = torch.zeros(8, 6, 3, dtype=torch.uint8).transpose(0, 1)
NOT_UINT8 = r"images\[1\] must be uint8"
WRONG_TENSORS = [
    ({"images": [IMAGE, IMAGE.float()]}, r"images\[1\] torch.float32 \[6, 8, 3\], wanted torch.uint8", NOT_UINT8),
    ({"images": [IMAGE, IMAGE[0]]}, r"got images\[1\] torch.uint8 \[8, 3\]", NOT_UINT8),
    ({"images": [IMAGE, IMAGE.repeat(1, 1, 2)]}, r"got images\[1\] torch.uint8 \[6, 8, 6\]", NOT_UINT8),
    ({"images": [IMAGE[:0]] * 2}, r"halvings\[0\]=1 for 8 x 0 pixels", "image 0 of 0 x 8 pixels cannot be halved"),
    ({"images": [IMAGE] * 3}, r"got halvings torch.int64 \[2\] .*\[3\] on the CPU, for 3 images", "must be uint8"),
]
for name, tensor in parameters_of([whole(IMAGE.numpy(), (6, 5))] * 2).items():
    WRONG_TENSORS.append(({name: tensor.half()}, f"got {name} torch.float16 .*wanted", f"{name} has a wrong dtype"))
    WRONG_TENSORS.append(({name: tensor[:1]}, f"got {name} torch.* on cpu, wanted", f"{name} has . values, wanted"))


@needs_extension
@pytest.mark.parametrize(("change", "message", "of_operator"), WRONG_VALUES + WRONG_TENSORS)
def test_a_mistake_is_answered_with_what_was_wanted_and_the_operator_refuses_it(change, message, of_operator):
    with pytest.raises(ValueError, match=f"resized_crop: .*{message}"):
        resized_crop(**arguments(**change))
    out = torch.full((2, 4, 4, 3), 7, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=f"resized_crop: .*{of_operator}"):
        torch.ops.epg_fast.resized_crop_out(*operator_arguments(out, **change))
    assert (out == 7).all()


@needs_extension
def test_operator_refuses_other_filters_strided_tensors_and_other_results():
    def refused(message, *positional, **change):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.epg_fast.resized_crop_out(*operator_arguments(*positional, **change))

    for filter in (-1, 3, LARGEST):
        refused(f"filter must be 0, 1 or 2, got {filter}", filter=filter)
    refused(r"images\[0\] must be .*contiguous", images=[TRANSPOSED] * 2)
    for shape in ((2, 4, 4, 4), (1, 4, 4, 3), (2, 48), (2, 0, 4, 3), (2, 4, 0, 3)):
        refused(r"out must be uint8 \[batch, height, width, 3\]", torch.zeros(shape, dtype=torch.uint8))
    refused("out must be uint8", torch.zeros(2, 4, 4, 3, dtype=torch.int8))
    refused("out must be .*contiguous", torch.zeros(2, 4, 3, 4, dtype=torch.uint8).transpose(2, 3))
    refused("boxes must be contiguous", boxes=torch.tensor([[0, 0, 4, 3.0]] * 4).double()[::2])
    memory = torch.zeros(200, dtype=torch.uint8)
    refused(r"out .*overlap images\[1\]", memory[:96].view(2, 4, 4, 3), images=[IMAGE, memory[40:184].view(6, 8, 3)])


@needs_extension
def test_sizes_filters_and_backends_that_do_not_exist_and_images_elsewhere_are_refused():
    elsewhere = r"got images\[0\] on .*wanted it contiguous on the CPU for backend='extension'"
    for change, message in (
        ({"size": 0}, "got size=0, wanted at least 1"),
        ({"filter": "lanczos"}, "got filter='lanczos', wanted one of box, bilinear, bicubic"),
        ({"backend": "cuda"}, "got backend='cuda', wanted one of auto, extension, plain"),
        ({"boxes": torch.zeros(2, 4, dtype=torch.float64, device="meta")}, r"got boxes torch.float64 \[2, 4\] on meta"),
        ({"images": [TRANSPOSED] * 2, "backend": "extension"}, elsewhere),
        ({"images": [IMAGE.to("meta")] * 2, "backend": "extension"}, elsewhere),
    ):
        with pytest.raises(ValueError, match=f"resized_crop: .*{message}"):
            resized_crop(**arguments(**change))


@needs_extension
def test_images_whose_pixels_float32_cannot_count_are_refused():
    edge = torch.tensor([[2**24 + 2.5, 0, 2**24 + 3, 1]], dtype=torch.float64)
    image = torch.zeros(1, 2**24 + 3, 3, dtype=torch.uint8)
    inputs = {"batch": 1, "images": [image], "halvings": torch.tensor([0]), "boxes": edge}
    with pytest.raises(ValueError, match=r"images\[0\] of 16777219 x 1 pixels, wanted at most 16777216 a side"):
        resized_crop(**arguments(**inputs))
    with pytest.raises(RuntimeError, match="image 0 of 1 x 16777219 pixels is longer than 16777216"):
        torch.ops.epg_fast.resized_crop_out(*operator_arguments(**inputs))
