"""Frozen networks that turn images into features, from files that the user has.

Inception, of FID, Inception Score and precision/recall. Two files hold the network of TensorFlow's
inception-2015-12-05, on which published figures rest, and both resize images to 299 x 299 as its graph does:

- `inception-2015-12-05.pt` of StyleGAN2-ada, TorchScript that is called with uint8 images [N, 3, H, W]:
  `return_features=True` gives pool features, `no_output_bias=True` class probabilities.
- `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity, a state dict for its `FeatureExtractorInceptionV3`.

DINOv2, of FD-DINOv2 (Stein et al., "Exposing flaws of generative model evaluation metrics and their unfair treatment of
diffusion models", 2023, with ViT-L/14):

- `dinov2-vit-s-14`, `-b-14`, `-l-14` or `-g-14`: through torch-fidelity's `FeatureExtractorDinoV2`, which takes code
  and weights from torch.hub: without a network from its folder, once they are there. It resizes to 224 x 224
  bilinearly, without antialiasing, as it does for Inception.
- a TorchScript file that is called with uint8 images [N, 3, H, W] and gives features [N, D]. So other resizing, such as
  the antialiased bicubic one of Stein et al., is possible: figures of different resizing are not comparable.
"""

from __future__ import annotations

import abc
import contextlib
import os
import warnings
import zipfile
from collections.abc import Iterator
from types import ModuleType

import torch

from epg_fast.files import file_sha256
from epg_fast.models.weight_files import state_sha256
from epg_fast.runtime import float32_products
from epg_fast.wording import import_extra

HUB = {f"dinov2-vit-{size}-14": f"dinov2_vit{size}14" for size in "sblg"}
_INCEPTION = (
    "wanted NVIDIA's inception-2015-12-05.pt (TorchScript; the .pkl of the same name is not read) or torch-fidelity's "
    "weights-inception-2015-12-05-6726825d.pth"
)
_DINOV2 = f"wanted one of {', '.join(HUB)}, or a TorchScript file that maps uint8 images [N, 3, H, W] to features"


class ImageNetwork(abc.ABC):
    """A network in float32 without TF32, deterministic, on one device.

    `kind`: what runs it, `torchscript` or `torch-fidelity`. `num_features`: width of the features. `description`: kind,
    path (its file, or the name by which it was asked for), SHA-256 of its weights and width, as JSON holds it.
    """

    title: str
    wanted: str
    """Its name, and what would be accepted: for errors."""
    note = ""
    """What a reader of its figures has to know, a sentence."""

    def __init__(self, path: str | os.PathLike, device: torch.device, kind: str, net: torch.nn.Module, sha256: str):
        self.path, self.device, self.kind, self._net = path, device, kind, net
        images = torch.arange(2 * 3 * 32 * 32).remainder(256).to(torch.uint8).view(2, 3, 32, 32)
        try:
            self.num_features = self.rows(images)["features"].shape[1]
        except torch.OutOfMemoryError:
            raise
        # TorchScript raises RuntimeError for arguments that it does not know and for whatever fails inside.
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{path} cannot be called like {self.title} ({reason}); {self.wanted}") from error
        self.description = {"kind": kind, "path": str(path), "sha256": sha256, "num_features": self.num_features}

    @abc.abstractmethod
    def _call(self, images: torch.Tensor) -> torch.Tensor:
        """Features of uint8 [N, 3, H, W], both on the network's device."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 [N, D] on the CPU of `images` uint8 [N, 3, H, W]. Raises ValueError unless finite."""
        with full_float32():
            return self._checked(self._call(images.to(self.device)), len(images), "features")

    def rows(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """All that is kept of images: `features`, and whatever else the network says."""
        return {"features": self.features(images)}

    def _checked(self, output: torch.Tensor, num: int, name: str) -> torch.Tensor:
        if output.ndim != 2 or len(output) != num:
            raise ValueError(f"{self.path}: expected {name} [{num}, D], got {list(output.shape)}; {self.wanted}")
        output = output.float().cpu()
        if not output.isfinite().all():
            raise ValueError(
                f"{self.path}: {name} are not finite; the file is damaged or not {self.title}: {self.wanted}"
            )
        return output


class Inception(ImageNetwork):
    """Inception: 2048 features, and class probabilities.

    Raises ValueError for a file that is neither of the two, ImportError with the command to run when it needs
    torch-fidelity.
    """

    title, wanted = "Inception", _INCEPTION

    def __init__(self, path: str | os.PathLike, device: torch.device):
        if not os.path.isfile(path):
            raise ValueError(f"inception: {path} is not a file; {_INCEPTION}")
        if _is_torchscript(path):
            kind, net = "torchscript", _load_torchscript(path, device, _INCEPTION)
        else:
            kind, net = "torch-fidelity", _inception_of_torch_fidelity(path).to(device).eval()
        super().__init__(path, device, kind, net, file_sha256(path))

    def _call(self, images):
        return self._net(images, return_features=True) if self.kind == "torchscript" else self._net(images)[0]

    def rows(self, images):
        """`features`, and `probabilities` of the classes: float32 [N, C], softmax without the output's bias."""
        on_device = images.to(self.device)
        with full_float32():
            if self.kind == "torchscript":
                features, probabilities = self._call(on_device), self._net(on_device, no_output_bias=True)
            else:
                features, logits = self._net(on_device)
                probabilities = logits.softmax(dim=1)
        features = self._checked(features, len(images), "features")
        probabilities = self._checked(probabilities, len(images), "probabilities")
        if probabilities.min() < 0 or (probabilities.sum(dim=1) - 1).abs().max() > 1e-3:
            raise ValueError(f"{self.path}: the class probabilities do not add up to 1; {_INCEPTION}")
        return {"features": features, "probabilities": probabilities}


class Dinov2(ImageNetwork):
    """DINOv2: features, of which the four sizes have 384, 768, 1024 and 1536.

    The SHA-256 of a named network is that of its state dict. Raises ValueError for what is neither a name nor a file,
    and where torch.hub can get it nowhere, ImportError with the command to run when it needs torch-fidelity.
    """

    title, wanted = "DINOv2", _DINOV2

    def __init__(self, network: str | os.PathLike, device: torch.device):
        if os.fspath(network) in HUB:
            self.note = " Images are resized bilinearly by torch-fidelity: published figures of other resizing differ."
            net = _dinov2_of_torch_fidelity(os.fspath(network)).to(device).eval()
            super().__init__(network, device, "torch-fidelity", net, state_sha256(net))
            return
        if not os.path.isfile(network) or not _is_torchscript(network):
            what = "no TorchScript" if os.path.isfile(network) else "not a file"
            raise ValueError(f"dinov2: {network} is {what}; {_DINOV2}")
        net = _load_torchscript(network, device, _DINOV2)
        super().__init__(network, device, "torchscript", net, file_sha256(network))

    def _call(self, images):
        output = self._net(images)
        return output[0] if self.kind == "torch-fidelity" else output


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No gradients and no TF32, which cuDNN uses for convolutions unless told otherwise."""
    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    # TorchScript's profiling would rewrite a network between the first batches and round them otherwise.
    with torch.no_grad(), float32_products(), flags, torch.jit.optimized_execution(False):
        yield


def _is_torchscript(path: str | os.PathLike) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        # torch.save writes a zip as well, but only TorchScript holds code.
        return any("/code/" in name for name in archive.namelist())


def _load_torchscript(path: str | os.PathLike, device: torch.device, wanted: str) -> torch.jit.ScriptModule:
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated, but it is what the file is.
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(os.fspath(path), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path}: damaged TorchScript ({str(error).splitlines()[0]}); {wanted}") from error


def _inception_of_torch_fidelity(path: str | os.PathLike) -> torch.nn.Module:
    """Torch-fidelity unpickles whatever the file holds: it sees nothing but tensors under Inception's names."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    # PyTorch's own text would advise to unpickle the file after all; of bytes that are no pickle it runs into anything.
    except Exception as error:
        raise ValueError(f"{path} is neither TorchScript nor a state dict; {_INCEPTION}") from error
    names = {"Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch1x1.conv.weight", "fc.weight"}
    if not isinstance(weights, dict) or not names <= weights.keys():
        found = list(weights)[:3] if isinstance(weights, dict) else type(weights).__name__
        raise ValueError(f"{path} holds no weights of Inception (found {found}); {_INCEPTION}")
    module = _import_torch_fidelity("feature_extractor_inceptionv3")
    try:
        return module.FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=os.fspath(path)
        )
    except RuntimeError as error:
        raise ValueError(f"{path}: torch-fidelity does not accept it ({_short(error)}); {_INCEPTION}") from error


def _dinov2_of_torch_fidelity(name: str) -> torch.nn.Module:
    module = _import_torch_fidelity("feature_extractor_dinov2")
    try:
        return module.FeatureExtractorDinoV2(name, ["dinov2"])
    # RuntimeError where torch.hub has no copy, OSError where it has the code but not the weights, the others from code
    # that is another one's.
    except (OSError, RuntimeError, ImportError, AttributeError) as error:
        raise ValueError(
            f'dinov2: torch.hub gives no {name} ({_short(error)}); run `python -c "import torch; '
            f"torch.hub.load('facebookresearch/dinov2', '{HUB[name]}')\"` where there is a network and copy its "
            f"~/.cache/torch/hub to {torch.hub.get_dir()}, or give a TorchScript file"
        ) from error


def _import_torch_fidelity(module: str) -> ModuleType:
    """A module of torch-fidelity. Raises ImportError with what to install, torchvision's failures included."""
    try:
        return import_extra(f"torch_fidelity.{module}")
    # A torchvision that was built for another torch fails with RuntimeError or OSError, wherever the two disagree.
    except (ImportError, RuntimeError, OSError) as error:
        if "torchvision" not in f"{error}{getattr(error, 'path', '')}":
            raise
        raise ImportError(
            f"torch-fidelity needs the torchvision that belongs to torch {torch.__version__} "
            f"({str(error).splitlines()[0]}): pip install torchvision from the index which that torch came from, for "
            "CPU builds with --index-url https://download.pytorch.org/whl/cpu"
        ) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
