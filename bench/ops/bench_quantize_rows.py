"""Rows in FP8 with a scale each: the Triton kernel against torch.compile of the reference and against eager PyTorch."""

import functools

import pytest
import torch

from bench.ops.compare import PROVIDERS, compare, shapes
from epg_fast.ops.quantize_rows import SPEC, quantize_rows, quantize_rows_ref


def _inputs(shape, device, seed):
    """With a long skip after a gated branch, or GELU's argument alone."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, tokens, width, skip_width = shape

    def randn(*size):
        return torch.randn(size, generator=generator, device=device).bfloat16()

    x = randn(batch, tokens, width)
    if not skip_width:
        return [x]
    return [x, randn(batch, tokens, width), randn(batch, width), randn(batch, tokens, skip_width)]


def _values(rows, scale):
    return rows.float() * scale.float().unsqueeze(-1)


@pytest.mark.parametrize("provider", PROVIDERS)
@shapes(SPEC, on_cpu=((2, 258, 3072, 0), (2, 258, 768, 768)))
def test_quantize_rows(measure, device, shape, provider):
    gelu = not shape[-1]
    compare(
        measure,
        SPEC,
        functools.partial(quantize_rows, gelu=gelu, backend="triton"),
        functools.partial(quantize_rows_ref, gelu=gelu),
        functools.partial(_inputs, shape, device),
        shape=shape,
        dtype=torch.bfloat16,
        direction="forward",
        provider=provider,
        checked=_values,
    )
