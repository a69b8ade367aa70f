"""Without a CUDA device the Triton kernels of these tests run on CPU tensors, in Triton's interpreter."""

import os

import pytest
import torch

# Triton reads the variable when a kernel is defined, so it is set before any test imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def poisoned_empty():
    """Fill what torch.empty returns with NaN: a kernel that leaves an output unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
