"""One Euler step of the probability-flow ODE, from noise level sigma to sigma_next.

    d = (x - clamp(denoised, lo, hi)) / sigma
    x_next = x + d * (sigma_next - sigma)

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), algorithm 1 without
its second-order correction.

Shapes: x, denoised: any shape, the same. sigma, sigma_next: Python floats, both shifted or both unshifted.
Dtypes: reference: any floating dtype; extension: float32, contiguous.
Error: the extension evaluates in this order with IEEE division and no fused multiply-add: on a CPU it equals the
reference bit for bit, on CUDA (where PyTorch multiplies by 1/sigma) it is within 2x the reference's float32 error.
"""

import functools

import torch

from epg_fast.ops.backends import check_backend
from epg_fast.ops.extension import require_extension
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
    return x + d * (sigma_next - sigma)


# The schema and the CPU and CUDA implementations are registered by the extension (kernels/csrc) when it is loaded.
@torch.compiler.assume_constant_result
def _load_op(x: torch.Tensor) -> None:
    require_extension("euler_step", x)
    _register_fake()


@functools.cache
def _register_fake() -> None:
    @torch.library.register_fake("epg_fast::euler_step_out")
    def _(out, x, denoised, sigma, sigma_next, lo, hi):
        return None


def euler_step(
    x: torch.Tensor,
    denoised: torch.Tensor,
    sigma: float,
    sigma_next: float,
    clamp: tuple[float, float] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """One Euler step from sigma to sigma_next; returns a new tensor shaped like x.

    x, denoised: the same shape; sigma, sigma_next: floats, both shifted or both unshifted; clamp: (lo, hi) for the
    denoised estimate. backend: "reference" (plain PyTorch), "extension" (one pass in C++ or CUDA; float32, contiguous,
    no autograd) or "auto": the reference, until the extension has been measured to beat torch.compile on a GPU.
    Raises ValueError for shapes that differ, for sigma = 0 and for a backend that cannot run here.
    """
    check_backend("euler_step", backend, ("auto", "extension", "reference"))
    if x.shape != denoised.shape:
        raise ValueError(f"euler_step: got denoised of shape {tuple(denoised.shape)}, wanted {tuple(x.shape)} as x")
    if sigma == 0:
        raise ValueError(
            "euler_step: got sigma=0, wanted a level above 0; leave the final 0 out of the loop's start points"
        )
    if backend != "extension":
        return euler_step_ref(x, denoised, sigma, sigma_next, clamp)
    _check_extension_inputs(x, denoised)
    _load_op(x)
    lo, hi = (None, None) if clamp is None else clamp
    out = torch.empty_like(x)
    torch.ops.epg_fast.euler_step_out(out, x, denoised, sigma, sigma_next, lo, hi)
    return out


def _check_extension_inputs(x: torch.Tensor, denoised: torch.Tensor) -> None:
    for name, tensor in (("x", x), ("denoised", denoised)):
        if tensor.dtype != torch.float32:
            raise ValueError(
                f"euler_step: got {name} in {tensor.dtype}, wanted torch.float32 for backend='extension'; "
                "convert it or use backend='reference'"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"euler_step: got {name} with strides {tensor.stride()}, wanted it contiguous for backend='extension'; "
                "call .contiguous() or use backend='reference'"
            )
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"euler_step: got {name} that requires a gradient, which backend='extension' has not; "
                "use torch.no_grad() or backend='reference'"
            )


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
