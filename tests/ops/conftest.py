"""Fixtures of the operations' tests."""

import pytest
import torch


@pytest.fixture
def poisoned_empty():
    """Fill what torch.empty returns with NaN: a kernel that leaves an output unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
