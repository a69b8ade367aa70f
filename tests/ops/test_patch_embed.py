import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.diffusion import Denoiser
from epg_fast.ops.patch_embed import SPEC, _philox4x32, patch_embed, patch_embed_ref, philox_normal
from tests.ops.kernel_checks import (
    DEVICE,
    assert_accurate,
    assert_compiles_into_one_graph,
    assert_repeatable,
    needs_triton,
    randn,
    shapes_of,
)

SMALL = (2, 3, 8, 4, 24)
# dtypes of the image and its noise, of weight and bias, and of prefix and position
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp32 image, bf16 parameters": (torch.float32, torch.bfloat16, torch.float32),
    "fp16 with fp32 position": (torch.float16, torch.float16, torch.float32),
}
NORMALISATION = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}


def normalisation(channels):
    return {name: values[:channels] for name, values in NORMALISATION.items()}


def make_inputs(shape, dtypes=DTYPES["fp32"], extras=2, noised=True):
    """image, weight, bias, position, prefix, noise, sigma, c_in."""
    batch, channels, size, patch, width = shape
    image_dtype, weight_dtype, token_dtype = dtypes
    image = (batch, channels, size, size)
    length = extras + (size // patch) ** 2
    with torch.no_grad():
        weight = randn(width, channels, patch, patch, dtype=weight_dtype) / (patch * channels**0.5)
    constant = functools.partial(randn, requires_grad=False)
    return [
        randn(*image, dtype=image_dtype),
        weight.requires_grad_(),
        randn(width, dtype=weight_dtype),
        randn(1, length, width, dtype=token_dtype),
        randn(batch, extras, width, dtype=token_dtype, seed=1) if extras else None,
        constant(*image, dtype=image_dtype, seed=2) if noised else None,
        constant(batch, seed=3).exp() if noised else None,
        constant(batch, seed=4).abs() if noised else None,
    ]


def call(image, weight, bias, position, prefix, noise=None, sigma=None, c_in=None, **options):
    return patch_embed(image, weight, bias, position, prefix, noise=noise, sigma=sigma, c_in=c_in, **options)


def with_backend(backend, **options):
    return functools.partial(call, backend=backend, **options)


def gradient_like(inputs):
    _, weight, _, position, *_ = inputs
    return torch.randn(inputs[0].shape[0], position.shape[-2], weight.shape[0], device=DEVICE)


def assert_kernel_is_accurate(inputs, dtokens=None, **options):
    kernel, reference = (with_backend(backend, **options) for backend in ("triton", "plain"))
    assert_accurate(kernel, reference, inputs, [gradient_like(inputs) if dtokens is None else dtokens])


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("noised", [True, False], ids=["noised", "plain"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes, noised):
    assert_kernel_is_accurate(make_inputs(shape, dtypes, noised=noised))


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_kernel_noises_with_the_noise_that_the_reference_draws(dtypes):
    image, weight, bias, position, prefix, _, sigma, c_in = make_inputs((3, 3, 8, 4, 40), dtypes)
    inputs = [image, weight, bias, position, prefix, None, sigma, c_in]
    for drawn in ({"first_sample": 2**32 - 1}, {"noise_batch": 2}, {"noise_batch": 1}):
        assert_kernel_is_accurate(inputs, seed=2**40 + 7, **drawn, **NORMALISATION)
    assert_kernel_is_accurate([*inputs[:7], None], seed=0, first_sample=torch.tensor(5, device=DEVICE))


@needs_triton
@pytest.mark.parametrize("size", [4, 30])
def test_kernel_draws_every_normal_of_the_reference(size):
    """An identity as weight: the tokens are the pixels, here one quad and a last program that is not full."""
    noise = philox_normal(3, 10, 2, (1, size, size), DEVICE)
    pixels = torch.eye(size**2, device=DEVICE).view(size**2, 1, size, size)
    zero = functools.partial(torch.zeros, device=DEVICE)
    drawn = {"sigma": torch.ones(2, device=DEVICE), "seed": 3, "first_sample": 10}
    tokens = patch_embed(zero(2, 1, size, size), pixels, zero(size**2), **drawn, backend="triton")
    torch.testing.assert_close(tokens.view_as(noise), noise, rtol=2e-6, atol=2e-6)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("normalised", [True, False], ids=["mean and std", "plain"])
def test_kernel_reads_uint8_images(normalised):
    batch, channels, size, _, _ = shape = (3, 3, 8, 4, 40)
    _, *parameters = make_inputs(shape, DTYPES["fp32 image, bf16 parameters"])
    image = torch.randint(256, (batch, channels, size, size), dtype=torch.uint8, device=DEVICE)
    options = normalisation(channels) if normalised else {}
    assert_kernel_is_accurate([image, *parameters], **options)
    assert_kernel_is_accurate([image, *parameters[:-3], None, None, None], **options)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_normalisation_reaches_the_gradient_of_the_image():
    assert_kernel_is_accurate(make_inputs(SMALL), **NORMALISATION)


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
def test_an_image_wider_than_high_and_no_prefix_nor_position():
    image, weight, bias = randn(2, 3, 8, 12), randn(40, 3, 4, 4), randn(40)
    assert_kernel_is_accurate([image, weight, bias, None, None], dtokens=torch.randn(2, 6, 40, device=DEVICE))
    assert_kernel_is_accurate([image, weight, bias, randn(6, 40), None], dtokens=torch.randn(2, 6, 40, device=DEVICE))


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("trained", range(5), ids=["image", "weight", "bias", "position", "prefix"])
def test_only_the_gradient_that_is_wanted_is_computed(trained):
    inputs = [
        tensor if tensor is None else tensor.detach().requires_grad_(i == trained)
        for i, tensor in enumerate(make_inputs(SMALL))
    ]
    assert_kernel_is_accurate(inputs)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_kernel_accepts_tensors_that_are_not_contiguous():
    image, weight, bias, position, prefix, noise, sigma, c_in = make_inputs(SMALL)
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
        inputs = [tensor.detach().requires_grad_() for tensor in (x, *parameters)]
        levels = torch.stack([sigma, c_in], dim=1).unbind(1)
        assert_kernel_is_accurate([*inputs, x.detach().flip(0).mT, *levels], dtokens)
        assert_kernel_is_accurate(inputs, dtokens)


@needs_triton
def test_kernel_repeats_its_results_bit_for_bit():
    inputs = make_inputs((2, 3, 32, 4, 40))
    assert_repeatable(with_backend("triton"), inputs, [gradient_like(inputs)])


def op_arguments(inputs, seed=None, **options):
    image, weight, bias, position, prefix, noise, sigma, c_in = inputs
    drawn = (None, None) if seed is None else (torch.tensor(seed), torch.tensor(0))
    batch, mean, std = image.shape[0], options.get("mean"), options.get("std")
    return image, weight, bias, position[0], prefix, noise, *drawn, batch, sigma, c_in, mean, std, torch.float32


@needs_triton
@pytest.mark.parametrize("noised", [True, False], ids=["noised", "plain"])
def test_operator_passes_opcheck(noised):
    arguments = op_arguments(make_inputs(SMALL, noised=noised))
    torch.library.opcheck(torch.ops.epg_fast.patch_embed.default, arguments)


@needs_triton
@pytest.mark.parametrize("options", [{}, {"seed": 5, **NORMALISATION}], ids=["given noise", "drawn noise"])
def test_kernel_compiles_into_one_graph(options):
    image, weight, bias, position, prefix, noise, *levels = make_inputs(SMALL)
    inputs = [image, weight, bias, position, prefix, None if options else noise, *levels]
    assert_compiles_into_one_graph(with_backend("triton", **options), inputs, [gradient_like(inputs)])


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn noise", "given noise"])
def test_operator_on_the_cpu_is_the_reference(drawn, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [tensor.detach().cpu().requires_grad_(tensor.requires_grad) for tensor in make_inputs(SMALL)]
    options = dict(NORMALISATION, seed=5) if drawn else NORMALISATION
    inputs[5] = None if drawn else inputs[5]
    wanted, dtokens = with_backend("plain", **options)(*inputs), gradient_like(inputs).cpu()
    tokens = torch.ops.epg_fast.patch_embed(*op_arguments(inputs, **options))[0]
    torch.testing.assert_close(tokens, wanted)
    gradients, wanted = (torch.autograd.grad(value, inputs[:5], dtokens) for value in (tokens, wanted))
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_reference_is_the_convolution_behind_the_denoisers_input_scaling(autocast):
    image, weight, bias, position, prefix, noise, sigma, _ = make_inputs(SMALL)
    denoiser = Denoiser(lambda x, t: x)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        noised, _ = denoiser.network_input(image + sigma.view(-1, 1, 1, 1) * noise, sigma)
        patches = F.conv2d(noised, weight, bias, stride=4).flatten(2).transpose(1, 2)
        wanted = torch.cat([prefix, patches], dim=1) + position
        c_in = denoiser.scalings(sigma, 8)[2]
        tokens = patch_embed(image, weight, bias, position, prefix, sigma=sigma, noise=noise, c_in=c_in)
    torch.testing.assert_close(tokens, wanted, rtol=0, atol=0)


@needs_triton
def test_kernel_multiplies_in_autocasts_dtype():
    inputs = make_inputs(SMALL)
    with torch.autocast(DEVICE, torch.bfloat16):
        tokens, wanted = (with_backend(backend)(*inputs) for backend in ("triton", "plain"))
    assert tokens.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(tokens, wanted, rtol=2e-2, atol=2e-2)
    assert not torch.allclose(tokens, with_backend("triton")(*inputs), rtol=1e-6, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_have_the_dtype_that_was_asked_for(dtype):
    assert_kernel_is_accurate(make_inputs(SMALL, DTYPES["bf16"]), dtype=dtype)
    assert with_backend("triton", dtype=dtype)(*make_inputs(SMALL)).dtype == dtype


def test_reference_multiplies_each_patch_with_the_weight():
    inputs = make_inputs(SMALL, (torch.float64,) * 3)
    image, weight, bias, position, prefix, noise, sigma, c_in = inputs
    mean, std = (torch.tensor(NORMALISATION[name], dtype=torch.float64, device=DEVICE) for name in ("mean", "std"))
    pixels = (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    pixels = c_in.view(-1, 1, 1, 1) * (pixels + sigma.view(-1, 1, 1, 1) * noise)
    rows = [pixels[:, :, i : i + 4, j : j + 4].flatten(1) @ weight.flatten(1).T + bias for i in (0, 4) for j in (0, 4)]
    wanted = torch.cat([prefix, torch.stack(rows, dim=1)], dim=1) + position
    torch.testing.assert_close(call(*inputs, **NORMALISATION), wanted)


def test_reference_gradients_are_right_in_float64():
    inputs = make_inputs((2, 2, 4, 2, 3), (torch.float64,) * 3)
    assert torch.autograd.gradcheck(with_backend("plain"), inputs)


def test_reference_compiles_into_one_graph(inductor):
    inputs = make_inputs(SMALL)
    compiled = torch.compile(with_backend("plain"), fullgraph=True)
    assert_accurate(compiled, with_backend("plain"), inputs, [gradient_like(inputs)])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    got = _philox4x32([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
    assert tuple(int(word) for word in got) == words


def test_the_first_normals_are_those_of_the_published_words():
    w0, w1, w2, w3 = 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8
    wanted = []
    for first, second in ((w0, w1), (w2, w3)):
        radius, angle = math.sqrt(-2 * math.log((first + 0.5) / 2**32)), 2 * math.pi * second / 2**32
        wanted += [radius * math.cos(angle), radius * math.sin(angle)]
    torch.testing.assert_close(philox_normal(0, 0, 1, (2, 2)).flatten(), torch.tensor(wanted), rtol=1e-5, atol=1e-5)


def test_drawn_noise_is_standard_normal_and_independent_between_samples_and_seeds():
    noise = philox_normal(1, 0, 4, (3, 128, 128)).flatten(1).double()
    count = noise.shape[1]
    torch.testing.assert_close(torch.cov(noise), torch.eye(4).double(), rtol=0, atol=5 / count**0.5)
    quantiles = torch.special.ndtr(noise.sort(dim=1)[0])
    wanted = (torch.arange(count) + 0.5) / count
    assert (quantiles - wanted).abs().max() < 2 / count**0.5  # Kolmogorov-Smirnov: 1.63 / sqrt(n) at 1%
    other = philox_normal(2, 0, 1, (3, 128, 128)).flatten().double()
    assert abs((noise[0] * other).mean()) < 5 / count**0.5


def test_the_noise_of_a_sample_depends_on_neither_the_batch_nor_the_rank():
    shape = (3, 5, 7)
    together = philox_normal(9, 6, 4, shape)
    apart = torch.cat([philox_normal(9, 6, 1, shape), philox_normal(torch.tensor(9), torch.tensor(7), 3, shape)])
    assert torch.equal(together, apart)
    assert not torch.equal(philox_normal(9, 0, 1, shape), philox_normal(9, 2**32, 1, shape))
    assert not torch.equal(philox_normal(9, 0, 1, shape), philox_normal(9 + 2**32, 0, 1, shape))


@needs_triton
@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_stacked_views_share_their_samples_noise(backend):
    image, weight, bias, *_ = make_inputs((2, 3, 8, 4, 24))
    drawn = {"sigma": torch.ones(4, device=DEVICE), "seed": 3, "noise_batch": 2}
    tokens = patch_embed(torch.cat([image, image]), weight, bias, **drawn, backend=backend)
    torch.testing.assert_close(tokens[:2], tokens[2:], rtol=1e-3, atol=1e-3)
    drawn = {"sigma": torch.ones(1, device=DEVICE), "seed": 3, "first_sample": 1}
    alone = patch_embed(image[1:], weight, bias, **drawn, backend=backend)
    torch.testing.assert_close(alone, tokens[3:], rtol=1e-3, atol=1e-3)


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
            {"image": torch.zeros(2, 3, 8, 8, dtype=torch.int64)},
            "got image in torch.int64, wanted torch.uint8 or a float",
        ),
        (
            {"image": torch.zeros(2, 3, 8, 10)},
            "image of 8 x 10, wanted multiples of the patch size 4; crop it to 8 x 8",
        ),
        ({"weight": torch.zeros(24, 1, 4, 4)}, r"got weight of shape \(24, 1, 4, 4\), wanted \[E, 3, p, p\]"),
        ({"bias": torch.zeros(23)}, r"got bias of shape \(23,\), wanted \[24\]"),
        ({"prefix": torch.zeros(1, 2, 24)}, r"got prefix of shape \(1, 2, 24\), wanted \[2, T, 24\]"),
        ({"prefix": None}, r"got position of shape \(1, 6, 24\), wanted \[4, 24\] or \[1, 4, 24\]: one row per"),
        ({"mean": (0.5,) * 3}, "got no std, wanted both mean and std, or neither"),
        ({"mean": (0.5,), "std": (0.5,)}, "got 1 values of mean, wanted one per channel: 3"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.5, 0.0)}, r"got std=\[0.5, 0.5, 0.0\], wanted positive numbers"),
        ({"seed": 1}, "got noise and seed, wanted one of them"),
        ({"noise": None}, "got no noise or seed, wanted sigma together with noise or seed"),
        ({"sigma": None}, "got no sigma, wanted sigma together with noise or seed"),
        ({"noise": torch.zeros(1, 3, 8, 8)}, r"got noise of shape \(1, 3, 8, 8\), wanted \[2, 3, 8, 8\]"),
        ({"sigma": torch.zeros(2, 1)}, r"got sigma of shape \(2, 1\), wanted \[2\]"),
        ({"c_in": torch.zeros(3)}, r"got c_in of shape \(3,\), wanted \[2\]"),
        ({"sigma": torch.ones(2, requires_grad=True)}, r"got sigma that requires a gradient.*detach\(\) it"),
        ({"noise_batch": 2}, "got noise_batch=2, wanted at least 1 together with seed, or None"),
        ({"noise": None, "seed": 1, "noise_batch": 0}, "got noise_batch=0, wanted at least 1"),
        ({"noise": None, "seed": -1}, r"got seed=-1, wanted an integer from 0 to 2\^63 - 1"),
        ({"noise": None, "seed": 1.9}, r"got seed=1.9, wanted an integer from 0 to 2\^63 - 1"),
        (
            {"noise": None, "seed": 1, "first_sample": torch.zeros(2)},
            r"got first_sample of shape \(2,\) in torch.float32",
        ),
    ],
)
def test_a_mistake_is_answered_with_what_was_wanted(change, message):
    names = ("image", "weight", "bias", "position", "prefix", "noise", "sigma", "c_in")
    arguments = dict(zip(names, make_inputs(SMALL), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        patch_embed(**arguments)


@needs_triton
@pytest.mark.parametrize("name", ["image", "weight", "position", "sigma"])
def test_float64_is_refused_for_the_kernel(name):
    names = ("image", "weight", "bias", "position", "prefix", "noise", "sigma", "c_in")
    arguments = dict(zip(names, make_inputs(SMALL), strict=True))
    arguments[name] = arguments[name].detach().double()
    with pytest.raises(ValueError, match=f"got {name} in torch.float64, wanted one of .* use backend='plain'"):
        patch_embed(**arguments, backend="triton")


def test_triton_on_a_cpu_tensor_says_what_to_do(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="on cpu, wanted one on a CUDA device.*backend='plain'"):
        patch_embed(torch.zeros(1, 3, 8, 8), torch.zeros(24, 3, 4, 4), torch.zeros(24), backend="triton")


def test_traffic_model_counts_each_tensor_once():
    batch, channels, size, patch, width = SMALL
    pixels, length = batch * channels * size**2, 2 + (size // patch) ** 2
    parameters = 4 * (width * channels * patch**2 + length * width + width)
    assert SPEC.bytes(SMALL, 2) == 2 * (2 * pixels + batch * length * width) + parameters
    assert SPEC.bytes(SMALL, 2, backward=True) == SPEC.bytes(SMALL, 2) - 2 * pixels


def test_reference_is_what_auto_runs():
    inputs = make_inputs(SMALL)
    image, weight, bias, position, prefix, noise, sigma, c_in = inputs
    options = {"noise": noise, "sigma": sigma, "c_in": c_in}
    assert torch.equal(call(*inputs), patch_embed_ref(image, weight, bias, position, prefix, **options))
