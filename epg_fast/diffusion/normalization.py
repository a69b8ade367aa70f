"""Pixels in [0,1] to network input and back (SPEC 1)."""

from __future__ import annotations

import torch

from epg_fast.wording import nearest

# name -> (mean, scale) per channel; ImageNet's scale is twice the standard deviation, so that the result has 0.5.
_CONSTANTS = {
    "imagenet": ((0.485, 0.456, 0.406), (2 * 0.229, 2 * 0.224, 2 * 0.225)),
    "simple": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class PixelNormalization:
    """The affine map `(x - mean) / scale` between pixels in [0,1] and network input (SPEC 1).

    `imagenet` has the ImageNet mean and twice its standard deviation, `simple` maps [0,1] to [-1,1].
    Raises ValueError for another name.
    """

    def __init__(self, name: str = "imagenet"):
        if name not in _CONSTANTS:
            wanted = ", ".join(_CONSTANTS)
            raise ValueError(f"normalization: got {name!r}{nearest(name, _CONSTANTS)}, wanted one of {wanted}")
        self.name = name
        mean, scale = _CONSTANTS[name]
        # by the dtype of a call, each rounded once
        self._by_dtype = {
            dtype: tuple(torch.tensor(values, dtype=dtype).view(1, 3, 1, 1) for values in (mean, scale))
            for dtype in (torch.float32, torch.float64)
        }

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Return network input for `images` [B, 3, H, W]: uint8, or floating point already in [0,1].

        The result is float32 (float64 for float64 input) on the same device. Another dtype or shape raises ValueError.
        """
        self._check_shape(images)
        if images.dtype == torch.uint8:
            images = images.to(torch.float32) / 255
        elif not images.is_floating_point():
            raise ValueError(f"images: got {images.dtype}, wanted uint8 or floating point in [0,1]; convert them first")
        mean, scale, images = self._constants(images)
        return (images - mean) / scale

    def denormalize(self, x: torch.Tensor) -> torch.Tensor:
        """Return pixels clipped to [0,1] for network-space `x` [B, 3, H, W]; float32, or float64 for float64 input."""
        self._check_shape(x)
        mean, scale, x = self._constants(x)
        return (x * scale + mean).clamp(0, 1)

    def to(self, device: torch.device | str) -> PixelNormalization:
        """Keep the constants on `device` from now on, so that no call copies them there; returns itself."""
        for dtype, constants in self._by_dtype.items():
            self._by_dtype[dtype] = tuple(values.to(device) for values in constants)
        return self

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the normalised values of black and of white: (low, high), float32 [1, 3, 1, 1] each."""
        mean, scale = self._by_dtype[torch.float64]
        return ((0 - mean) / scale).float(), ((1 - mean) / scale).float()

    def _constants(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, scale = (values.to(x.device) for values in self._by_dtype[dtype])
        return mean, scale, x.to(dtype)

    def _check_shape(self, x: torch.Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(
                f"images: got shape {list(x.shape)}, wanted [B, 3, H, W]; add the batch axis, channels second"
            )

    def __repr__(self) -> str:
        return f"PixelNormalization({self.name!r})"
