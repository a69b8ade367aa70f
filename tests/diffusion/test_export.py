"""A denoiser's call as a graph of its own, for those who deploy one without this package."""

import pytest
import torch

from epg_fast.diffusion import Denoiser
from tests.networks import make_model


class Denoise(torch.nn.Module):
    def __init__(self, network, parameterization):
        super().__init__()
        self.network, self.denoiser = network, Denoiser(network, parameterization=parameterization)

    def forward(self, x, sigma, y):
        return self.denoiser(x, sigma, y)


@pytest.mark.slow
@pytest.mark.parametrize("parameterization", ["x0", "edm"])
def test_a_call_is_exported_for_any_batch_size(parameterization, tmp_path):
    module = Denoise(make_model(depth=2).eval(), parameterization)
    batch = torch.export.Dim("batch", min=2, max=64)
    inputs = torch.randn(3, 3, 16, 16), torch.tensor([0.1, 1.0, 10.0]), torch.tensor([0, 2, 5])
    program = torch.export.export(module, inputs, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    torch.export.save(program, tmp_path / "denoise.pt2")
    loaded = torch.export.load(tmp_path / "denoise.pt2").module()
    for count in (3, 5):
        inputs = torch.randn(count, 3, 16, 16), torch.rand(count) + 0.01, torch.randint(6, (count,))
        with torch.no_grad():
            torch.testing.assert_close(loaded(*inputs), module(*inputs), rtol=1e-5, atol=1e-6)
