"""The denoiser D(x, sigma): preconditioning around a network (SPEC 2). Every sigma here is SHIFTED (times H/64)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from epg_fast.diffusion.schedule import NoiseSchedule, shift
from epg_fast.models import EPGViT
from epg_fast.models.blocks import is_plain
from epg_fast.models.generator import unpatchify
from epg_fast.ops import patch_loss, patchify
from epg_fast.ops.backends import accumulation_dtype

PARAMETERIZATIONS = ("x0", "edm")


@dataclass
class PatchEstimate:
    """The clean estimate scale * tokens + offset_scale * patchify(offset) in patch space, where a loss takes it.

    tokens: [B,N,p*p*C], as an EPGViT leaves its output; offset: [B,C,H,W]; scale, offset_scale: [B]. None: 1, and no
    offset.
    """

    tokens: torch.Tensor
    patch_size: int
    backend: str = "plain"
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    offset_scale: torch.Tensor | None = None

    def loss(self, target: torch.Tensor, weight: torch.Tensor, huber_c: float | None = None):
        """`patch_loss` of the estimate: (weighted loss [B], squared distance [B]) to an image or to patches."""
        parts = {"scale": self.scale, "offset": self.offset, "offset_scale": self.offset_scale}
        return patch_loss(self.tokens, target, **parts, weight=weight, huber_c=huber_c, backend=self.backend)

    def patches(self) -> torch.Tensor:
        """The estimate itself: [B,N,p*p*C], at least float32."""
        tokens = self.tokens.to(accumulation_dtype(self.tokens))
        if self.scale is None:
            return tokens
        offset = spread(self.offset_scale, tokens) * patchify(self.offset, self.patch_size)
        return offset + spread(self.scale, tokens) * tokens

    def image(self) -> torch.Tensor:
        """The same as an image [B,C,H,W]."""
        return unpatchify(self.patches(), self.patch_size)


class Denoiser:
    """`Denoiser(network)(x, sigma, y)` estimates the clean image.

    network: callable (c_in * x [B,C,H,W], 250 ln sigma [B], y [B] or nothing) -> [B,C,H,W].
    parameterization: `x0`, the network's output is the clean image; `edm`, it is F in c_skip x + c_out F.
    """

    def __init__(self, network: Callable, schedule: NoiseSchedule | None = None, parameterization: str = "x0"):
        if parameterization not in PARAMETERIZATIONS:
            raise ValueError(f"parameterization {parameterization!r}: want one of {', '.join(PARAMETERIZATIONS)}")
        self.network = network
        self.schedule = schedule or NoiseSchedule()
        self.parameterization = parameterization

    def scalings(self, sigma: torch.Tensor, image_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_skip, c_out, c_in) at shifted sigma, each of its shape; D(x, sigma_min) = x in the edm form."""
        data, low = self.schedule.sigma_data, self.schedule.sigma_min * shift(image_size)
        total = (sigma**2 + data**2).sqrt()
        return data**2 / ((sigma - low) ** 2 + data**2), (sigma - low) * data / total, 1 / total

    def network_output(self, x: torch.Tensor, sigma: torch.Tensor | float, y: torch.Tensor | None = None):
        """The network's raw output at x [B,C,H,W] and sigma (number or [B]): [B,C,H,W], at least float32."""
        x, level = _with_level(x, sigma)
        x_in = spread(self.scalings(level, x.shape[-2])[2], x) * x
        return self.call_network(x_in, sigma, y).to(x.dtype)

    def call_network(self, x_in: torch.Tensor, sigma: torch.Tensor | float, y: torch.Tensor | None) -> torch.Tensor:
        """The network at c_in x [B,C,H,W], sigma (number or [B]) and labels y [B]: [B,C,H,W]."""
        t = time_condition(per_sample(sigma, x_in))
        return self.network(x_in, t) if y is None else self.network(x_in, t, y)

    def estimate(self, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor | None = None) -> PatchEstimate:
        """What `__call__` returns, in patch space: that of an EPGViT, of other networks one patch an image."""
        network, sigma = self.network, per_sample(sigma, x)
        if isinstance(network, EPGViT) and is_plain(network, EPGViT, subclass=True, hooks=True):
            tokens = network(*precondition(x, sigma, self.schedule), y, patches=True)
            estimate = PatchEstimate(tokens, network.patch_size, network.ops["loss"])
        else:
            size = x.shape[-1]
            estimate = PatchEstimate(patchify(self.network_output(x, sigma, y), size), size)
        if self.parameterization == "edm":
            c_skip, c_out, _ = self.scalings(sigma, x.shape[-2])
            estimate.scale, estimate.offset, estimate.offset_scale = c_out, x, c_skip
        return estimate

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor | float, y: torch.Tensor | None = None) -> torch.Tensor:
        """x: [B,C,H,W] noised with sigma (number or [B], shifted), y: [B] -> clean estimate, at least float32."""
        output = self.network_output(x, sigma, y)
        if self.parameterization == "x0":
            return output
        x, level = _with_level(x, sigma)
        c_skip, c_out, _ = self.scalings(level, x.shape[-2])
        return spread(c_skip, x) * x + spread(c_out, x) * output


def precondition(x: torch.Tensor, sigma: torch.Tensor, schedule: NoiseSchedule) -> tuple[torch.Tensor, torch.Tensor]:
    """What networks take for x [B,C,H,W] at shifted levels [B]: (c_in x, time condition [B])."""
    return spread(1 / (sigma**2 + schedule.sigma_data**2).sqrt(), x) * x, time_condition(sigma)


def time_condition(sigma: torch.Tensor) -> torch.Tensor:
    """What the networks are told of shifted levels: 250 ln sigma, of the same shape."""
    return 250 * sigma.log()


def per_sample(sigma: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
    """A number, or a tensor that expands to [B], as [B] on x's device in at least float32."""
    dtype = accumulation_dtype(x)
    if isinstance(sigma, torch.Tensor):
        return sigma.to(device=x.device, dtype=dtype).expand(x.shape[0])
    return torch.full((x.shape[0],), sigma, device=x.device, dtype=dtype)


def spread(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B] -> [B,1,...] to multiply x: [B,...]; a scalar stays one."""
    return values.view(-1, *[1] * (x.ndim - 1)) if values.ndim else values


def _with_level(x: torch.Tensor, sigma: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x in at least float32, sigma in its dtype): [B], or for a number a scalar on the CPU, which takes no kernel."""
    x = x.to(accumulation_dtype(x))
    return x, per_sample(sigma, x) if isinstance(sigma, torch.Tensor) else torch.full((), sigma, dtype=x.dtype)
