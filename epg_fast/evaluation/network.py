"""A frozen network that turns images into features: what Inception and DINOv2 have in common."""

from __future__ import annotations

import abc
import contextlib
import os
import warnings
import zipfile
from collections.abc import Iterator

import torch

from epg_fast.runtime import float32_products


class ImageNetwork(abc.ABC):
    """A network that turns images into features, in float32 without TF32, deterministic, on one device.

    `kind`: what runs it. `num_features`: width of the features. `description`: kind, path (its file, or the name by
    which it was asked for), SHA-256 of its weights and width, as JSON holds it.
    """

    title: str
    wanted: str
    """Its name, and what would be accepted: for errors."""
    note = ""
    """What a reader of its figures has to know, a sentence."""

    def __init__(self, path: str | os.PathLike, device: torch.device, kind: str, sha256: str):
        self.path, self.device, self.kind = path, device, kind
        self.num_features = self._try_out()
        self.description = {"kind": kind, "path": str(path), "sha256": sha256, "num_features": self.num_features}

    @abc.abstractmethod
    def _call(self, images: torch.Tensor) -> torch.Tensor:
        """Features of uint8 [N, 3, H, W], both on the network's device."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 [N, D] on the CPU of `images` uint8 [N, 3, H, W]. Raises ValueError unless finite."""
        with full_float32():
            features = self._call(images.to(self.device))
        return self._checked(features, len(images), "features")

    def _checked(self, output: torch.Tensor, num: int, name: str) -> torch.Tensor:
        if output.ndim != 2 or len(output) != num:
            raise ValueError(f"{self.path}: expected {name} [{num}, D], got {list(output.shape)}; {self.wanted}")
        output = output.float().cpu()
        if not output.isfinite().all():
            raise ValueError(
                f"{self.path}: {name} are not finite; the file is damaged or not {self.title}: {self.wanted}"
            )
        return output

    def _try_out(self) -> int:
        images = torch.arange(2 * 3 * 32 * 32).remainder(256).to(torch.uint8).view(2, 3, 32, 32)
        try:
            return self._width(images)
        except torch.OutOfMemoryError:
            raise
        # TorchScript raises RuntimeError for arguments that it does not know and for whatever fails inside.
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{self.path} cannot be called like {self.title} ({reason}); {self.wanted}") from error

    def _width(self, images: torch.Tensor) -> int:
        return self.features(images).shape[1]


def is_torchscript(path: str | os.PathLike) -> bool:
    """Whether a file is a TorchScript archive, by what it holds."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        # torch.save writes a zip as well, but only TorchScript holds code.
        return any("/code/" in name for name in archive.namelist())


def load_torchscript(path: str | os.PathLike, device: torch.device, wanted: str) -> torch.jit.ScriptModule:
    """Return the network in a TorchScript file, in eval mode. Raises ValueError for a damaged one."""
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated, but it is what the file is.
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(os.fspath(path), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path}: damaged TorchScript ({str(error).splitlines()[0]}); {wanted}") from error


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No gradients and no TF32, which cuDNN uses for convolutions unless told otherwise."""
    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.no_grad(), float32_products(), flags:
        yield
