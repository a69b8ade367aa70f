"""The scale that keeps the gradients of fp16 training in range."""

from __future__ import annotations

import torch


class LossScale:
    """Dynamic loss scale of fp16 training, on the device: grows slowly, halved by a gradient that is not finite.

    The released configuration: 2^14 at first, times 2^(1/1000) per step; never below 1, from where nothing is gained.
    `value` is [] float32, None when switched off.
    """

    def __init__(self, device: torch.device, enabled: bool):
        self.value = torch.full((), 2.0**14, device=device) if enabled else None

    def __call__(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call backward on."""
        return loss if self.value is None else loss * self.value

    def update(self, found_inf: torch.Tensor) -> None:
        """Adapt to the outcome of a step."""
        if self.value is not None:
            value = self.value.double()
            changed = torch.where(found_inf > 0, value * 0.5, value * 2.0**0.001)
            self.value.copy_(changed.clamp(1.0, torch.finfo(torch.float32).max / 2))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The live tensor; empty when switched off."""
        return {} if self.value is None else {"scale": self.value}
