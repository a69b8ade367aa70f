"""`epg_fast.sample`: what it returns depends on model, labels and seed, and on nothing else."""

import pytest
import torch
from torch.testing import assert_close

import epg_fast
from epg_fast.diffusion import Denoiser, NoiseSchedule, sample_heun
from epg_fast.models import EPGViT

SIZES = {"image_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
DECODER = {"decoder_depth": 1, "decoder_embed_dim": 48, "decoder_num_heads": 2}


@pytest.fixture
def model():
    model = EPGViT(**SIZES, **DECODER, num_classes=5, drop=0.5)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("sampler", ["heun", "euler_sde", "edm_sde"])
def test_an_image_does_not_depend_on_the_batch_it_is_in(model, sampler):
    options = {"sampler": sampler, "steps": 4, "guidance": 2.0} | ({"s_churn": 40.0} if sampler == "edm_sde" else {})
    labels = [0, 1, 2, 3, 4, 0, 1]
    whole = epg_fast.sample(model, labels, **options)
    assert whole.shape == (7, 3, 16, 16) and whole.min() >= 0 and whole.max() <= 1
    assert_close(epg_fast.sample(model, labels, batch_size=3, **options), whole, rtol=0, atol=1e-4)
    assert_close(epg_fast.sample(model, labels[4:6], first=4, **options), whole[4:6], rtol=0, atol=1e-4)
    assert not torch.equal(epg_fast.sample(model, labels, seed=1, **options), whole)
    assert whole.flatten(1).unique(dim=0).shape[0] == 7


def test_it_is_the_plain_sampler_with_normalisation_undone(model):
    noise, y = torch.randn(3, 3, 16, 16), torch.tensor([1, 2, 3])
    got = epg_fast.sample(model, y, noise=noise, steps=5, normalization="simple", parameterization="edm")
    assert model.training  # the mode is put back
    with torch.no_grad():
        levels = NoiseSchedule().levels(5, 16)
        want = sample_heun(Denoiser(model.eval(), parameterization="edm"), noise, levels, y)
    assert torch.equal(got, (want * 0.5 + 0.5).clamp(0, 1))


def test_the_checkpoint_says_how_it_is_to_be_used(model):
    labels = [1, 2]
    explicit = epg_fast.sample(model, labels, steps=3, normalization="simple", parameterization="edm")
    plain = epg_fast.sample(model, labels, steps=3)
    model.metadata = {"normalization": "simple", "parameterization": "edm"}
    assert torch.equal(epg_fast.sample(model, labels, steps=3), explicit)
    assert not torch.equal(plain, explicit)


def test_clamping_to_the_data_range_is_an_option(model):
    with torch.no_grad():  # estimates a little beyond the range of the data
        model.out.weight /= model(torch.randn(8, 3, 16, 16), torch.zeros(8), torch.zeros(8).long()).std()
    images = {c: epg_fast.sample(model, [0, 1], steps=4, clamp=c) for c in ("official", "data", "none")}
    assert not torch.equal(images["official"], images["data"])
    assert not torch.equal(images["data"], images["none"])


def test_autoguidance_uses_the_weak_model(model):
    weak = EPGViT(**SIZES, **DECODER, num_classes=5, drop=0.5)
    for p in weak.parameters():
        torch.nn.init.normal_(p, std=0.1)
    weak.blocks[0].eval()
    modes = [m.training for m in weak.modules()]
    same = epg_fast.sample(model, [0, 1], steps=3, weak=model, guidance=3.0)
    assert_close(same, epg_fast.sample(model, [0, 1], steps=3), rtol=0, atol=1e-4)
    guided = epg_fast.sample(model, [0, 1], steps=3, weak=weak, guidance=3.0)
    assert not torch.equal(guided, same)
    assert [m.training for m in weak.modules()] == modes  # every module gets its own mode back
    assert torch.equal(epg_fast.sample(model, [0, 1], steps=3, weak=weak.eval(), guidance=3.0), guided)


def test_16_bit_sampling_is_close_to_fp32(model):
    want = epg_fast.sample(model, [0, 1, 2], sampler="onestep")
    for precision in ("bf16", "fp16"):
        got = epg_fast.sample(model, [0, 1, 2], sampler="onestep", precision=precision)
        assert 0 < (got - want).abs().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_in_other_precisions_are_sampled(model, dtype):
    want = epg_fast.sample(model, [0, 1, 2], sampler="onestep")
    got = epg_fast.sample(model.to(dtype), [0, 1, 2], sampler="onestep")
    assert got.dtype == torch.float32
    assert 0 < (got - want).abs().mean() < (1e-5 if dtype == torch.float64 else 0.02)


def test_bad_requests_say_what_is_wanted(model):
    for labels, message in (
        ([5, 6], "label 6"),
        ([-1], "label -1"),
        ([], "no labels"),
        ([0.5], "integers"),
        (3, "class-"),
    ):
        with pytest.raises(ValueError, match=message):
            epg_fast.sample(model, labels, steps=2)
    for options, message in (
        ({"steps": 1}, "at least 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sampler": "ddim"}, "want one of"),
        ({"s_churn": 1.0}, "options of edm_sde"),
        ({"clamp": "x"}, "official, data or none"),
        ({"normalization": "imagenett"}, "imagenet"),
        ({"parameterization": "eps"}, "x0, edm"),
        ({"precision": "fp8"}, "fp32, bf16"),
        ({"noise": torch.randn(1, 3, 8, 8)}, r"noise has shape \[1, 3, 8, 8\], want \[1, 3, 16, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            epg_fast.sample(model, [0], **({"steps": 2} | options))


def test_unconditional_models_are_sampled_by_number_and_cannot_be_guided():
    model = EPGViT(**SIZES, **DECODER, num_classes=0)
    assert epg_fast.sample(model, 3, steps=2).shape == (3, 3, 16, 16)
    with pytest.raises(ValueError, match="unconditional"):
        epg_fast.sample(model, [0, 1], steps=2)
    with pytest.raises(ValueError, match="guidance needs a class-conditional network"):
        epg_fast.sample(model, 2, steps=2, guidance=2.0)
