"""Properties of the networks that the recorded data does not show."""

import math

import pytest
import torch

from epg_fast.models import DMViT, EPGViT, RCMViT
from epg_fast.models.blocks import DropPath
from tests import networks

SIZES = networks.SIZES | {"embed_dim": 48, "depth": 2, "num_heads": 4}
DECODER = networks.DECODER | {"decoder_embed_dim": 40}


def make(**changes):
    return networks.randomized(EPGViT(**SIZES | DECODER | changes))


def test_initialisation_follows_the_specification():
    encoder, generator = RCMViT(**SIZES, hidden_dim=64, output_dim=32), EPGViT(**SIZES, **DECODER)
    encoder, generator = encoder.requires_grad_(False), generator.requires_grad_(False)
    assert not generator.out.weight.any() and not generator.decoder_blocks[0].adaLN_modulation[1].weight.any()
    bound = math.sqrt(6 / (48 + 48))  # the encoder's fused qkv counts as three matrices
    assert encoder.blocks[0].attn.qkv.weight.abs().max() == pytest.approx(bound, rel=0.01)
    bound = math.sqrt(6 / (48 + 3 * 48))  # the generator's as one
    assert generator.blocks[0].attn.qkv.weight.abs().max() == pytest.approx(bound, rel=0.01)
    bound = math.sqrt(6 / (3 * 64 + 48))
    assert generator.patch_embed.proj.weight.abs().max() == pytest.approx(bound, rel=0.01)
    assert generator.pos_embed.std() == pytest.approx(0.02, rel=0.2)
    assert generator.class_embed.weight.std() == pytest.approx(0.02, rel=0.2)
    assert generator.cls_token.abs().max() < 1e-5
    assert all(not m.bias.any() for m in generator.modules() if isinstance(m, torch.nn.Linear) and m.bias is not None)


def test_dropout_acts_on_decoder_attention_only_and_in_training_only():
    x, t, y = torch.randn(2, 3, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    model = make(drop=0.5)
    assert not torch.equal(model(x, t, y), model(x, t, y))
    assert torch.equal(model.encode(x, t, y), model.encode(x, t, y))
    model.eval()
    assert torch.equal(model(x, t, y), model(x, t, y))
    dropouts = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p]
    assert dropouts == [f"decoder_blocks.{i}.attn.proj_drop" for i in range(2)]


@pytest.mark.parametrize(("share", "calls"), [(True, [2, 2, 2, 2]), (0.5, [1, 2, 1, 2]), (False, [1, 1, 1, 1])])
def test_activation_checkpointing_changes_no_number(share, calls):
    x, t, y = torch.randn(2, 3, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    plain, saved = make(), make(use_checkpoint=share)
    saved.load_state_dict(plain.state_dict())
    made = [0] * 4
    for i, block in enumerate([*saved.blocks, *saved.decoder_blocks]):
        block.mlp.fc1.register_forward_hook(lambda *_, i=i: made.__setitem__(i, made[i] + 1))
    for model in (plain, saved):
        model(x, t, y).square().sum().backward()
    assert made == calls
    for p, q in zip(plain.parameters(), saved.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    drop = DropPath(0.25).train()
    x = torch.ones(4000, 2, 3)
    out = drop(x)
    per_sample = out[:, 0, 0]
    assert torch.equal(out, per_sample[:, None, None].expand_as(out))
    assert per_sample.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert out.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(x), x)


def test_official_arguments_are_accepted_and_unsupported_ones_refused():
    official = {"in_channels": 3, "qkv_bias": False, "qk_scale": None, "tokens": 1, "drop": 0.0, "attn_drop": 0.0}
    official |= {"drop_path": 0.0, "qk_norm": False, "mlp_time_embed": False, "skip_post_norm": True}
    model = DMViT(**SIZES, **DECODER, **official, use_checkpoint=False)
    assert isinstance(model, EPGViT)
    for options, error, message in (
        ({"qk_norm": True}, ValueError, "qk_norm=True is not supported"),
        ({"use_checkpoint": 1.5}, ValueError, "use_checkpoint is 1.5, want a share of the blocks from 0 to 1"),
        ({"depht": 3}, TypeError, "unknown argument 'depht'"),
    ):
        with pytest.raises(error, match=message):
            EPGViT(**SIZES, **DECODER, **options)
    x, t, y = torch.randn(2, 3, 16, 16), torch.zeros(2), torch.zeros(2).long()
    unconditional = EPGViT(**SIZES, **(DECODER | {"num_classes": 0}))
    assert unconditional(x, t).shape == x.shape
    for network, arguments, message in (
        (model, (torch.randn(2, 3, 24, 24), t, y), r"got shape \[2, 3, 24, 24\], want \[B, 3, 16, 16\]"),
        (model, (x, t), "y is missing"),
        (unconditional, (x, t, y), "unconditional"),
    ):
        with pytest.raises(ValueError, match=message):
            network(*arguments)


@pytest.mark.slow
def test_torch_compile_sees_one_graph(inductor):
    model = make(depth=1, decoder_depth=1)
    inputs = torch.randn(2, 3, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    want = model(*inputs)
    got = torch.compile(model, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_arguments_may_stand_in_the_official_order():
    """A user's own code passes them by position."""
    by_place = EPGViT(32, 8, 3, 32, 1, 2, 4.0, False, None, 1, 2, 48, 2, 10)
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    by_name = EPGViT(**sizes, decoder_depth=2, decoder_embed_dim=48, decoder_num_heads=2, num_classes=10)
    assert str(by_place) == str(by_name)
    assert str(RCMViT(32, 8, 3, 32, 64, 16, 1, 2)) == str(RCMViT(**sizes, hidden_dim=64, output_dim=16))
