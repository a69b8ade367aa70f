"""ADM's centre crop of decoded images: the C++ extension against the reference in PyTorch and Pillow's loop.

On a CPU the numbers are of the threads that PyTorch has: OMP_NUM_THREADS=1 gives those of one core. Pillow works image
by image, on images that it already holds.
"""

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.data.loading.views import center_crop, crop_geometry
from epg_fast.ops.resized_crop import SPEC, resized_crop
from tests.ops.extension_checks import AVAILABLE, REASON

SHAPES = SPEC.shapes if torch.cuda.is_available() else tuple((4, *shape[1:]) for shape in SPEC.shapes)


def _op(images, size, backend):
    batch, height, width, _ = images.shape
    crop = crop_geometry(width, height, size)
    parameters = (
        torch.full((batch,), crop.halvings),
        torch.tensor([[0, 0, *crop.halved]] * batch, dtype=torch.float64),
        torch.tensor([crop.resized] * batch),
        torch.tensor([[crop.left, crop.top]] * batch),
    )
    return resized_crop(list(images), *parameters, size, "bicubic", backend=backend)


def _pillow(images, size):
    return torch.from_numpy(np.stack([np.asarray(center_crop(image, size)) for image in images]))


def _to_pillow(images):
    return [Image.fromarray(image) for image in images.cpu().numpy()]


def _provider(name, device):
    if name == "pillow":
        return _pillow if device == "cpu" else pytest.skip("pillow: has no GPU")
    if name == "extension" and device != "cpu":
        pytest.skip("extension: this operation is for the CPU")
    if name == "extension" and not AVAILABLE:
        pytest.skip(f"extension: {REASON}")
    return functools.partial(_op, backend=name)


def _inputs(shape, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, 256, (*shape[:3], 3), generator=generator, device=device, dtype=torch.uint8)


@pytest.mark.parametrize("provider", ["extension", "plain", "pillow"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_resized_crop(measure, device, shape, provider):
    function, size = _provider(provider, device), shape[3]
    convert = _to_pillow if provider == "pillow" else lambda images: images
    few = _inputs((2, *shape[1:]), device, seed=0)
    assert torch.equal(function(convert(few), size).cpu(), _pillow(_to_pillow(few), size))
    measure(
        function,
        lambda seed: (convert(_inputs(shape, device, seed)), size),
        SPEC.bytes(shape, itemsize=1),
        SPEC.flops(shape),
        op=SPEC.name,
        shape=list(shape),
        dtype="torch.uint8",
        direction="forward",
        provider=provider,
    )
