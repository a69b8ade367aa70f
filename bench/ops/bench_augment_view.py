"""The pixel part of an augmented view, everything on: the C++ extension against eager PyTorch and Pillow's loop.

On a CPU the numbers are of the threads that PyTorch has: OMP_NUM_THREADS=1 gives those of one core. Pillow works image
by image, with its box filters in the place of the Gaussian.
"""

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.data.loading.views import AugmentedView, apply_view
from epg_fast.ops.augment_view import SPEC, JitterOperation, augment_view, augment_view_ref
from tests.ops.extension_checks import AVAILABLE, REASON

JITTER = (("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.2), ("hue", 0.08))
SIGMA = 2.0
SHAPES = SPEC.shapes if torch.cuda.is_available() else ((8, 256, 256, 3),)


def _parameters(batch, sigma):
    on = torch.ones(batch, dtype=torch.bool)
    codes = torch.tensor([JitterOperation[name.upper()] for name, _ in JITTER], dtype=torch.int8)
    values = torch.tensor([value for _, value in JITTER], dtype=torch.float64)
    sigmas = torch.full((batch,), sigma, dtype=torch.float64)
    return codes.repeat(batch, 1), values.repeat(batch, 1), ~on, sigmas, on, on


def _pillow(x, *, sigma=SIGMA):
    size = x.shape[1]
    view = AugmentedView((0, 0, size, size), JITTER, False, sigma or None, True, True)
    views = [np.asarray(apply_view(Image.fromarray(image), size, view)) for image in x.numpy()]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def _provider(name, device):
    if name == "pillow":
        return _pillow if device == "cpu" else pytest.skip("pillow: has no GPU")
    if name == "eager":
        return lambda x, sigma=SIGMA: augment_view_ref(x, *_parameters(len(x), sigma))
    if device != "cpu":
        pytest.skip("extension: this operation is for the CPU")
    if not AVAILABLE:
        pytest.skip(f"extension: {REASON}")
    return lambda x, sigma=SIGMA: augment_view(x, *_parameters(len(x), sigma), backend="extension")


def _inputs(shape, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)]


@pytest.mark.parametrize("provider", ["extension", "eager", "pillow"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_augment_view(measure, device, shape, provider):
    function = _provider(provider, device)
    (few,) = _inputs((3, 64, 64, 3), device, seed=0)
    assert torch.equal(function(few, sigma=0.0).cpu(), _pillow(few.cpu(), sigma=0.0))
    if provider == "extension":
        assert torch.equal(function(few), augment_view_ref(few, *_parameters(len(few), SIGMA)))
    measure(
        function,
        functools.partial(_inputs, shape, device),
        SPEC.bytes(shape, itemsize=1),
        SPEC.flops(shape),
        op=SPEC.name,
        shape=list(shape),
        dtype="torch.uint8",
        direction="forward",
        provider=provider,
    )
