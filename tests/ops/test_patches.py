"""What is particular to the kernels that read images in patches: tiles of two sizes, layouts of images, several
programs to an image."""

import functools

import pytest
import torch
import torch.nn.functional as F

from epg_fast.ops import patch_loss, patchify
from tests.ops.examples import EXAMPLES
from tests.ops.kernel_checks import DEVICE, assert_accurate, leaves_of, needs_triton

pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned_empty")]
EMBED, LOSS = EXAMPLES["patch_embed"], EXAMPLES["patch_loss"]


def assert_kernel_is_accurate(example, inputs):
    assert_accurate(functools.partial(example.call, "triton"), example.reference, inputs)


@pytest.mark.parametrize(
    "dtypes", ["fp32", *(pytest.param(d, marks=pytest.mark.kernels) for d in list(EMBED.dtypes)[1:])]
)
def test_large_batches_are_embedded_by_wide_tiles_that_are_as_accurate(dtypes, monkeypatch):
    from epg_kernels import patch_embed as kernels

    monkeypatch.setattr(kernels, "FEW_ROWS", 0)
    assert_kernel_is_accurate(EMBED, EMBED.inputs((3, 3, 32, 4, 40), dtypes, device=DEVICE))


def test_several_programs_share_an_image():
    from epg_kernels.patch_loss import STEPS, VALUES

    inputs = LOSS.inputs((1, 1, 160, 16), "fp32", "edm to an image, huber", device=DEVICE)
    assert inputs["tokens"].numel() > STEPS * VALUES
    assert_kernel_is_accurate(LOSS, inputs)


def test_an_image_wider_than_high_is_cut_as_patchify_does():
    tokens, image = torch.randn(2, 6, 48, device=DEVICE, requires_grad=True), torch.randn(2, 3, 8, 12, device=DEVICE)
    assert_kernel_is_accurate(LOSS, {"tokens": tokens, "target": image, "offset": image.flip(0)})
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
    inputs = example.inputs((2, 3, 8, 4, 24)[: len(example.spec.shapes[0])], "fp32", form, device=DEVICE)
    assert_kernel_is_accurate(example, leaves_of(laid_out, inputs))
