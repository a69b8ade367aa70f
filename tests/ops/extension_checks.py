"""What the tests of every operation in the C++/CUDA extension share."""

import pytest
import torch

from epg_fast.ops import extension

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = (pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device"))

_available, _reason = extension.extension_status()
if _available and DEVICE == "cuda":
    _available, _reason = extension.extension_has_cuda(), "the extension was built without CUDA"
needs_extension = pytest.mark.skipif(not _available, reason=f"extension: {_reason}")
each_steps_backend = pytest.mark.parametrize(
    "steps_backend", ["auto", "reference", pytest.param("extension", marks=needs_extension)]
)


def shapes(spec):
    """The operation's odd shapes anywhere, the presets' on a GPU."""
    return [*spec.odd_shapes, *(pytest.param(shape, marks=GPU) for shape in spec.shapes)]


def normal(shape, count, seed=0):
    """Random tensors on the device, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(shape, generator=generator)).to(DEVICE) for _ in range(count)]
