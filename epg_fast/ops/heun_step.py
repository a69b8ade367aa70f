"""Heun's second half: the corrected step of the probability-flow ODE, from noise level sigma to sigma_next.

    d = (x - clamp(denoised, lo, hi)) / sigma
    ahead = x + (sigma_next - sigma) * d
    d_next = (ahead - clamp(denoised_next, lo, hi)) / sigma_next
    x_next = x + (sigma_next - sigma) * (d + d_next) / 2

denoised is the estimate at (x, sigma), denoised_next the one at (ahead, sigma_next), where ahead is what `euler_step`
returned. d and ahead are computed again instead of being kept: that costs no memory traffic.

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), algorithm 1 for
sigma(t) = t, which is algorithm 2 without churn; SPEC 7.

Dtypes: reference: any floating dtype; extension: float32, contiguous.
Error: the extension evaluates in this order with IEEE division and no fused multiply-add: on a CPU it equals the
reference bit for bit, on CUDA (where PyTorch multiplies by 1/sigma) it is within 2x the reference's float32 error.
"""

import math

import torch

from epg_fast.ops.euler_step import take_step
from epg_fast.ops.spec import OpSpec


def heun_step_ref(x, denoised, denoised_next, sigma, sigma_next, clamp=None) -> torch.Tensor:
    """`heun_step` in plain PyTorch."""
    if clamp is not None:
        denoised, denoised_next = denoised.clamp(*clamp), denoised_next.clamp(*clamp)
    d = (x - denoised) / sigma
    ahead = x + (sigma_next - sigma) * d
    d_next = (ahead - denoised_next) / sigma_next
    return x + (sigma_next - sigma) * (d + d_next) / 2


def heun_step(
    x: torch.Tensor,
    denoised: torch.Tensor,
    denoised_next: torch.Tensor,
    sigma: float,
    sigma_next: float,
    clamp: tuple[float, float] | None = None,
    backend: str = "plain",
) -> torch.Tensor:
    """Heun's corrected step from sigma to sigma_next; returns a new tensor shaped like x.

    x: the state at sigma; denoised: the estimate there; denoised_next: the estimate at the state that `euler_step`
    reaches at sigma_next; all of one shape. sigma, sigma_next: floats, both shifted or both unshifted; clamp: (lo, hi)
    for both estimates. backend: "plain" (plain PyTorch), "extension" (one pass in C++ or CUDA; float32, contiguous,
    no autograd).
    Raises ValueError for shapes that differ, for sigma or sigma_next = 0 and for a backend that cannot run here.
    """
    return _take("heun_step", x, denoised, denoised_next, sigma, sigma_next, clamp, backend)


def heun_step_(
    x: torch.Tensor,
    denoised: torch.Tensor,
    denoised_next: torch.Tensor,
    sigma: float,
    sigma_next: float,
    clamp: tuple[float, float] | None = None,
    backend: str = "plain",
) -> torch.Tensor:
    """`heun_step` in place: overwrites x with the step and returns it.

    Arguments as for `heun_step`; an estimate may be x itself, but must not overlap a part of it.
    Raises ValueError as `heun_step` does, and on every backend for tensors of different dtypes or on different devices
    and for an x that requires a gradient.
    """
    return _take("heun_step_", x, denoised, denoised_next, sigma, sigma_next, clamp, backend)


def _take(op, x, denoised, denoised_next, sigma, sigma_next, clamp, backend) -> torch.Tensor:
    if sigma_next == 0:
        raise ValueError(f"{op}: got sigma_next=0, wanted a level above 0; take `euler_step` for the step to 0")
    estimates = {"denoised": denoised, "denoised_next": denoised_next}
    return take_step(op, heun_step_ref, x, estimates, (sigma, sigma_next), clamp, backend)


SPEC = OpSpec(
    name="heun_step",
    shapes=((64, 3, 256, 256), (1, 3, 256, 256), (64, 3, 512, 512)),
    odd_shapes=((5, 3, 7, 11), (3,), (1,), (1, 3, 8, 8), (3, 17, 257)),
    bytes=lambda shape, itemsize: 4 * itemsize * math.prod(shape),  # x and both estimates, and the result
    built_from=("euler_step",),
)
