"""One Euler step of the probability-flow ODE, from noise level sigma to sigma_next.

    d = (x - clamp(denoised, lo, hi)) / sigma
    x_next = x + (sigma_next - sigma) * d

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), algorithm 1 without
its second-order correction.

Dtypes: reference: any floating dtype; extension: float32, contiguous.
Error: the extension evaluates in this order with IEEE division and no fused multiply-add: on a CPU it equals the
reference bit for bit, on CUDA (where PyTorch multiplies by 1/sigma) it is within 2x the reference's float32 error.
"""

import math
from collections.abc import Callable

import torch

from epg_fast.ops.backends import check_backend, needs_gradient, refuse_transforms
from epg_fast.ops.extension import require_extension
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
    in_place, extension = op.endswith("_"), backend == "extension"
    if levels[0] == 0:
        raise ValueError(f"{op}: got sigma=0, wanted a level above 0; leave the final 0 out of the loop's start points")
    if in_place and x.requires_grad:
        remedy = op.removesuffix("_")
        raise ValueError(f"{op}: got x that requires a gradient, which a step in place would lose; use {remedy}")
    if extension:
        refuse_transforms(op)
    for name, tensor in {"x": x, **estimates}.items():
        if reason := _unlike(tensor, x, in_place) or (extension and _not_taken(tensor, x)):
            raise ValueError(f"{op}: got {name} {reason}")
        # Where torch.compile traces there is no address: the operator checks again.
        writes = in_place and extension and not torch.compiler.is_compiling()
        if writes and 0 < abs(tensor.data_ptr() - x.data_ptr()) < x.nbytes:
            raise ValueError(
                f"{op}: got x that overlaps part of {name} in memory, wanted them apart or the same; pass "
                f"{name}.clone()"
            )
    if not extension:
        stepped = reference(x, *estimates.values(), *levels, clamp)
        return x.copy_(stepped) if in_place else stepped
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


def _unlike(tensor: torch.Tensor, x: torch.Tensor, in_place: bool) -> str | None:
    """What is wrong with a tensor, if anything is: in place x takes the result as it is."""
    if tensor.shape != x.shape:
        return f"of shape {tuple(tensor.shape)}, wanted {tuple(x.shape)} as x"
    if in_place and tensor.device != x.device:
        return f"on {tensor.device} and x on {x.device}, wanted one device"
    if in_place and tensor.dtype != x.dtype:
        return f"in {tensor.dtype}, wanted {x.dtype} as x; convert it"
    return None


def _not_taken(tensor: torch.Tensor, x: torch.Tensor) -> str | None:
    """What the extension does not take of a tensor."""
    plain = "or use backend='plain'"
    if tensor.dtype != torch.float32:
        return f"in {tensor.dtype}, wanted torch.float32 for backend='extension'; convert it {plain}"
    if not tensor.is_contiguous():
        return f"with strides {tensor.stride()}, wanted it contiguous; call .contiguous() {plain}"
    if tensor.device != x.device:
        return f"on {tensor.device} and x on {x.device}, wanted one device; move it there {plain}"
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        return f"with a tangent, which backend='extension' does not carry on; leave it out {plain}"
    if needs_gradient(tensor):
        return f"that requires a gradient, which backend='extension' has not; use torch.no_grad() {plain}"
    return None


def _clamp_bounds(op: str, clamp: tuple[float, float] | None) -> tuple[float | None, float | None]:
    """The bounds as the extension takes them."""
    lo, hi = clamp or (None, None)
    if any(isinstance(bound, torch.Tensor) or (bound is not None and math.isnan(bound)) for bound in (lo, hi)):
        raise ValueError(
            f"{op}: got clamp={clamp}, wanted two numbers for backend='extension'; clamp denoised first or use "
            "backend='plain'"
        )
    return lo, hi


SPEC = OpSpec(
    name="euler_step",
    shapes=((64, 3, 256, 256), (1, 3, 256, 256), (64, 3, 512, 512)),
    odd_shapes=((5, 3, 7, 11), (3,), (1,), (1, 3, 8, 8), (3, 17, 257)),
    bytes=lambda shape, itemsize: 3 * itemsize * math.prod(shape),  # x and denoised are read, the result is written
)
