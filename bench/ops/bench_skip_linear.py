"""Long skip: the Triton and CUDA kernels against torch.compile, eager PyTorch and two cuBLAS products."""

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.ops.compare import DIRECTIONS, PROVIDERS, compare, shapes
from epg_fast.ops.skip_linear import SPEC, skip_linear, skip_linear_ref


def _inputs(shape, dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    batch, tokens, width, skip_width = shape

    def randn(*size, scale=1.0):
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype).requires_grad_()

    weight = randn(width, width + skip_width, scale=(width + skip_width) ** -0.5)
    vectors = [randn(width) for _ in range(3)]
    return [randn(batch, tokens, width), randn(batch, tokens, skip_width), weight, *vectors]


def _split(x, skip, weight, bias, norm_weight, norm_bias):
    """The second product is added to the first: the sum is rounded once more than with a concatenation."""
    width, columns = x.shape[-1], weight.shape[0]
    z = torch.addmm(bias, x.flatten(0, 1), weight[:, :width].t())
    z = torch.addmm(z, skip.flatten(0, 1), weight[:, width:].t())
    return F.layer_norm(z, (columns,), norm_weight, norm_bias).view(*x.shape[:-1], columns)


@pytest.mark.parametrize("provider", [*PROVIDERS, "cuda", "split"])
@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@shapes(SPEC, on_cpu=((1, 66, 768, 768),))
def test_skip_linear(measure, device, shape, dtype, direction, provider):
    if provider == "split" and device == "cpu" and direction != "forward":
        pytest.skip("split: LayerNorm on a CPU sums its parameters' gradients in 16 bits, which is too inaccurate")
    if provider == "cuda" and dtype != torch.bfloat16:
        pytest.skip("cuda: takes bfloat16 alone")
    compare(
        measure,
        SPEC,
        functools.partial(skip_linear, backend="triton"),
        skip_linear_ref,
        functools.partial(_inputs, shape, dtype, device),
        shape=shape,
        dtype=dtype,
        direction=direction,
        provider=provider,
        libraries={"split": _split, "cuda": functools.partial(skip_linear, backend="cuda")},
    )
