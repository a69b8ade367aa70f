"""The Inception network of FID, Inception Score and precision/recall, from a file that the user has.

Two files hold the network of TensorFlow's inception-2015-12-05, on which published figures rest:

- `inception-2015-12-05.pt` of StyleGAN2-ada, TorchScript that is called with uint8 images [N, 3, H, W]:
  `return_features=True` gives pool features, `no_output_bias=True` class probabilities.
- `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity, a state dict for its `FeatureExtractorInceptionV3`.

Both resize the images to 299 x 299 themselves, as the TensorFlow graph does.
"""

from __future__ import annotations

import os

import torch

from epg_fast.evaluation.extras import import_torch_fidelity
from epg_fast.evaluation.network import ImageNetwork, full_float32, is_torchscript, load_torchscript
from epg_fast.files import file_sha256

_WANTED = (
    "wanted NVIDIA's inception-2015-12-05.pt (TorchScript; the .pkl of the same name is not read) or torch-fidelity's "
    "weights-inception-2015-12-05-6726825d.pth"
)


class FeatureNetwork(ImageNetwork):
    """Inception: features, of which there are 2048, and class probabilities.

    `kind`: `torchscript` or `torch-fidelity`. Raises ValueError for a file that is neither of the two, ImportError with
    the command to run when it needs torch-fidelity.
    """

    title, wanted = "Inception", _WANTED

    def __init__(self, path: str | os.PathLike, device: torch.device):
        if not os.path.isfile(path):
            raise ValueError(f"inception: {path} is not a file; {_WANTED}")
        kind = "torchscript" if is_torchscript(path) else "torch-fidelity"
        self._network = (_TorchScript if kind == "torchscript" else _TorchFidelity)(path, device)
        super().__init__(path, device, kind, file_sha256(path))

    def features_and_probabilities(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(`features`, class probabilities float32 [N, C] on the CPU: softmax without the output's bias)."""
        with full_float32():
            features, probabilities = self._network.both(images.to(self.device))
        features = self._checked(features, len(images), "features")
        probabilities = self._checked(probabilities, len(images), "probabilities")
        if probabilities.min() < 0 or (probabilities.sum(dim=1) - 1).abs().max() > 1e-3:
            raise ValueError(f"{self.path}: the class probabilities do not add up to 1; {_WANTED}")
        return features, probabilities

    def _call(self, images: torch.Tensor) -> torch.Tensor:
        return self._network.features(images)

    def _width(self, images: torch.Tensor) -> int:
        return self.features_and_probabilities(images)[0].shape[1]


class _TorchScript:
    def __init__(self, path: str | os.PathLike, device: torch.device):
        self._net = load_torchscript(path, device, _WANTED)

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
        module = import_torch_fidelity("feature_extractor_inceptionv3")
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
