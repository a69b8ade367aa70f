"""One Euler step of the probability-flow ODE, from noise level sigma to sigma_next.

    d = (x - clamp(denoised, lo, hi)) / sigma
    x_next = x + (sigma_next - sigma) * d

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), algorithm 1 without
its second-order correction.

Shapes: x, denoised: any shape, the same. sigma, sigma_next: Python floats, both shifted or both unshifted.
Dtypes: reference: any floating dtype; extension: float32, contiguous.
Error: the extension evaluates in this order with IEEE division and no fused multiply-add: on a CPU it equals the
reference bit for bit, on CUDA (where PyTorch multiplies by 1/sigma) it is within 2x the reference's float32 error.
"""

import math

import torch

from epg_fast.ops.backends import check_backend
from epg_fast.ops.extension import require_extension, require_extension_tensors, require_no_partial_overlap
from epg_fast.ops.spec import OpSpec


def euler_step_ref(
    x: torch.Tensor,
    denoised: torch.Tensor,
    sigma: float,
    sigma_next: float,
    clamp: tuple[float, float] | None = None,
) -> torch.Tensor:
    """The formula in plain PyTorch, out of place."""
    if clamp is not None:
        denoised = denoised.clamp(*clamp)
    d = (x - denoised) / sigma
    return x + (sigma_next - sigma) * d


def euler_step(
    x: torch.Tensor,
    denoised: torch.Tensor,
    sigma: float,
    sigma_next: float,
    clamp: tuple[float, float] | None = None,
    backend: str = "plain",
) -> torch.Tensor:
    """One Euler step from sigma to sigma_next; returns a new tensor shaped like x.

    x, denoised: the same shape; sigma, sigma_next: floats, both shifted or both unshifted; clamp: (lo, hi) for the
    denoised estimate. backend: "plain" (plain PyTorch), "extension" (one pass in C++ or CUDA; float32, contiguous,
    no autograd).
    Raises ValueError for shapes that differ, for sigma = 0 and for a backend that cannot run here.
    """
    check_backend("euler_step", backend, ("plain", "extension"))
    check_step("euler_step", x, sigma, denoised=denoised)
    if backend != "extension":
        return euler_step_ref(x, denoised, sigma, sigma_next, clamp)
    require_extension_tensors("euler_step", x=x, denoised=denoised)
    lo, hi = clamp_bounds("euler_step", clamp)
    require_extension("euler_step", x)
    out = torch.empty_like(x)
    torch.ops.epg_fast.euler_step_out(out, x, denoised, sigma, sigma_next, lo, hi)
    return out


def euler_step_(
    x: torch.Tensor,
    denoised: torch.Tensor,
    sigma: float,
    sigma_next: float,
    clamp: tuple[float, float] | None = None,
    backend: str = "plain",
) -> torch.Tensor:
    """`euler_step` in place: overwrites x with the step and returns it.

    Arguments as for `euler_step`; denoised may be x itself, but must not overlap a part of it.
    Raises ValueError as `euler_step` does, and on every backend for tensors of different dtypes or on different devices
    and for an x that requires a gradient.
    """
    check_backend("euler_step_", backend, ("plain", "extension"))
    check_step("euler_step_", x, sigma, denoised=denoised)
    check_in_place("euler_step_", x, denoised=denoised)
    if backend != "extension":
        return x.copy_(euler_step_ref(x, denoised, sigma, sigma_next, clamp))
    require_extension_tensors("euler_step_", x=x, denoised=denoised)
    require_no_partial_overlap("euler_step_", "x", x, denoised=denoised)
    lo, hi = clamp_bounds("euler_step_", clamp)
    require_extension("euler_step", x)
    torch.ops.epg_fast.euler_step_(x, denoised, sigma, sigma_next, lo, hi)
    mark_written(x)
    return x


def check_step(op: str, x: torch.Tensor, sigma: float, **estimates: torch.Tensor) -> None:
    """What every sampler step asks: estimates shaped like x, and a level to divide by."""
    for name, tensor in estimates.items():
        if x.shape != tensor.shape:
            raise ValueError(f"{op}: got {name} of shape {tuple(tensor.shape)}, wanted {tuple(x.shape)} as x")
    if sigma == 0:
        raise ValueError(f"{op}: got sigma=0, wanted a level above 0; leave the final 0 out of the loop's start points")


def check_in_place(op: str, x: torch.Tensor, **estimates: torch.Tensor) -> None:
    """What a step in place asks as well: x can take the result as it is, and nobody needs x for a gradient."""
    for name, tensor in estimates.items():
        if tensor.device != x.device:
            raise ValueError(f"{op}: got {name} on {tensor.device} and x on {x.device}, wanted one device")
        if tensor.dtype != x.dtype:
            raise ValueError(f"{op}: got {name} in {tensor.dtype}, wanted {x.dtype} as x; convert it")
    if x.requires_grad:
        raise ValueError(
            f"{op}: got x that requires a gradient, which a step in place would lose; use {op.removesuffix('_')}"
        )


def clamp_bounds(op: str, clamp: tuple[float, float] | None) -> tuple[float | None, float | None]:
    """The bounds as the extension takes them."""
    if clamp is None:
        return None, None
    for bound in clamp:
        if isinstance(bound, torch.Tensor) or (bound is not None and math.isnan(bound)):
            raise ValueError(
                f"{op}: got clamp={clamp}, wanted two numbers for backend='extension'; clamp denoised first or use "
                "backend='plain'"
            )
    lo, hi = clamp
    return lo, hi


def mark_written(x: torch.Tensor) -> None:
    """Tell autograd that x changed, as PyTorch's own operations in place do: saved tensors are checked against it."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(x)


def _bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Read x and denoised, write the result."""
    return 3 * itemsize * torch.Size(shape).numel()


def _flops(shape: tuple[int, ...]) -> int:
    return 4 * torch.Size(shape).numel()


SPEC = OpSpec(
    name="euler_step",
    shapes=((64, 3, 256, 256), (1, 3, 256, 256), (64, 3, 512, 512)),
    odd_shapes=((1,), (3,), (1, 3, 8, 8), (5, 3, 7, 11), (3, 17, 257)),
    bytes=_bytes,
    flops=_flops,
)
