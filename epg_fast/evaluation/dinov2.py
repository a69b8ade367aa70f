"""The DINOv2 network of FD-DINOv2, by torch-fidelity's name or from a TorchScript file.

- `dinov2-vit-s-14`, `-b-14`, `-l-14` or `-g-14`: through torch-fidelity's `FeatureExtractorDinoV2`, which takes code
  and weights from torch.hub: without a network from its folder, once they are there. It resizes to 224 x 224
  bilinearly, without antialiasing, as it does for Inception.
- a TorchScript file that is called with uint8 images [N, 3, H, W] and gives features [N, D]. So other resizing, such as
  the antialiased bicubic one of Stein et al., is possible: figures of different resizing are not comparable.

Source of the figure: Stein et al., "Exposing flaws of generative model evaluation metrics and their unfair treatment of
diffusion models", 2023, with ViT-L/14.
"""

from __future__ import annotations

import os

import torch

from epg_fast.evaluation.extras import import_torch_fidelity
from epg_fast.evaluation.network import ImageNetwork, is_torchscript, load_torchscript
from epg_fast.files import file_sha256
from epg_fast.models.weight_files import state_sha256

HUB = {f"dinov2-vit-{size}-14": f"dinov2_vit{size}14" for size in "sblg"}
_WANTED = f"wanted one of {', '.join(HUB)}, or a TorchScript file that maps uint8 images [N, 3, H, W] to features"


class Dinov2Network(ImageNetwork):
    """DINOv2: features, of which the four sizes have 384, 768, 1024 and 1536.

    `network`: a name or a path, as above. `kind`: `torch-fidelity` or `torchscript`. `description` holds the SHA-256 of
    the file, and of a named network that of its state dict (see `state_sha256`). Raises ValueError for what is neither
    and where torch.hub can get it nowhere, ImportError with the command to run when it needs torch-fidelity.
    """

    title, wanted = "DINOv2", _WANTED

    def __init__(self, network: str | os.PathLike, device: torch.device):
        if os.fspath(network) in HUB:
            self._net = _from_hub(os.fspath(network)).to(device).eval()
            self.note = " Images are resized bilinearly by torch-fidelity: published figures of other resizing differ."
            super().__init__(network, device, "torch-fidelity", state_sha256(self._net))
            return
        if not os.path.isfile(network):
            raise ValueError(f"dinov2: {network} is not a file; {_WANTED}")
        if not is_torchscript(network):
            raise ValueError(f"dinov2: {network} is no TorchScript; {_WANTED}")
        self._net = load_torchscript(network, device, _WANTED)
        super().__init__(network, device, "torchscript", file_sha256(network))

    def _call(self, images: torch.Tensor) -> torch.Tensor:
        # As for Inception: profiling would round the first batches otherwise.
        with torch.jit.optimized_execution(False):
            output = self._net(images)
        return output[0] if self.kind == "torch-fidelity" else output


def _from_hub(name: str) -> torch.nn.Module:
    module = import_torch_fidelity("feature_extractor_dinov2")
    try:
        return module.FeatureExtractorDinoV2(name, ["dinov2"])
    # RuntimeError where torch.hub has no copy, OSError where it has the code but not the weights, the others from code
    # that is another one's.
    except (OSError, RuntimeError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f'dinov2: torch.hub gives no {name} ({reason}); run `python -c "import torch; '
            f"torch.hub.load('facebookresearch/dinov2', '{HUB[name]}')\"` where there is a network and copy its "
            f"~/.cache/torch/hub to {torch.hub.get_dir()}, or give a TorchScript file"
        ) from error
