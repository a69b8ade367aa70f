import pytest
import torch


@pytest.fixture(scope="session")
def arrays(digits):
    """(train pixels, train labels, test pixels, test labels) of the digits, pixels in [0, 1]."""
    from epg_fast.evaluation import load_images

    return *load_images(digits / "train", 8), *load_images(digits / "test", 8)


class TinyInception(torch.nn.Module):
    """Six features (channel means and deviations, in levels) and four classes, called like NVIDIA's TorchScript.

    Float32 as Inception's, but computed in float64: so much finer that the order of a sum does not show in it.
    """

    def __init__(self):
        super().__init__()
        self.output = torch.nn.Linear(6, 4)
        torch.nn.init.normal_(self.output.weight, std=0.05, generator=torch.Generator().manual_seed(0))
        torch.nn.init.constant_(self.output.bias, 100.0)
        # Must not matter: it runs in eval mode.
        self.dropout = torch.nn.Dropout(0.5)

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        x = self.dropout(img.to(torch.float64).flatten(2))
        features = torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1)
        if return_features:
            return features.float()
        if no_output_bias:
            return torch.nn.functional.linear(features, self.output.weight.double()).softmax(dim=1).float()
        return self.output(features.float())


@pytest.fixture(scope="session")
def tiny_inception(tmp_path_factory):
    """Path of a TorchScript file that stands in for Inception."""
    path = tmp_path_factory.mktemp("inception") / "network.bin"
    torch.jit.script(TinyInception()).save(path)
    return path
