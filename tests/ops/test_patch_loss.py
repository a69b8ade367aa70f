import functools

import pytest
import torch

from epg_fast.models import EPGViT
from epg_fast.ops.patch_loss import SPEC, patch_loss, patchify
from tests.ops.kernel_checks import (
    DEVICE,
    assert_accurate,
    assert_compiles_into_one_graph,
    assert_repeatable,
    needs_triton,
    randn,
    shapes_of,
)

SMALL = (2, 3, 8, 4)
# dtypes of the tokens and of the images
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16 tokens, fp32 images": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16 tokens, fp32 images": (torch.float16, torch.float32),
}
PARAMETERIZATIONS = ("x0", "edm")


def make_inputs(shape, dtypes=DTYPES["fp32"], parameterization="edm", target_is_image=True):
    """tokens, target, scale, offset, offset_scale, weight."""
    batch, channels, size, patch = shape
    token_dtype, image_dtype = dtypes
    tokens = (batch, (size // patch) ** 2, patch**2 * channels)
    image = (batch, channels, size, size)
    vector, picture = (
        functools.partial(randn, batch, requires_grad=False),
        functools.partial(randn, requires_grad=False),
    )
    target = picture(*image, dtype=image_dtype) if target_is_image else picture(*tokens, dtype=token_dtype, seed=1)
    preconditioning = [None] * 3
    if parameterization == "edm":
        preconditioning = [vector(seed=2), picture(*image, dtype=image_dtype, seed=3), vector(seed=4)]
    return [randn(*tokens, dtype=token_dtype), target, *preconditioning, vector(seed=5).abs()]


def call(tokens, target, scale, offset, offset_scale, weight, *, huber_c=None, backend):
    options = {"scale": scale, "offset": offset, "offset_scale": offset_scale, "weight": weight}
    return patch_loss(tokens, target, **options, huber_c=huber_c, backend=backend)


def loss_of(backend, huber_c=None):
    return lambda *inputs: call(*inputs, huber_c=huber_c, backend=backend)[0]


def squared_error_of(backend):
    return lambda *inputs: call(*inputs, backend=backend)[1]


def assert_kernel_is_accurate(inputs, huber_c=None, dloss=None):
    dloss = torch.randn(inputs[0].shape[0], device=DEVICE) if dloss is None else dloss
    assert_accurate(loss_of("triton", huber_c), loss_of("plain", huber_c), inputs, [dloss])


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("huber_c", [None, 0.06], ids=["mean", "huber"])
@pytest.mark.parametrize("target_is_image", [True, False], ids=["image", "tokens"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes, parameterization, target_is_image, huber_c):
    inputs = make_inputs(shape, dtypes, parameterization, target_is_image)
    assert_kernel_is_accurate(inputs, huber_c)
    inputs[0] = inputs[0].detach()
    assert_accurate(squared_error_of("triton"), squared_error_of("plain"), inputs, None)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_an_image_wider_than_high_is_cut_as_patchify_does():
    tokens, image = randn(2, 6, 48), randn(2, 3, 8, 12, requires_grad=False)
    assert_kernel_is_accurate([tokens, image, None, image.flip(0), None, None])
    loss, squared_error = patch_loss(patchify(image, 4), image, backend="triton")
    assert not loss.any() and not squared_error.any()


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_several_programs_share_an_image():
    from epg_kernels.patch_loss import STEPS, VALUES

    inputs = make_inputs((1, 1, 160, 16))
    assert inputs[0].numel() > STEPS * VALUES
    assert_kernel_is_accurate(inputs)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_kernel_accepts_tensors_that_are_not_contiguous():
    tokens, target, scale, offset, offset_scale, weight = make_inputs(SMALL)
    batch, patches, values = tokens.shape
    images = {
        "expanded": target[:1].expand(batch, -1, -1, -1),
        "channels last": target.contiguous(memory_format=torch.channels_last),
        "cropped": torch.nn.functional.pad(target, (2, 2, 2, 2))[..., 2:-2, 2:-2],
    }
    layouts = {
        "behind a prefix": torch.randn(batch, patches + 2, values, device=DEVICE)[:, 2:],
        "transposed": torch.randn(batch, values, patches, device=DEVICE).transpose(1, 2),
        "every other": torch.randn(batch, patches, 2 * values, device=DEVICE)[..., ::2],
    }
    strided = torch.stack([scale, offset_scale, weight], dim=1).unbind(1)
    for tokens, image in zip(layouts.values(), images.values(), strict=True):
        inputs = [tokens.requires_grad_(), image, strided[0], image, strided[1], strided[2]]
        assert_kernel_is_accurate(inputs, dloss=torch.ones((), device=DEVICE).expand(batch))
        inputs[1] = tokens.detach().flip(0)
        assert_kernel_is_accurate(inputs)


@needs_triton
def test_kernel_repeats_its_results_bit_for_bit():
    inputs = make_inputs((2, 3, 56, 14))
    assert_repeatable(loss_of("triton", 0.06), inputs, [torch.randn(2, device=DEVICE)])


@needs_triton
@pytest.mark.parametrize("target_is_image", [True, False], ids=["image", "tokens"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_operator_passes_opcheck(parameterization, target_is_image):
    inputs = make_inputs(SMALL, DTYPES["fp32"], parameterization, target_is_image)
    torch.library.opcheck(torch.ops.epg_fast.patch_loss.default, (*inputs, 0.06))


@needs_triton
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_kernel_compiles_into_one_graph(dtypes):
    dloss = torch.randn(SMALL[0], device=DEVICE)
    assert_compiles_into_one_graph(loss_of("triton", 0.06), make_inputs(SMALL, dtypes), [dloss])


@pytest.mark.parametrize("huber_c", [None, 0.06], ids=["mean", "huber"])
def test_operator_on_the_cpu_is_the_reference(huber_c, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [tensor.detach().cpu() for tensor in make_inputs(SMALL)]
    inputs[0].requires_grad_()
    (wanted, wanted_error), dloss = call(*inputs, huber_c=huber_c, backend="plain"), torch.randn(SMALL[0])
    loss, squared_error = torch.ops.epg_fast.patch_loss(*inputs, huber_c)
    torch.testing.assert_close((loss, squared_error), (wanted, wanted_error))
    (gradient,), (wanted,) = (torch.autograd.grad(value, inputs[:1], dloss) for value in (loss, wanted))
    torch.testing.assert_close(gradient, wanted)


def test_patchify_is_the_inverse_of_the_networks_unpatchify():
    sizes = {"embed_dim": 12, "depth": 1, "decoder_embed_dim": 12, "decoder_depth": 1}
    network = EPGViT(image_size=12, patch_size=4, **sizes)
    image = torch.randn(2, 3, 12, 12)
    assert torch.equal(network.unpatchify(patchify(image, 4)), image)


def test_reference_is_the_denoising_loss_of_the_unpatchified_output():
    tokens, target, *_, weight = make_inputs(SMALL, (torch.float64, torch.float64), "x0")
    loss, squared_error = call(tokens, target, None, None, None, weight, backend="plain")
    error = (unpatchified(tokens) - target).square().flatten(1)
    torch.testing.assert_close(loss, weight * error.mean(1))
    torch.testing.assert_close(squared_error, error.sum(1))
    assert loss.dtype == torch.float64 and not squared_error.requires_grad


def test_reference_is_the_consistency_loss_of_the_unpatchified_output():
    inputs = make_inputs(SMALL, (torch.float64, torch.float64), "edm")
    tokens, target, c_out, noised, c_skip, weight = inputs
    output = c_skip.view(-1, 1, 1, 1) * noised + c_out.view(-1, 1, 1, 1) * unpatchified(tokens)
    distance = (output - target).square().flatten(1).sum(1)
    wanted = weight * distance / (distance.detach() + 0.06**2).sqrt()
    loss = call(*inputs, huber_c=0.06, backend="plain")[0]
    torch.testing.assert_close(loss, wanted)
    dloss = torch.randn_like(loss)
    gradient, wanted = (torch.autograd.grad(value, tokens, dloss)[0] for value in (loss, wanted))
    torch.testing.assert_close(gradient, wanted)
    in_patch_space = call(tokens, patchify(target, 4), c_out, noised, c_skip, weight, huber_c=0.06, backend="plain")[0]
    torch.testing.assert_close(in_patch_space, loss)


def unpatchified(tokens):
    """Patch by patch, for SMALL."""
    batch, channels, size, patch = SMALL
    image = tokens.new_zeros(batch, channels, size, size)
    for n in range(tokens.shape[1]):
        row, column = n // (size // patch) * patch, n % (size // patch) * patch
        values = tokens[:, n].view(batch, patch, patch, channels)
        image[:, :, row : row + patch, column : column + patch] = values.permute(0, 3, 1, 2)
    return image


def test_reference_gradients_are_right_in_float64():
    inputs = make_inputs(SMALL, (torch.float64, torch.float64))
    assert torch.autograd.gradcheck(loss_of("plain"), inputs)


def test_a_weight_of_zero_at_zero_distance_gives_neither_loss_nor_gradient():
    image = randn(2, 3, 8, 8, requires_grad=False)
    tokens = patchify(image, 4).requires_grad_()
    loss, _ = patch_loss(tokens, image, weight=torch.zeros(2, device=DEVICE), huber_c=0.06)
    assert not loss.any() and not torch.autograd.grad(loss.sum(), tokens)[0].any()


def test_reference_compiles_into_one_graph(inductor):
    inputs = make_inputs(SMALL, DTYPES["bf16 tokens, fp32 images"])
    compiled = torch.compile(loss_of("plain", 0.06), fullgraph=True)
    assert_accurate(compiled, loss_of("plain", 0.06), inputs, [torch.randn(SMALL[0], device=DEVICE)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "got backend='cuda', wanted one of plain, triton"),
        ({"tokens": torch.zeros(2, 48)}, r"got tokens of shape \(2, 48\), wanted \[B, N, p\*p\*C\]"),
        (
            {"target": torch.zeros(2, 4, 47)},
            r"got target of shape \(2, 4, 47\), wanted \[2, 4, 48\] like tokens, or an image",
        ),
        (
            {"target": torch.zeros(2, 3, 8, 9)},
            r"got target of shape \(2, 3, 8, 9\), wanted .* cuts into 4 patches of .* 48",
        ),
        ({"target": torch.zeros(3, 3, 8, 8)}, r"got target of shape \(3, 3, 8, 8\), wanted \[2, C, H, W\]"),
        ({"target": torch.zeros(2, 4, 8, 8)}, r"got target of shape \(2, 4, 8, 8\), wanted"),
        ({"offset": torch.zeros(2, 3, 16, 8)}, r"got offset of shape \(2, 3, 16, 8\), wanted"),
        ({"offset": torch.zeros(2, 3, 4, 16)}, r"got offset of shape \(2, 3, 4, 16\), wanted target's \(2, 3, 8, 8\)"),
        ({"offset": None}, "got offset_scale without offset, wanted both, or neither"),
        ({"scale": torch.zeros(3)}, r"got scale of shape \(3,\), wanted \[2\], one per image"),
        ({"weight": torch.zeros(2, 1)}, r"got weight of shape \(2, 1\), wanted \[2\]"),
        ({"target": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "got target in torch.uint8, wanted a floating dtype"),
        ({"weight": torch.zeros(2, requires_grad=True)}, r"got weight that requires a gradient, .* detach\(\) weight"),
        ({"huber_c": 0.0}, "got huber_c=0.0, wanted a positive number, or None for the mean"),
    ],
)
def test_a_mistake_is_answered_with_what_was_wanted(change, message):
    names = ("tokens", "target", "scale", "offset", "offset_scale", "weight")
    arguments = dict(zip(names, make_inputs(SMALL), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        patch_loss(arguments.pop("tokens"), arguments.pop("target"), **arguments)


def test_an_image_that_does_not_cut_into_patches_is_refused():
    with pytest.raises(
        ValueError, match="got an image of 8 x 10, wanted multiples of the patch size 4; crop it to 8 x 8"
    ):
        patchify(torch.zeros(1, 3, 8, 10), 4)


@needs_triton
def test_float64_is_refused_for_the_kernel():
    inputs = make_inputs(SMALL, (torch.float64, torch.float64))
    with pytest.raises(ValueError, match="got tokens in torch.float64, wanted one of .* use backend='plain'"):
        call(*inputs, backend="triton")


def test_triton_on_a_cpu_tensor_says_what_to_do(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="on cpu, wanted one on a CUDA device.*backend='plain'"):
        patch_loss(torch.zeros(2, 4, 48), torch.zeros(2, 3, 8, 8), backend="triton")


def test_traffic_model_counts_tokens_and_images_once():
    pixels = 2 * 3 * 8 * 8
    assert SPEC.bytes(SMALL, 2) == pixels * (2 + 4) + 2 * 2 * 4
    assert SPEC.bytes(SMALL, 2, backward=True) == SPEC.bytes(SMALL, 2) + pixels * 2
