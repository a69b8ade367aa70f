"""DINOv2's features: by name through torch-fidelity, from a TorchScript file, and everything that is neither."""

import hashlib
import sys
import types
from urllib.error import URLError

import pytest
import torch

from epg_fast.evaluation.dinov2 import Dinov2Network

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (5, 3, 16, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Means(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double().mean(dim=(2, 3)) / 255


class FakeExtractor(torch.nn.Module):
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
    module = types.ModuleType("torch_fidelity.feature_extractor_dinov2")
    module.FeatureExtractorDinoV2 = FakeExtractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_name_goes_through_torch_fidelity_and_is_told_from_others_by_its_weights(torch_fidelity, monkeypatch):
    network = Dinov2Network("dinov2-vit-l-14", CPU)
    features = network.features(IMAGES)
    assert features.dtype == torch.float32 and torch.equal(features, IMAGES.float().mean(dim=(2, 3)) * 2)
    digest = hashlib.sha256(b"\nscale torch.float32 []\n\0\0\0\x40").hexdigest()
    wanted = {"kind": "torch-fidelity", "path": "dinov2-vit-l-14", "sha256": digest, "num_features": 3}
    assert network.description == wanted


def test_a_torchscript_file_maps_images_to_features(tmp_path):
    path = tmp_path / "dinov2.pt"
    torch.jit.script(Means()).save(path)
    network = Dinov2Network(path, CPU)
    features = network.features(IMAGES)
    assert features.dtype == torch.float32 and torch.equal(features, (IMAGES.double().mean(dim=(2, 3)) / 255).float())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert network.description == {"kind": "torchscript", "path": str(path), "sha256": digest, "num_features": 3}


def test_what_is_no_network_is_refused_with_what_would_be(tmp_path, tiny_inception):
    path = tmp_path / "dinov2.pt"
    with pytest.raises(ValueError, match=r"dinov2: dinov2-vit-x-14 is not a file; wanted one of dinov2-vit-s-14, .*"):
        Dinov2Network("dinov2-vit-x-14", CPU)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no TorchScript; wanted one of .*, or a TorchScript file that maps uint8"):
        Dinov2Network(path, CPU)
    with pytest.raises(ValueError, match=r"expected features \[2, D\], got \[2, 3, 32, 32\]"):
        torch.jit.script(torch.nn.Identity()).save(path)
        Dinov2Network(path, CPU)
    with pytest.raises(ValueError, match="cannot be called like DINOv2"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
        Dinov2Network(path, CPU)


@pytest.mark.parametrize("fails", [RuntimeError("no internet\nconnection"), URLError("unknown host")])
def test_a_hub_without_network_or_copy_is_answered_with_how_to_get_one(torch_fidelity, monkeypatch, fails):
    monkeypatch.setattr(FakeExtractor, "fails", fails)
    with pytest.raises(ValueError, match=r"gives no dinov2-vit-b-14 \(.*\); run `python .*'dinov2_vitb14'") as error:
        Dinov2Network("dinov2-vit-b-14", CPU)
    assert torch.hub.get_dir() in str(error.value) and "\n" not in str(error.value)


def test_a_missing_torch_fidelity_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_dinov2", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'epg_fast\[eval\]'"):
        Dinov2Network("dinov2-vit-l-14", CPU)


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
        Dinov2Network("dinov2-vit-l-14", CPU)
    assert f"needs the torchvision that belongs to torch {torch.__version__} ({reason}" in str(error.value)
