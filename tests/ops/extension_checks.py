"""What the tests of the C++/CUDA extension's operations share."""

import pytest
import torch

from epg_fast.ops import extension

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = (pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device"))

CPU = pytest.mark.skipif(DEVICE == "cuda", reason="what holds on a CPU")

AVAILABLE, REASON = extension.extension_status()
if AVAILABLE and DEVICE == "cuda":
    AVAILABLE, REASON = extension.extension_has_cuda(), "the extension was built without CUDA"
needs_extension = pytest.mark.skipif(not AVAILABLE, reason=f"extension: {REASON}")
each_steps_backend = pytest.mark.parametrize(
    "steps_backend", ["plain", pytest.param("extension", marks=needs_extension)]
)


def shapes(spec):
    """The operation's odd shapes anywhere, the presets' on a GPU."""
    return [*spec.odd_shapes, *(pytest.param(shape, marks=GPU) for shape in spec.shapes)]


def make_tensors(shapes, seed=0, dtype=torch.float32) -> list[torch.Tensor]:
    """The same standard normal values on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
