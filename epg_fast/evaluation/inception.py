"""The Inception network of FID, Inception Score and precision/recall, from a file that the user has.

Two files hold the network of TensorFlow's inception-2015-12-05, on which published figures rest:

- `inception-2015-12-05.pt` of StyleGAN2-ada, TorchScript that is called with uint8 images [N, 3, H, W]:
  `return_features=True` gives pool features, `no_output_bias=True` class probabilities.
- `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity, a state dict for its `FeatureExtractorInceptionV3`.

Both resize the images to 299 x 299 themselves, as the TensorFlow graph does.
"""

from __future__ import annotations

import contextlib
import os
import warnings
import zipfile
from collections.abc import Iterator

import torch

from epg_fast.evaluation.extras import import_extra
from epg_fast.evaluation.sources import sha256
from epg_fast.runtime import float32_products

_WANTED = (
    "wanted NVIDIA's inception-2015-12-05.pt (TorchScript; the .pkl of the same name is not read) or torch-fidelity's "
    "weights-inception-2015-12-05-6726825d.pth"
)


class FeatureNetwork:
    """A network that turns images into features and class probabilities, in float32 without TF32, on one device.

    `kind`: `torchscript` or `torch-fidelity`. `num_features`: width of the features (2048 in Inception).
    `description`: kind, path, SHA-256 of the file and width, as JSON holds it. Raises ValueError for a file that is
    neither of the two, ImportError with the command to run when it needs torch-fidelity.
    """

    def __init__(self, path: str | os.PathLike, device: torch.device):
        if not os.path.isfile(path):
            raise ValueError(f"inception: {path} is not a file; {_WANTED}")
        self.path, self.device = path, device
        self.kind = "torchscript" if _is_torchscript(path) else "torch-fidelity"
        self._network = (_TorchScript if self.kind == "torchscript" else _TorchFidelity)(path, device)
        self.num_features = self._try_out()
        self.description = {
            "kind": self.kind,
            "path": str(path),
            "sha256": sha256(path),
            "num_features": self.num_features,
        }

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 [N, D] on the CPU of `images` uint8 [N, 3, H, W]. Raises ValueError unless finite."""
        with _full_float32():
            features = self._network.features(images.to(self.device))
        return self._checked(features, len(images), "features")

    def features_and_probabilities(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(features as above, class probabilities float32 [N, C] on the CPU: softmax without the output's bias)."""
        with _full_float32():
            features, probabilities = self._network.both(images.to(self.device))
        features = self._checked(features, len(images), "features")
        probabilities = self._checked(probabilities, len(images), "probabilities")
        if probabilities.min() < 0 or (probabilities.sum(dim=1) - 1).abs().max() > 1e-3:
            raise ValueError(f"{self.path}: the class probabilities do not add up to 1; {_WANTED}")
        return features, probabilities

    def _checked(self, output: torch.Tensor, num: int, name: str) -> torch.Tensor:
        if output.ndim != 2 or len(output) != num:
            raise ValueError(f"{self.path}: expected {name} [{num}, D], got {list(output.shape)}; {_WANTED}")
        output = output.float().cpu()
        if not output.isfinite().all():
            raise ValueError(f"{self.path}: {name} are not finite; the file is damaged or not Inception: {_WANTED}")
        return output

    def _try_out(self) -> int:
        images = torch.arange(2 * 3 * 32 * 32, device=self.device).remainder(256).to(torch.uint8).view(2, 3, 32, 32)
        try:
            features, _ = self.features_and_probabilities(images)
        except torch.OutOfMemoryError:
            raise
        # TorchScript raises RuntimeError for arguments that it does not know and for whatever fails inside.
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{self.path} cannot be called like Inception ({reason}); {_WANTED}") from error
        return features.shape[1]


class _TorchScript:
    def __init__(self, path: str | os.PathLike, device: torch.device):
        try:
            with warnings.catch_warnings():
                # TorchScript is deprecated, but it is what the file is.
                warnings.simplefilter("ignore", FutureWarning)
                self._net = torch.jit.load(os.fspath(path), map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"{path}: damaged TorchScript ({str(error).splitlines()[0]}); {_WANTED}") from error

    def features(self, images: torch.Tensor) -> torch.Tensor:
        # Unoptimised: profiling would rewrite the network between the first batches and round them otherwise.
        with torch.jit.optimized_execution(False):
            return self._net(images, return_features=True)

    def both(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.jit.optimized_execution(False):
            return self._net(images, return_features=True), self._net(images, no_output_bias=True)


class _TorchFidelity:
    def __init__(self, path: str | os.PathLike, device: torch.device):
        _check_state_dict(path)
        module = import_extra("torch_fidelity.feature_extractor_inceptionv3")
        try:
            self._net = module.FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=os.fspath(path)
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: torch-fidelity does not accept it ({reason}); {_WANTED}") from error
        self._net.to(device).eval()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self._net(images)[0]

    def both(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features, logits = self._net(images)
        return features, logits.softmax(dim=1)


def _is_torchscript(path: str | os.PathLike) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        # torch.save writes a zip as well, but only TorchScript holds code.
        return any("/code/" in name for name in archive.namelist())


def _check_state_dict(path: str | os.PathLike) -> None:
    """Torch-fidelity unpickles whatever the file holds: let it see nothing but tensors under Inception's names."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    # PyTorch's own text would advise to unpickle the file after all; of bytes that are no pickle it runs into anything.
    except Exception as error:
        raise ValueError(f"{path} is neither TorchScript nor a state dict; {_WANTED}") from error
    names = {"Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch1x1.conv.weight", "fc.weight"}
    if not isinstance(weights, dict) or not names <= weights.keys():
        found = list(weights)[:3] if isinstance(weights, dict) else type(weights).__name__
        raise ValueError(f"{path} holds no weights of Inception (found {found}); {_WANTED}")


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No gradients and no TF32, which cuDNN uses for convolutions unless told otherwise."""
    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.no_grad(), float32_products(), flags:
        yield
