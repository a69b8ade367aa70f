import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.ops.patch_embed import SPEC, patch_embed, patch_embed_ref
from tests.ops.kernel_checks import (
    DEVICE,
    assert_accurate,
    assert_compiles_into_one_graph,
    assert_repeatable,
    needs_triton,
    randn,
    shapes_of,
)

NAMES = ("image", "weight", "bias", "position", "prefix")
SMALL = (2, 3, 8, 4, 24)
# dtypes of the image, of weight and bias, and of prefix and position
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp32 image, bf16 parameters": (torch.float32, torch.bfloat16, torch.float32),
    "bf16 image, fp32 parameters": (torch.bfloat16, torch.float32, torch.float32),
    "fp16 with fp32 position": (torch.float16, torch.float16, torch.float32),
}


def make_inputs(shape, dtypes=DTYPES["fp32"], extras=2, aspect=1):
    """image, weight, bias, position, prefix."""
    batch, channels, size, patch, width = shape
    image_dtype, weight_dtype, token_dtype = dtypes
    length = extras + aspect * (size // patch) ** 2
    with torch.no_grad():
        weight = randn(width, channels, patch, patch, dtype=weight_dtype) / (patch * channels**0.5)
    return [
        randn(batch, channels, size, aspect * size, dtype=image_dtype),
        weight.requires_grad_(),
        randn(width, dtype=weight_dtype),
        randn(1, length, width, dtype=token_dtype),
        randn(batch, extras, width, dtype=token_dtype, seed=1),
    ]


def with_backend(backend):
    return functools.partial(patch_embed, backend=backend)


def gradient_like(inputs):
    image, _, _, position, _ = inputs
    return torch.randn(image.shape[0], *position.shape[1:], device=DEVICE)


def assert_kernel_is_accurate(inputs, dtokens=None):
    kernel, reference = with_backend("triton"), with_backend("plain")
    assert_accurate(kernel, reference, inputs, [gradient_like(inputs) if dtokens is None else dtokens])


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes):
    assert_kernel_is_accurate(make_inputs(shape, dtypes))


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_large_batches_take_wide_tiles_that_are_as_accurate(dtypes, monkeypatch):
    from epg_kernels import patch_embed as kernels

    monkeypatch.setattr(kernels, "FEW_ROWS", 0)
    assert_kernel_is_accurate(make_inputs((3, 3, 32, 4, 40), dtypes))


@needs_triton
def test_tensor_cores_serve_float32_when_pytorch_allows_it():
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        inputs = make_inputs(SMALL)
        torch.testing.assert_close(*(with_backend(b)(*inputs) for b in ("triton", "plain")), rtol=1e-2, atol=1e-2)
    finally:
        torch.set_float32_matmul_precision(precision)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_an_image_wider_than_high_behind_one_token():
    assert_kernel_is_accurate(make_inputs(SMALL, extras=1, aspect=2))


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("trained", NAMES)
def test_only_the_gradient_that_is_wanted_is_computed(trained):
    inputs = [t.detach().requires_grad_(name == trained) for name, t in zip(NAMES, make_inputs(SMALL), strict=True)]
    assert_kernel_is_accurate(inputs)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_kernel_accepts_tensors_that_are_not_contiguous():
    image, weight, bias, position, prefix = make_inputs(SMALL)
    batch, length, width = SMALL[0], position.shape[1], SMALL[-1]
    images = {
        "expanded": image[:1].expand(batch, -1, -1, -1),
        "channels last": image.contiguous(memory_format=torch.channels_last),
        "cropped": F.pad(image, (2, 2, 2, 2))[..., 2:-2, 2:-2],
    }
    gradients = {
        "expanded": torch.ones((), device=DEVICE).expand(batch, length, width),
        "transposed": torch.randn(batch, width, length, device=DEVICE).transpose(1, 2),
        "every other": torch.randn(batch, length, 2 * width, device=DEVICE)[..., ::2],
    }
    prefixes = [prefix[:1].expand(batch, -1, -1), prefix.flip(2).mT.contiguous().mT, prefix]
    for x, p, dtokens in zip(images.values(), prefixes, gradients.values(), strict=True):
        parameters = (weight.flip(0).mT, torch.stack([bias, bias], dim=1)[:, 0], position.mT.contiguous().mT, p)
        assert_kernel_is_accurate([tensor.detach().requires_grad_() for tensor in (x, *parameters)], dtokens)


@needs_triton
def test_kernel_repeats_its_results_bit_for_bit():
    inputs = make_inputs((2, 3, 32, 4, 40))
    assert_repeatable(with_backend("triton"), inputs, [gradient_like(inputs)])


@needs_triton
@pytest.mark.parametrize("trained", [NAMES, NAMES[1:], NAMES[:1]], ids=["all", "not the image", "the image alone"])
def test_operator_passes_opcheck(trained):
    inputs = [t.detach().requires_grad_(name in trained) for name, t in zip(NAMES, make_inputs(SMALL), strict=True)]
    torch.library.opcheck(torch.ops.epg_fast.patch_embed.default, tuple(inputs))


@needs_triton
def test_kernel_compiles_into_one_graph():
    inputs = make_inputs(SMALL, DTYPES["fp32 image, bf16 parameters"])
    assert_compiles_into_one_graph(with_backend("triton"), inputs, [gradient_like(inputs)])


def test_operator_on_the_cpu_is_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [tensor.detach().cpu().requires_grad_() for tensor in make_inputs(SMALL)]
    wanted, dtokens = patch_embed_ref(*inputs), gradient_like(inputs).cpu()
    tokens = torch.ops.epg_fast.patch_embed(*inputs)
    torch.testing.assert_close(tokens, wanted)
    gradients, wanted = (torch.autograd.grad(value, inputs, dtokens) for value in (tokens, wanted))
    torch.testing.assert_close(gradients, wanted)


@needs_triton
def test_kernel_multiplies_in_autocasts_dtype_and_leaves_gradients_in_that_of_the_parameters():
    inputs = make_inputs(SMALL)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_kernel_is_accurate(inputs)
        tokens = with_backend("triton")(*inputs)
    assert not torch.allclose(tokens, with_backend("triton")(*inputs), rtol=1e-6, atol=1e-6)
    (dweight,) = torch.autograd.grad(tokens, inputs[1], torch.randn_like(tokens))
    assert not torch.equal(dweight, dweight.bfloat16().float())


def test_reference_multiplies_each_patch_with_the_weight():
    inputs = image, weight, bias, position, prefix = make_inputs(SMALL, (torch.float64,) * 3)
    rows = [image[:, :, i : i + 4, j : j + 4].flatten(1) @ weight.flatten(1).T + bias for i in (0, 4) for j in (0, 4)]
    wanted = torch.cat([prefix, torch.stack(rows, dim=1)], dim=1) + position
    torch.testing.assert_close(patch_embed(*inputs), wanted)


def test_reference_compiles_into_one_graph(inductor):
    inputs = make_inputs(SMALL)
    compiled = torch.compile(with_backend("plain"), fullgraph=True)
    assert_accurate(compiled, with_backend("plain"), inputs, [gradient_like(inputs)])


@needs_triton
@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_flop_counter_counts_the_products(backend):
    inputs = make_inputs(SMALL)
    batch, channels, size, _, width = SMALL
    with FlopCounterMode(display=False) as forward:
        tokens = with_backend(backend)(*inputs)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(tokens, inputs[:2], torch.ones_like(tokens))
    product = 2 * batch * channels * size**2 * width
    assert forward.get_total_flops() == product
    assert backward.get_total_flops() == 2 * product


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "got backend='cuda', wanted one of plain, triton"),
        ({"image": torch.zeros(3, 8, 8)}, r"got image of shape \(3, 8, 8\), wanted \[B, C, H, W\]"),
        (
            {"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)},
            "got image in torch.uint8, wanted a floating dtype; normalise its pixels",
        ),
        (
            {"image": torch.zeros(2, 3, 8, 10)},
            "image of 8 x 10, wanted multiples of the patch size 4; crop it to 8 x 8",
        ),
        ({"weight": torch.zeros(24, 1, 4, 4)}, r"got weight of shape \(24, 1, 4, 4\), wanted \[E, 3, p, p\]"),
        ({"bias": torch.zeros(23)}, r"got bias of shape \(23,\), wanted \[24\]"),
        ({"prefix": torch.zeros(1, 2, 24)}, r"got prefix of shape \(1, 2, 24\), wanted \[2, T, 24\]"),
        ({"prefix": torch.zeros(2, 1, 24)}, r"got position of shape \(1, 6, 24\), wanted \[1, 5, 24\]: one row per"),
        ({"position": torch.zeros(6, 24)}, r"got position of shape \(6, 24\), wanted \[1, 6, 24\]"),
    ],
)
def test_a_mistake_is_answered_with_what_was_wanted(change, message):
    arguments = dict(zip(NAMES, make_inputs(SMALL), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        patch_embed(**arguments)


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_float64_is_refused_for_the_kernel(name):
    arguments = dict(zip(NAMES, make_inputs(SMALL), strict=True))
    arguments[name] = arguments[name].detach().double()
    with pytest.raises(ValueError, match=f"got {name} in torch.float64, wanted one of .* use backend='plain'"):
        patch_embed(**arguments, backend="triton")


def test_triton_on_a_cpu_tensor_says_what_to_do(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [tensor.detach().cpu() for tensor in make_inputs(SMALL)]
    with pytest.raises(ValueError, match="on cpu, wanted one on a CUDA device.*backend='plain'"):
        patch_embed(*inputs, backend="triton")


def test_traffic_model_counts_each_tensor_once():
    image, weight, bias, position, prefix = inputs = make_inputs(SMALL)
    parameters = 4 * (weight.numel() + bias.numel() + position.numel())
    tokens = patch_embed(*inputs).numel()
    assert SPEC.bytes(SMALL, 2) == SPEC.bytes(SMALL, 2, backward=True) == 2 * (image.numel() + tokens) + parameters
