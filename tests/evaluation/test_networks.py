"""The feature networks: every kind of file and name, told apart by content, and everything that is neither."""

import hashlib
import sys
import types
import zipfile
from urllib.error import URLError

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


def test_torchscript_gives_features_and_probabilities_without_the_bias(tiny_inception):
    network = Inception(tiny_inception, CPU)
    features, probabilities = network.rows(IMAGES).values()
    expected = hand_made(IMAGES)
    assert features.dtype == probabilities.dtype == torch.float32
    assert np.allclose(features, expected[0], rtol=1e-5) and np.allclose(probabilities, expected[1], atol=1e-5)
    for _ in range(3):
        assert torch.equal(network.features(IMAGES), features) and not features.requires_grad
    assert torch.equal(network.features(IMAGES[1:3]), features[1:3])
    digest = hashlib.sha256(tiny_inception.read_bytes()).hexdigest()
    wanted = {"kind": "torchscript", "path": str(tiny_inception), "sha256": digest, "num_features": 6}
    assert network.description == wanted


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


class FakeDinov2(torch.nn.Module):
    """The interface of torch-fidelity's FeatureExtractorDinoV2."""

    fails: Exception | None = None

    def __init__(self, name, features_list):
        super().__init__()
        assert features_list == ["dinov2"]
        if self.fails:
            raise self.fails
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x):
        assert x.dtype == torch.uint8 and not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "highest" and torch.backends.cudnn.deterministic
        return (self.dropout(x.float().mean(dim=(2, 3)) * self.scale),)


@pytest.fixture
def torch_fidelity(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    for module, name, extractor in (
        ("feature_extractor_inceptionv3", "FeatureExtractorInceptionV3", FakeInception),
        ("feature_extractor_dinov2", "FeatureExtractorDinoV2", FakeDinov2),
    ):
        made = types.ModuleType(f"torch_fidelity.{module}")
        setattr(made, name, extractor)
        monkeypatch.setitem(sys.modules, made.__name__, made)


def state_dict():
    names = ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch1x1.conv.weight", "fc.weight")
    return {name: torch.full((4, 6), 0.01 * i) for i, name in enumerate(names)}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_goes_through_torch_fidelity_whatever_its_name(torch_fidelity, tmp_path, zipped):
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


def test_a_name_goes_through_torch_fidelity_and_is_told_from_others_by_its_weights(torch_fidelity):
    network = Dinov2("dinov2-vit-l-14", CPU)
    assert torch.equal(network.features(IMAGES), IMAGES.float().mean(dim=(2, 3)) * 2)
    digest = hashlib.sha256(b"\nscale torch.float32 []\n\0\0\0\x40").hexdigest()
    wanted = {"kind": "torch-fidelity", "path": "dinov2-vit-l-14", "sha256": digest, "num_features": 3}
    assert network.description == wanted


class Means(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double().mean(dim=(2, 3)) / 255


def test_a_torchscript_file_maps_images_to_features_of_dinov2(tmp_path):
    path = tmp_path / "dinov2.pt"
    torch.jit.script(Means()).save(path)
    network = Dinov2(path, CPU)
    features = network.features(IMAGES)
    assert features.dtype == torch.float32 and torch.equal(features, (IMAGES.double().mean(dim=(2, 3)) / 255).float())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert network.description == {"kind": "torchscript", "path": str(path), "sha256": digest, "num_features": 3}


@pytest.mark.parametrize("fails", [RuntimeError("no internet\nconnection"), URLError("unknown host")])
def test_a_hub_without_network_or_copy_is_answered_with_how_to_get_one(torch_fidelity, monkeypatch, fails):
    monkeypatch.setattr(FakeDinov2, "fails", fails)
    with pytest.raises(ValueError, match=r"gives no dinov2-vit-b-14 \(.*\); run `python .*'dinov2_vitb14'") as error:
        Dinov2("dinov2-vit-b-14", CPU)
    assert torch.hub.get_dir() in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("network", [Inception, Dinov2])
def test_a_missing_torch_fidelity_is_named_with_the_command(monkeypatch, tmp_path, network):
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    torch.save(state_dict(), tmp_path / "w.pth")
    with pytest.raises(ImportError, match=r"pip install 'epg_fast\[eval\]'"):
        network(tmp_path / "w.pth" if network is Inception else "dinov2-vit-l-14", CPU)


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
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch_fidelity", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError) as error:
        Dinov2("dinov2-vit-l-14", CPU)
    assert f"needs the torchvision that belongs to torch {torch.__version__} ({reason}" in str(error.value)


class Unpickled:
    seen = False

    def __setstate__(self, state):
        Unpickled.seen = True


def test_pickled_code_is_never_run(tmp_path):
    path = tmp_path / "inception-2015-12-05.pkl"
    torch.save({"net": Unpickled()}, path)
    with pytest.raises(ValueError, match=r"neither TorchScript nor a state dict; .*the \.pkl of the same name"):
        Inception(path, CPU)
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


def test_files_that_are_no_network_are_refused(tmp_path, tiny_inception):
    path = tmp_path / "network.pt"
    with pytest.raises(ValueError, match=r"network\.pt is not a file; wanted NVIDIA's"):
        Inception(path, CPU)
    with pytest.raises(ValueError, match=r"dinov2: dinov2-vit-x-14 is not a file; wanted one of dinov2-vit-s-14, .*"):
        Dinov2("dinov2-vit-x-14", CPU)
    for content in (b"", b"garbage" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"network\.pt is neither TorchScript nor a state dict; wanted NVIDIA's"):
            Inception(path, CPU)
    for other, found in (({"a": torch.zeros(1)}, r"\['a'\]"), (torch.zeros(3), "Tensor")):
        torch.save(other, path)
        with pytest.raises(ValueError, match=rf"holds no weights of Inception \(found {found}\)"):
            Inception(path, CPU)
    with pytest.raises(ValueError, match="no TorchScript; wanted one of .*, or a TorchScript file that maps uint8"):
        Dinov2(path, CPU)
    path.write_bytes(tiny_inception.read_bytes()[:-500])
    with pytest.raises(ValueError, match="neither TorchScript nor a state dict"):
        Inception(path, CPU)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("network/code/nothing.py", "")
    with pytest.raises(ValueError, match="damaged TorchScript"):
        Inception(path, CPU)


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
