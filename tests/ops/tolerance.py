"""How close a kernel must come: within a multiple of the error that PyTorch makes in the same dtypes."""

import torch

from epg_fast.ops.backends import interpreting

FORWARD = 2.0
GRADIENT = 3.0


def assert_close_to_reference(actual, same_dtype, exact, factor=FORWARD, name="output"):
    """actual's largest error is at most `factor` times same_dtype's, both against `exact`, computed in float64."""
    assert actual.dtype == same_dtype.dtype, f"{name}: dtype {actual.dtype}, wanted {same_dtype.dtype}"
    assert actual.shape == same_dtype.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(same_dtype.shape)}"
    assert actual.isfinite().all(), f"{name}: {(~actual.isfinite()).sum()} values are not finite"
    error = (actual.double() - exact).abs().max().item()
    allowed = (
        factor * (same_dtype.double() - exact).abs().max().item() + _floor(actual.dtype) * exact.abs().max().item()
    )
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} ({factor}x PyTorch's in {actual.dtype})"


def _floor(dtype: torch.dtype) -> float:
    """Relative to the largest value: a few roundings of the accumulation, which PyTorch may happen not to make."""
    if dtype == torch.bfloat16 and interpreting():
        return torch.finfo(dtype).eps  # the interpreter truncates float32 to bfloat16 instead of rounding it
    return 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
