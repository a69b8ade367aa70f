"""Global L2 norm of a list of tensors, and whether all of their values are finite: what gradient clipping needs.

    norm = sqrt(sum over tensors and values of value^2)        found_inf = 0 if norm^2 is finite in norm's dtype, else 1

(in float32 up to a norm of 1.8e19: Adam's second moment would hold the infinity for good.)

Source: gradient clipping by the global norm, Pascanu et al., "On the difficulty of training recurrent neural networks"
(2013); `found_inf` as torch's fused optimisers take it.

Dtypes: reference: any floating dtypes; extension: float32 and bfloat16, also mixed, contiguous. Results are float32
(float64 from the reference when a tensor is).
Error: the extension sums in float64, in an order that does not depend on the number of threads: the result is the
float32 nearest to the exact norm, or its neighbour, and the same every time. Nothing is read on the host.
"""

import math
from collections.abc import Sequence

import torch

from epg_fast.ops.backends import check_backend
from epg_fast.ops.extension import require_extension, require_one_device
from epg_fast.ops.spec import OpSpec

_OP = "global_norm"


def global_norm_ref(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in plain PyTorch."""
    if not tensors:
        return torch.zeros(()), torch.zeros(())
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    # On a CPU PyTorch adds up the values one after another: in float32 millions of them lose three digits.
    summed_in = torch.float64 if tensors[0].device.type == "cpu" else dtype
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), dtype=summed_in))).to(dtype)
    return norm, (~norm.square().isfinite()).to(dtype)


@torch.no_grad()
def global_norm(tensors: Sequence[torch.Tensor], backend: str = "plain") -> tuple[torch.Tensor, torch.Tensor]:
    """(norm, found_inf), two tensors of shape [] on the device of the tensors.

    tensors: gradients, say, of any shapes; an empty list has norm 0. backend: "plain" (plain PyTorch) or
    "extension" (one pass in C++ or CUDA; float32 and bfloat16, contiguous).
    Raises ValueError for a backend that cannot run here, and ValueError or RuntimeError for tensors that are not
    contiguous, not float32 or bfloat16, or on several devices.
    """
    check_backend(_OP, backend, ("extension", "plain"))
    if backend == "plain" or not tensors:
        return global_norm_ref(tensors)
    require_one_device(_OP, tensors[0], tensors=tensors)
    require_extension(_OP, tensors[0])
    norm, found_inf = (torch.empty((), device=tensors[0].device, dtype=torch.float32) for _ in range(2))
    torch.ops.epg_fast.global_norm_out(norm, found_inf, list(tensors))
    return norm, found_inf


# The real lists of tensors are uneven: EPG-XL has 583 million parameters in 349 tensors.
SPEC = OpSpec(
    name=_OP,
    shapes=((349, 1_670_447), (5000, 4096)),
    odd_shapes=((3, 17), (1, 1), (2, 16_385), (1000, 7)),
    bytes=lambda shape, itemsize: itemsize * math.prod(shape),
)
