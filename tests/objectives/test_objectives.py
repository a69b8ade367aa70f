"""What the objectives promise beyond the recorded numbers: no wasted work, shared dropout, float32 losses."""

import pytest
import torch

from epg_fast.diffusion import NoiseSchedule
from epg_fast.models import RCMViT
from epg_fast.objectives import consistency_loss, denoising_loss, info_nce, pretraining_loss
from tests.networks import make_model


def _images(count, batch=4, dtype=torch.float32):
    return [torch.randn(batch, 3, 16, 16, dtype=dtype) for _ in range(count)]


class _Counting:
    """Counts passes through a module's trunk and the images in them, with and without gradient."""

    def __init__(self, model):
        self.passes = []
        model.patch_embed.register_forward_hook(
            lambda m, inputs, out: self.passes.append((len(inputs[0]), torch.is_grad_enabled()))
        )


def test_pretraining_takes_three_trunk_passes():
    online, target = (make_model(RCMViT) for _ in range(2))
    target.requires_grad_(False).eval()
    counted = _Counting(online), _Counting(target)
    pretraining_loss(online, target, *_images(4), 3, NoiseSchedule(20)).loss.backward()
    assert counted[0].passes == [(4, False), (12, True)] and counted[1].passes == [(8, False)]


def test_consistency_shares_the_dropout_mask_and_leaves_the_global_random_state():
    """With dropout, equal levels and equal masks the distance is exactly zero."""
    model = make_model(decoder_depth=1, drop=0.5).train()
    x, noise = _images(2)
    y, t = torch.tensor([0, 1, 2, 3]), torch.tensor([0.1, 0.5, 1.0, 10.0])
    before = torch.random.get_rng_state()
    shared = consistency_loss(model, x, noise, y, t, t, 2, NoiseSchedule(), dropout_seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(shared.per_sample, torch.zeros(4))
    pair = [consistency_loss(model, x, noise, y, t, t / 2, 2, NoiseSchedule(), dropout_seed=s).loss for s in (7, 7, 8)]
    assert pair[0] == pair[1] != pair[2]


def test_the_frozen_encoder_passes_gradient_to_the_image_and_keeps_none():
    model = make_model(decoder_depth=1)
    encoder = make_model(RCMViT).eval().requires_grad_(False)
    x, noise = _images(2)
    y, t = torch.tensor([0, 1, 2, 3]), torch.tensor([0.1, 0.5, 1.0, 10.0])
    buffers = {k: v.clone() for k, v in encoder.state_dict().items()}
    result = consistency_loss(model, x, noise, y, t, t / 2, 1, NoiseSchedule(), perceptual=encoder)
    result.terms["perceptual"].sum().backward()
    assert model.out.weight.grad.norm() > 0
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(v, buffers[k]) for k, v in encoder.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(dtype):
    online, target = (make_model(RCMViT) for _ in range(2))
    model = make_model(decoder_depth=1)
    x, noise = _images(2)
    y = torch.tensor([0, 1, 2, 5])
    sigma = torch.tensor([0.002, 0.1, 5.0, 80.0])  # weights up to 1e5 would overflow in float16
    with torch.autocast("cpu", dtype=dtype):
        losses = [
            pretraining_loss(online, target.eval(), *_images(4), 3, NoiseSchedule(20)),
            denoising_loss(model, x, noise, y, sigma, NoiseSchedule()),
            consistency_loss(model, x, noise, y, sigma, sigma * 0.9, 1, NoiseSchedule()),
        ]
    for result in losses:
        assert result.per_sample.dtype == torch.float32 and result.per_sample.isfinite().all()
    want = denoising_loss(model, x, noise, y, sigma, NoiseSchedule())
    assert (losses[1].loss - want.loss).abs() / want.loss < 0.05


def test_contrastive_loss_is_cross_entropy_over_cosine_similarities():
    u, v, others = (torch.randn(5, 7, dtype=torch.float64) for _ in range(3))
    keys = torch.nn.functional.normalize(torch.cat([v, others]), dim=-1)
    logits = torch.nn.functional.normalize(u, dim=-1) @ keys.T / 0.3
    want = torch.nn.functional.cross_entropy(logits, torch.arange(5), reduction="none")
    others = torch.nn.functional.normalize(others, dim=-1)
    torch.testing.assert_close(info_nce(u, v, 0.3, torch.cat([v, others])), want)


def test_interpolated_temperature_changes_the_consistency_term_only():
    online, target = (make_model(RCMViT) for _ in range(2))
    images = _images(4)
    runs = [
        pretraining_loss(online.eval(), target.eval(), *images, 3, NoiseSchedule(20), temperature=t)
        for t in (0.1, (0.1, 0.1), (0.1, 0.5))
    ]
    assert torch.allclose(runs[0].per_sample, runs[1].per_sample)
    assert torch.equal(runs[0].terms["contrastive"], runs[2].terms["contrastive"])
    assert not torch.allclose(runs[0].terms["consistency"], runs[2].terms["consistency"])


@pytest.mark.parametrize("index", [-1, 19])
def test_a_level_that_is_none_is_refused(index):
    encoder = make_model(RCMViT)
    with pytest.raises(ValueError, match=f"index: got {index}, wanted 0 to 18"):
        pretraining_loss(encoder, encoder, *_images(4), index, NoiseSchedule(20))
