"""What is particular to a kernel: attention's long rows, overflow and layouts, the shares of a norm's tokens, tiles and
layouts of images that are cut into patches."""

import pytest
import torch
import torch.nn.functional as F

from epg_fast.ops import attention, patch_loss, patchify
from tests.ops.examples import EXAMPLES
from tests.ops.kernel_checks import DEVICE, assert_backend_accurate, in_double, leaves_of, needs_triton, run

pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned_empty")]
ATTENTION, EMBED, LOSS = (EXAMPLES[name] for name in ("attention", "patch_embed", "patch_loss"))
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", ["fp32", *(pytest.param(d, marks=pytest.mark.kernels) for d in ("bf16", "fp16"))]
)


def make(shape, dtype="fp32", **options):
    return ATTENTION.inputs(shape, dtype) | options


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(1, 258, 1, 72), (1, 256, 1, 16), (1, 1, 3, 8), (1, 130, 1, 100)], ids=str)
def test_kernel_is_accurate_with_and_without_remaining_keys_and_columns(shape):
    assert_backend_accurate(ATTENTION, "triton", make(shape, "fp16"))


@pytest.mark.slow
@EVERY_DTYPE
def test_kernel_reads_keys_from_memory_when_they_do_not_fit_beside_it(dtype, monkeypatch):
    from epg_kernels import attention as kernels

    assert kernels._streams(1026, 64, 2, 1000, torch.device("cpu"))
    assert not kernels._streams(258, 128, 2, 1000, torch.device("cpu"))
    monkeypatch.setattr(kernels, "_RESIDENT_BYTES", 0)
    assert_backend_accurate(ATTENTION, "triton", make((1, 147, 1, 24), dtype))


@pytest.mark.slow
@EVERY_DTYPE
def test_kernel_stays_accurate_when_the_gradient_of_queries_comes_from_many_blocks(dtype, monkeypatch):
    from epg_kernels import attention as kernels

    monkeypatch.setattr(kernels, "_bwd_config", lambda *_: kernels.Config(32, 16, 4))
    assert_backend_accurate(ATTENTION, "triton", make((1, 80, 1, 24), dtype))


@pytest.mark.slow
def test_a_program_that_takes_several_heads_computes_each_as_if_alone(monkeypatch):
    from epg_kernels import attention as kernels

    inputs, gradients = make((3, 18, 1, 16), "fp16"), []
    for programs in (2, 3):  # of three heads; with three, each program has one
        monkeypatch.setattr(kernels, "_resident_programs", lambda _, programs=programs: programs)
        gradients.append(run(ATTENTION.by("triton"), inputs)[1][0])
    assert torch.equal(*gradients)


def test_heads_may_lie_before_tokens():
    batch, length, heads, head_dim = 2, 6, 2, 24
    qkv = make((batch, length, heads, head_dim))["qkv"]
    inputs = leaves_of(lambda t: t.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4), {"qkv": qkv})
    grad = torch.randn(batch, heads, length, head_dim, device=DEVICE).transpose(1, 2)
    assert_backend_accurate(ATTENTION, "triton", inputs, [grad])


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
def test_kernel_survives_scores_whose_exponentials_overflow(sign):
    qkv = make((1, 18, 1, 16), "fp16")["qkv"].detach()
    qkv[:, :, :2] = qkv[:, :, :2].abs() * 10
    qkv[:, :, 1] *= sign
    assert_backend_accurate(ATTENTION, "triton", {"qkv": qkv})
    inputs = {"qkv": qkv.requires_grad_()}
    (actual,) = run(ATTENTION.by("triton"), inputs)[1]
    (exact,) = run(ATTENTION.reference, in_double(inputs))[1]
    # The weights and their gradient are rounded to float16, and large ones cancel.
    allowed = 4 * torch.finfo(torch.float16).eps * exact.abs().max().item()
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=allowed)


def test_kernel_follows_the_precision_that_pytorch_is_told_to_use():
    from epg_kernels.attention import _precision

    before = torch.get_float32_matmul_precision()
    try:
        for told, wanted in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(told)
            assert _precision(torch.zeros(1)) == wanted
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", ["plain", "math", "triton"])
def test_output_is_contiguous_and_under_autocast_that_of_the_cast_operands(backend):
    inputs = make((2, 5, 2, 40))
    with torch.autocast(DEVICE, torch.bfloat16):
        under_autocast = attention(**inputs, backend=backend)
    assert under_autocast.is_contiguous() and under_autocast.dtype == torch.bfloat16
    assert torch.equal(under_autocast, attention(inputs["qkv"].bfloat16(), backend=backend))


@pytest.mark.slow
def test_gradients_do_not_depend_on_how_many_tokens_a_program_takes(monkeypatch):
    from epg_kernels import _norm_modulate as kernels

    config = kernels.config_for(40)
    assert [kernels._tokens_per_program(config, batch, 258) for batch in (64, 768, 5000)] == [40, 136, 264]
    monkeypatch.setattr(kernels, "TOKENS", 8)
    monkeypatch.setattr(kernels, "TWO_WAVES", 6)
    assert kernels._tokens_per_program(config, 3, 37) == 32
    example = EXAMPLES["layer_norm_modulate"]
    assert_backend_accurate(example, "triton", example.inputs((3, 37, 40), "fp32"))


@pytest.mark.parametrize(
    "dtypes", ["fp32", *(pytest.param(d, marks=pytest.mark.kernels) for d in list(EMBED.dtypes)[1:])]
)
def test_large_batches_are_embedded_by_wide_tiles_that_are_as_accurate(dtypes, monkeypatch):
    from epg_kernels import patch_embed as kernels

    monkeypatch.setattr(kernels, "FEW_ROWS", 0)
    assert_backend_accurate(EMBED, "triton", EMBED.inputs((3, 3, 32, 4, 40), dtypes))


def test_several_programs_share_an_image():
    from epg_kernels.patch_loss import STEPS, VALUES

    inputs = LOSS.inputs((1, 1, 160, 16), "fp32", "edm to an image, huber")
    assert inputs["tokens"].numel() > STEPS * VALUES
    assert_backend_accurate(LOSS, "triton", inputs)


def test_an_image_wider_than_high_is_cut_as_patchify_does():
    tokens, image = torch.randn(2, 6, 48, device=DEVICE, requires_grad=True), torch.randn(2, 3, 8, 12, device=DEVICE)
    assert_backend_accurate(LOSS, "triton", {"tokens": tokens, "target": image, "offset": image.flip(0)})
    loss, squared_error = patch_loss(patchify(image, 4), image, backend="triton")
    assert not loss.any() and not squared_error.any()


@pytest.mark.parametrize("layout", ["channels last", "cropped"])
@pytest.mark.parametrize("example", [EMBED, LOSS], ids=lambda example: example.name)
def test_images_may_lie_channels_last_or_within_larger_ones(example, layout):
    def laid_out(tensor):
        if tensor.dim() != 4 or tensor.shape[1] != 3:
            return tensor
        if layout == "cropped":
            return F.pad(tensor, (2, 2, 2, 2))[..., 2:-2, 2:-2]
        return tensor.contiguous(memory_format=torch.channels_last)

    form = "edm to an image, huber" if example is LOSS else None
    inputs = example.inputs((2, 3, 8, 4, 24)[: len(example.spec.shapes[0])], "fp32", form)
    assert_backend_accurate(example, "triton", leaves_of(laid_out, inputs))
