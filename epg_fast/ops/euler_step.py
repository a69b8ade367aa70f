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
from collections.abc import Callable

import torch

from epg_fast.ops.backends import check_backend
from epg_fast.ops.extension import require_extension, require_extension_tensors, require_no_partial_overlap
from epg_fast.ops.spec import OpSpec


def euler_step_ref(x, denoised, sigma, sigma_next, clamp=None) -> torch.Tensor:
    """`euler_step` in plain PyTorch."""
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
    return take_step("euler_step", euler_step_ref, x, {"denoised": denoised}, (sigma, sigma_next), clamp, backend)


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
    return take_step("euler_step_", euler_step_ref, x, {"denoised": denoised}, (sigma, sigma_next), clamp, backend)


def take_step(op: str, reference: Callable, x, estimates: dict, levels, clamp, backend: str) -> torch.Tensor:
    """A sampler's step by `reference` or by the extension's operator, in place if the name of `op` ends in "_"."""
    check_backend(op, backend, ("plain", "extension"))
    in_place = op.endswith("_")
    _check(op, x, levels[0], estimates, in_place)
    if backend != "extension":
        stepped = reference(x, *estimates.values(), *levels, clamp)
        return x.copy_(stepped) if in_place else stepped
    require_extension_tensors(op, x=x, **estimates)
    if in_place:
        require_no_partial_overlap(op, "x", x, **estimates)
    arguments = x, *estimates.values(), *levels, *_clamp_bounds(op, clamp)
    require_extension(op.removesuffix("_"), x)
    if not in_place:
        out = torch.empty_like(x)
        getattr(torch.ops.epg_fast, f"{op}_out")(out, *arguments)
        return out
    getattr(torch.ops.epg_fast, op)(*arguments)
    if not torch.compiler.is_compiling():
        # As PyTorch's own operations in place do: autograd checks saved tensors against it.
        torch.autograd.graph.increment_version(x)
    return x


def _check(op: str, x: torch.Tensor, sigma: float, estimates: dict[str, torch.Tensor], in_place: bool) -> None:
    """Estimates are shaped like x; in place x can take the result as it is, and nobody needs x for a gradient."""
    for name, tensor in estimates.items():
        if x.shape != tensor.shape:
            raise ValueError(f"{op}: got {name} of shape {tuple(tensor.shape)}, wanted {tuple(x.shape)} as x")
    if sigma == 0:
        raise ValueError(f"{op}: got sigma=0, wanted a level above 0; leave the final 0 out of the loop's start points")
    if not in_place:
        return
    for name, tensor in estimates.items():
        if tensor.device != x.device:
            raise ValueError(f"{op}: got {name} on {tensor.device} and x on {x.device}, wanted one device")
        if tensor.dtype != x.dtype:
            raise ValueError(f"{op}: got {name} in {tensor.dtype}, wanted {x.dtype} as x; convert it")
    if x.requires_grad:
        raise ValueError(
            f"{op}: got x that requires a gradient, which a step in place would lose; use {op.removesuffix('_')}"
        )


def _clamp_bounds(op: str, clamp: tuple[float, float] | None) -> tuple[float | None, float | None]:
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


def _bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Read x and denoised, write the result."""
    return 3 * itemsize * torch.Size(shape).numel()


def _flops(shape: tuple[int, ...]) -> int:
    return 4 * torch.Size(shape).numel()


SPEC = OpSpec(
    name="euler_step",
    shapes=((64, 3, 256, 256), (1, 3, 256, 256), (64, 3, 512, 512)),
    odd_shapes=((5, 3, 7, 11), (3,), (1,), (1, 3, 8, 8), (3, 17, 257)),
    bytes=_bytes,
    flops=_flops,
)
