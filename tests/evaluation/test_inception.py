"""The feature network: both kinds of file, told apart by content, and everything that is neither."""

import hashlib
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from epg_fast.evaluation.inception import FeatureNetwork
from epg_fast.evaluation.network import full_float32

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (5, 3, 16, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def hand_made(images):
    """Features and probabilities of `TinyInception`, in numpy."""
    x = images.numpy().reshape(len(images), 3, -1).astype(np.float64)
    features = np.concatenate([x.mean(axis=2), x.std(axis=2, ddof=1)], axis=1)
    weight = torch.empty(4, 6)
    torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(0))
    logits = features @ weight.numpy().T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return features, p / p.sum(axis=1, keepdims=True)


def test_torchscript_gives_features_and_probabilities_without_the_bias(tiny_inception):
    network = FeatureNetwork(tiny_inception, CPU)
    features, probabilities = network.features_and_probabilities(IMAGES)
    expected = hand_made(IMAGES)
    assert network.num_features == 6 and features.dtype == probabilities.dtype == torch.float32
    assert np.allclose(features, expected[0], rtol=1e-5) and np.allclose(probabilities, expected[1], atol=1e-5)
    for _ in range(3):
        assert torch.equal(network.features(IMAGES), features) and not features.requires_grad
    assert torch.equal(network.features(IMAGES[1:3]), features[1:3])


def test_description_names_the_file_by_its_hash(tiny_inception):
    digest = hashlib.sha256(tiny_inception.read_bytes()).hexdigest()
    wanted = {"kind": "torchscript", "path": str(tiny_inception), "sha256": digest, "num_features": 6}
    assert FeatureNetwork(tiny_inception, CPU).description == wanted


def state_dict():
    names = ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch1x1.conv.weight", "fc.weight")
    return {name: torch.full((4, 6), 0.01 * i) for i, name in enumerate(names)}


class FakeExtractor(torch.nn.Module):
    """The interface of torch-fidelity's FeatureExtractorInceptionV3."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        weights = torch.load(feature_extractor_weights_path)
        if "unexpected" in weights:
            raise RuntimeError("Error(s) in loading state_dict:\n\tUnexpected key(s)")
        self.fc = torch.nn.Parameter(weights["fc.weight"])

    def forward(self, x):
        assert x.dtype == torch.uint8
        features = torch.cat([x.float().mean(dim=(2, 3)), x.float().std(dim=(2, 3))], dim=1)
        return features, features @ self.fc.T


@pytest.fixture
def torch_fidelity(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeExtractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_goes_through_torch_fidelity_whatever_its_name(torch_fidelity, tmp_path, zipped):
    path = tmp_path / "inception-2015-12-05.pt"
    torch.save(state_dict(), path, _use_new_zipfile_serialization=zipped)
    network = FeatureNetwork(path, CPU)
    features, probabilities = network.features_and_probabilities(IMAGES)
    assert network.kind == "torch-fidelity" and network.num_features == 6
    assert np.allclose(features, hand_made(IMAGES)[0], rtol=1e-5) and torch.equal(network.features(IMAGES), features)
    assert torch.allclose(probabilities, (features @ torch.full((6, 4), 0.02)).softmax(dim=1))
    torch.save(state_dict() | {"unexpected": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"torch-fidelity does not accept it .*wanted NVIDIA's"):
        FeatureNetwork(path, CPU)


def test_a_missing_torch_fidelity_is_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", raising=False)
    torch.save(state_dict(), tmp_path / "w.pth")
    with pytest.raises(ImportError, match=r"pip install 'epg_fast\[eval\]'"):
        FeatureNetwork(tmp_path / "w.pth", CPU)


class Unpickled:
    seen = False

    def __setstate__(self, state):
        Unpickled.seen = True


def test_pickled_code_is_never_run(tmp_path):
    path = tmp_path / "inception-2015-12-05.pkl"
    torch.save({"net": Unpickled()}, path)
    with pytest.raises(ValueError, match=r"neither TorchScript nor a state dict; .*the \.pkl of the same name"):
        FeatureNetwork(path, CPU)
    assert not Unpickled.seen


def scripted(path, forward):
    """Save a network with the given body of `forward`."""
    # a class of its own, since TorchScript compiles a method of a class once
    module = type("Network", (torch.jit.ScriptModule,), {})()
    module.define(forward + "\n")
    module.save(str(path))
    return path


ARGUMENTS = "def forward(self, img: Tensor, return_features: bool=False, no_output_bias: bool=False) -> Tensor:\n"


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ("def forward(self, x: Tensor) -> Tensor:\n    return x", "cannot be called like Inception"),
        (ARGUMENTS + "    return img.float().mean() / 0.", r"expected features \[2, D\], got \[\]"),
        (ARGUMENTS + "    return img.float().mean(dim=[2, 3]) / 0.", "features are not finite"),
        (ARGUMENTS + "    return img.float().mean(dim=[2, 3])", "probabilities do not add up to 1"),
        (ARGUMENTS + "    return img.float() @ img.float()[0, 0, :3, :5]", "cannot be called like Inception"),
    ],
)
def test_other_torchscript_is_refused_by_what_it_does(tmp_path, forward, message):
    path = scripted(tmp_path / "net.pt", forward)
    with pytest.raises(ValueError, match=message) as error:
        FeatureNetwork(path, CPU)
    assert str(path) in str(error.value) and "wanted NVIDIA's inception-2015-12-05.pt" in str(error.value)


def test_files_that_are_no_network_are_refused(tmp_path, tiny_inception):
    path = tmp_path / "network.pt"
    with pytest.raises(ValueError, match=r"network\.pt is not a file; wanted NVIDIA's"):
        FeatureNetwork(path, CPU)
    for content in (b"", b"garbage" * 100, b"batch_size: 8\nbatch_size: 16\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"network\.pt is neither TorchScript nor a state dict; wanted NVIDIA's"):
            FeatureNetwork(path, CPU)
    for other, found in (({"a": torch.zeros(1)}, r"\['a'\]"), (torch.zeros(3), "Tensor")):
        torch.save(other, path)
        with pytest.raises(ValueError, match=rf"holds no weights of Inception \(found {found}\)"):
            FeatureNetwork(path, CPU)
    path.write_bytes(tiny_inception.read_bytes()[:-500])
    with pytest.raises(ValueError, match="neither TorchScript nor a state dict"):
        FeatureNetwork(path, CPU)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("network/code/nothing.py", "")
    with pytest.raises(ValueError, match="damaged TorchScript"):
        FeatureNetwork(path, CPU)


def test_float32_is_full_while_the_network_runs_and_as_before_afterwards():
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.deterministic and not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "high" and torch.is_grad_enabled()
        assert torch.backends.cudnn.allow_tf32 and not torch.backends.cudnn.deterministic
    finally:
        torch.set_float32_matmul_precision("highest")
