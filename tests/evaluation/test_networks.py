"""The feature networks: every kind of file and name, told apart by content, and everything that is neither.

Networks of torch-fidelity itself: test_other_libraries.py.
"""

import hashlib
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from epg_fast.evaluation.networks import Dinov2, Inception, full_float32

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


class Means(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double().mean(dim=(2, 3)) / 255


def test_torchscript_gives_features_and_probabilities_without_the_bias(tiny_inception, tmp_path):
    network = Inception(tiny_inception, CPU)
    features, probabilities = network.rows(IMAGES).values()
    expected = hand_made(IMAGES)
    assert features.dtype == probabilities.dtype == torch.float32
    assert np.allclose(features, expected[0], rtol=1e-5) and np.allclose(probabilities, expected[1], atol=1e-5)
    for _ in range(3):
        assert torch.equal(network.features(IMAGES), features) and not features.requires_grad
    assert torch.equal(network.features(IMAGES[1:3]), features[1:3])
    torch.jit.script(Means()).save(tmp_path / "dinov2.pt")
    other = Dinov2(tmp_path / "dinov2.pt", CPU)
    features = other.features(IMAGES)
    assert features.dtype == torch.float32 and torch.equal(features, (IMAGES.double().mean(dim=(2, 3)) / 255).float())
    for one, path, width in ((network, tiny_inception, 6), (other, tmp_path / "dinov2.pt", 3)):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        wanted = {"kind": "torchscript", "path": str(path), "sha256": digest, "num_features": width}
        assert one.description == wanted


class FakeInception(torch.nn.Module):
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


def state_dict():
    names = ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch1x1.conv.weight", "fc.weight")
    return {name: torch.full((4, 6), 0.01 * i) for i, name in enumerate(names)}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_goes_through_torch_fidelity_whatever_its_name(monkeypatch, tmp_path, zipped):
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    made = types.SimpleNamespace(FeatureExtractorInceptionV3=FakeInception)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", made)
    path = tmp_path / "inception-2015-12-05.pt"
    torch.save(state_dict(), path, _use_new_zipfile_serialization=zipped)
    network = Inception(path, CPU)
    features, probabilities = network.rows(IMAGES).values()
    assert network.kind == "torch-fidelity" and network.num_features == 6
    assert np.allclose(features, hand_made(IMAGES)[0], rtol=1e-5) and torch.equal(network.features(IMAGES), features)
    assert torch.allclose(probabilities, (features @ torch.full((6, 4), 0.02)).softmax(dim=1))
    torch.save(state_dict() | {"unexpected": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"torch-fidelity does not accept it .*wanted NVIDIA's"):
        Inception(path, CPU)


@pytest.fixture
def _not_imported(monkeypatch):
    """torch-fidelity, and a torchvision that is missing."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch_fidelity", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)


@pytest.mark.usefixtures("_not_imported")
@pytest.mark.parametrize("network", [Inception, Dinov2])
def test_a_missing_torch_fidelity_is_named_with_the_command(monkeypatch, tmp_path, network):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    torch.save(state_dict(), tmp_path / "w.pth")
    with pytest.raises(ImportError, match=r"pip install 'epg_fast\[eval\]'"):
        network(tmp_path / "w.pth" if network is Inception else "dinov2-vit-l-14", CPU)


@pytest.mark.usefixtures("_not_imported")
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import torchvision", "import of torchvision halted"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
        ("raise OSError('torchvision/_C.so: undefined symbol')", "torchvision/_C.so: undefined symbol"),
    ],
)
def test_a_torchvision_that_is_missing_or_of_another_torch_is_named(monkeypatch, tmp_path, body, reason):
    (tmp_path / "torch_fidelity").mkdir()
    (tmp_path / "torch_fidelity/__init__.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError) as error:
        Dinov2("dinov2-vit-l-14", CPU)
    assert f"needs the torchvision that belongs to torch {torch.__version__} ({reason}" in str(error.value)


class Unpickled:
    seen = False

    def __setstate__(self, state):
        Unpickled.seen = True


def scripted(path, forward):
    """Save a network with the given body of `forward`."""
    # a class of its own, since TorchScript compiles a method of a class once
    module = type("Network", (torch.jit.ScriptModule,), {})()
    module.define(forward + "\n")
    module.save(str(path))
    return path


ARGUMENTS = "def forward(self, img: Tensor, return_features: bool=False, no_output_bias: bool=False) -> Tensor:\n"


@pytest.mark.parametrize(
    ("network", "forward", "message"),
    [
        (Inception, "def forward(self, x: Tensor) -> Tensor:\n    return x", "cannot be called like Inception"),
        (Inception, ARGUMENTS + "    return img.float().mean() / 0.", r"expected features \[2, D\], got \[\]"),
        (Inception, ARGUMENTS + "    return img.float().mean(dim=[2, 3]) / 0.", "features are not finite"),
        (Inception, ARGUMENTS + "    return img.float().mean(dim=[2, 3])", "probabilities do not add up to 1"),
        (Dinov2, "def forward(self, x: Tensor) -> Tensor:\n    return x", r"\[2, D\], got \[2, 3, 32, 32\]"),
        (Dinov2, "def forward(self, x: Tensor) -> Tensor:\n    return x @ x[0, 0, :3, :5]", "be called like DINOv2"),
    ],
)
def test_other_torchscript_is_refused_by_what_it_does(tmp_path, network, forward, message):
    path = scripted(tmp_path / "net.pt", forward)
    with pytest.raises(ValueError, match=message) as error:
        network(path, CPU)
    assert str(path) in str(error.value) and network.wanted in str(error.value)


def test_files_that_are_no_network_are_refused_and_no_pickled_code_runs(tmp_path, tiny_inception):
    def refused(network, path, message):
        with pytest.raises(ValueError, match=message):
            network(path, CPU)

    path = tmp_path / "network.pt"
    refused(Inception, path, r"network\.pt is not a file; wanted NVIDIA's")
    name = "dinov2-vit-x-14"
    refused(Dinov2, name, rf"dinov2: {name} is not a file; wanted one of dinov2-vit-s-14, .*")
    for content in (b"", b"garbage" * 100, tiny_inception.read_bytes()[:-500]):
        path.write_bytes(content)
        refused(Inception, path, r"network\.pt is neither TorchScript nor a state dict; wanted NVIDIA's")
    torch.save({"net": Unpickled()}, path)
    refused(Inception, path, r"neither TorchScript nor a state dict; .*the \.pkl of the same name")
    assert not Unpickled.seen
    for other, found in (({"a": torch.zeros(1)}, r"\['a'\]"), (torch.zeros(3), "Tensor")):
        torch.save(other, path)
        refused(Inception, path, rf"holds no weights of Inception \(found {found}\)")
    refused(Dinov2, path, "no TorchScript; wanted one of .*, or a TorchScript file that maps uint8")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("network/code/nothing.py", "")
    refused(Inception, path, "damaged TorchScript")


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
