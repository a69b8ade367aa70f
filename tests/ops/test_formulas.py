"""Each operation in plain PyTorch is the formula that its docstring gives, written out here another way, in float64."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from epg_fast import ops
from epg_fast.models import EPGViT
from tests.ops.examples import EXAMPLES
from tests.ops.kernel_checks import DEVICE, in_double


def doubles(name, shape, form=None):
    example = EXAMPLES[name]
    return in_double(example.inputs(shape, next(iter(example.dtypes)), form))


def test_a_norm_is_modulated_after_it():
    inputs = doubles("layer_norm_modulate", (2, 7, 24))
    x, weight, bias, shift, scale = inputs.values()
    wanted = F.layer_norm(x, (24,), weight, bias, 1e-5) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(ops.layer_norm_modulate(**inputs), wanted)
    inputs |= {"shift": shift[:, None], "scale": scale[:, None]}
    torch.testing.assert_close(ops.layer_norm_modulate(**inputs), wanted)
    wanted = F.layer_norm(x, (24,), weight, bias, 0.1)
    torch.testing.assert_close(ops.layer_norm_modulate(x, weight, bias, eps=0.1), wanted)


def test_between_half_blocks_is_the_step_of_an_adaln_zero_block():
    inputs = doubles("gate_residual_norm_modulate", (2, 5, 40))
    x, branch, gate, weight, bias, shift, scale = inputs.values()
    norm = nn.LayerNorm(40, eps=1e-5, dtype=torch.float64, device=DEVICE)
    norm.weight.data, norm.bias.data = weight.data, bias.data
    x_out, y = ops.gate_residual_norm_modulate(**inputs)
    torch.testing.assert_close(x_out, x + gate * branch)
    torch.testing.assert_close(y, norm(x_out) * (1 + scale[:, None]) + shift[:, None])
    _, y = ops.gate_residual_norm_modulate(x, branch, None, weight, bias)
    torch.testing.assert_close(y, norm(x + branch))


def test_a_half_block_ends_with_its_product_on_the_residual():
    inputs = doubles("linear_residual_norm", (2, 5, 40, 24))
    x, h, weight, bias, *norm, gate, shift, scale = inputs.values()
    x_out, y = ops.linear_residual_norm(**inputs)
    torch.testing.assert_close(x_out, x + gate * (torch.einsum("blk,nk->bln", h, weight) + bias))
    torch.testing.assert_close(y, F.layer_norm(x_out, (24,), *norm) * (1 + scale) + shift)
    inputs = doubles("mlp_residual", (2, 5, 24, 40))
    x, y, fc1, fc1_bias, fc2, fc2_bias, gate = inputs.values()
    z = torch.einsum("blk,hk->blh", y, fc1) + fc1_bias
    branch = torch.einsum("blh,dh->bld", z * torch.special.ndtr(z), fc2) + fc2_bias
    torch.testing.assert_close(ops.mlp_residual(**inputs), x + gate * branch)


def test_a_long_skip_is_two_products_and_a_norm():
    inputs = doubles("skip_linear", (2, 5, 40, 24))
    x, skip, weight, bias, *norm = inputs.values()
    z = x @ weight[:, :40].t() + skip @ weight[:, 40:].t() + bias
    torch.testing.assert_close(ops.skip_linear(x, skip, weight, bias), z)
    torch.testing.assert_close(ops.skip_linear(**inputs, eps=0.1), F.layer_norm(z, (40,), *norm, 0.1))


@pytest.mark.parametrize("backend", ["plain", "math"])
def test_attention_is_multi_head_attention_between_its_projections(backend):
    batch, length, heads, head_dim = 2, 7, 3, 4
    module = nn.MultiheadAttention(heads * head_dim, heads, bias=False, batch_first=True).to(DEVICE, torch.float64)
    x = torch.randn(batch, length, heads * head_dim, dtype=torch.float64, device=DEVICE, requires_grad=True)
    wanted = module(x, x, x, need_weights=False)[0]
    qkv = F.linear(x, module.in_proj_weight).view(batch, length, 3, heads, head_dim)
    actual = module.out_proj(ops.attention(qkv, backend=backend).flatten(2))
    torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(ops.attention(qkv, backend=backend), ops.attention_ref(qkv))
    wrt = (x, module.in_proj_weight)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), wrt) for y in (actual, wanted)))


def test_dropout_drops_attention_weights_with_sdpa():
    qkv = torch.randn(2, 17, 3, 2, 8, device=DEVICE)
    dropped, kept = ops.attention(qkv, dropout_p=0.5), ops.attention(qkv)
    assert not torch.allclose(dropped, kept)
    several = torch.stack([ops.attention(qkv, dropout_p=0.5) for _ in range(100)])
    assert (several.mean(0) - kept).abs().mean() < 0.2 * (dropped - kept).abs().mean()


def test_patch_embedding_multiplies_each_patch_with_the_weight():
    inputs = doubles("patch_embed", (2, 3, 8, 4, 24))
    image, weight, bias, position, prefix = inputs.values()
    rows = [image[:, :, i : i + 4, j : j + 4].flatten(1) @ weight.flatten(1).T + bias for i in (0, 4) for j in (0, 4)]
    torch.testing.assert_close(ops.patch_embed(**inputs), torch.cat([prefix, torch.stack(rows, 1)], 1) + position)


def unpatchified(tokens, patch=4):
    """Images of 8 x 8, patch by patch."""
    image = tokens.new_zeros(len(tokens), 3, 8, 8)
    for n in range(4):
        row, column = n // 2 * patch, n % 2 * patch
        values = tokens[:, n].view(-1, patch, patch, 3)
        image[:, :, row : row + patch, column : column + patch] = values.permute(0, 3, 1, 2)
    return image


def test_patches_lie_as_the_network_puts_them_together():
    sizes = {"embed_dim": 12, "depth": 1, "decoder_embed_dim": 12, "decoder_depth": 1}
    image = torch.randn(2, 3, 12, 12)
    assert torch.equal(EPGViT(image_size=12, patch_size=4, **sizes).unpatchify(ops.patchify(image, 4)), image)


def test_the_loss_in_patches_is_the_denoising_loss_of_the_image():
    inputs = doubles("patch_loss", (2, 3, 8, 4), "denoising")
    loss, squared_error = ops.patch_loss(**inputs)
    error = (unpatchified(inputs["tokens"]) - inputs["target"]).square().flatten(1)
    torch.testing.assert_close((loss, squared_error), (inputs["weight"] * error.mean(1), error.sum(1)))
    assert loss.dtype == torch.float64 and not squared_error.requires_grad


def test_the_loss_in_patches_is_the_consistency_loss_of_the_image():
    inputs = doubles("patch_loss", (2, 3, 8, 4), "edm to an image, huber")
    tokens, target, c_out, noised, c_skip, weight, huber_c = inputs.values()
    output = c_skip.view(-1, 1, 1, 1) * noised + c_out.view(-1, 1, 1, 1) * unpatchified(tokens)
    distance = (output - target).square().flatten(1).sum(1)
    wanted, loss = weight * distance / (distance.detach() + huber_c**2).sqrt(), ops.patch_loss(**inputs)[0]
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), tokens)[0] for value in (loss, wanted)))
    in_patches = ops.patch_loss(**inputs | {"target": ops.patchify(target, 4)})[0]
    torch.testing.assert_close(in_patches, loss)


def test_a_weight_of_zero_at_zero_distance_gives_neither_loss_nor_gradient():
    image = torch.randn(2, 3, 8, 8)
    tokens = ops.patchify(image, 4).requires_grad_()
    loss, _ = ops.patch_loss(tokens, image, weight=torch.zeros(2), huber_c=0.06)
    assert not loss.any() and not torch.autograd.grad(loss.sum(), tokens)[0].any()


def test_a_time_is_embedded_in_cosines_then_sines_then_zero():
    t = [0.0, -3.5, 1615.0]
    values = ops.timestep_embedding(torch.tensor(t, dtype=torch.float64), 7)
    for i, level in enumerate(t):
        phases = [level * 10_000 ** (-k / 3) for k in range(3)]
        wanted = [*map(math.cos, phases), *map(math.sin, phases), 0.0]
        torch.testing.assert_close(values[i], torch.tensor(wanted, dtype=torch.float64))
    t = torch.tensor([-1600.0, 80.0], dtype=torch.float64)
    time, condition = ops.timestep_condition(t, 8)
    torch.testing.assert_close((time, condition), (ops.timestep_embedding(t, 8), time * time.sigmoid()))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
def test_a_time_may_have_another_dtype(dtype):
    pytest.importorskip("triton")
    t = torch.tensor([3, -7], device=DEVICE).to(dtype)
    for backend in ("plain", "triton"):
        actual = ops.timestep_embedding(t, 40, backend=backend)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), ops.timestep_embedding(t.double(), 40), rtol=1e-5, atol=1e-5)


def test_the_first_step_of_heun_is_that_of_euler_and_both_follow_the_formula_in_its_order():
    x, denoised, ahead_denoised = torch.randn(3, 2, 3, 8, 8)
    d = (x - denoised.clamp(-1, 1)) / 3.0
    ahead = x + (1.25 - 3.0) * d
    assert torch.equal(ops.euler_step(x, denoised, 3.0, 1.25, clamp=(-1.0, 1.0)), ahead)
    d_next = (ahead - ahead_denoised.clamp(-1, 1)) / 1.25
    actual = ops.heun_step(x, denoised, ahead_denoised, 3.0, 1.25, clamp=(-1.0, 1.0))
    assert torch.equal(actual, x + (1.25 - 3.0) * (d + d_next) / 2)
    torch.testing.assert_close(ops.euler_step(x, denoised, 3.0, 0.0), denoised)


def test_data_at_one_point_is_reached_exactly():
    """The ODE's path to a fixed clean image is a straight line, on which Heun's method makes no error."""
    noise, image = torch.randn(2, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(ops.heun_step(image + 1.7 * noise, image, image, 1.7, 0.3), image + 0.3 * noise)
