"""The three objectives against the official implementation: per-sample terms, means, gradients, BatchNorm buffers."""

import pytest
import torch

from epg_fast.diffusion import NoiseSchedule
from epg_fast.models import EPGViT, RCMViT
from epg_fast.objectives import consistency_loss, denoising_loss, info_nce, interpolated_temperature, pretraining_loss
from tests.golden_data import Case, each_backend_and_dtype, interpret_only, names


def _load(cls, config, weights, ops, trainable=True):
    model = cls(**config).use_ops(ops)
    model.load_state_dict(weights)
    return model.requires_grad_(trainable).train(trainable)


@pytest.mark.parametrize("index", Case("pretrain_step").config["indices"])
@each_backend_and_dtype
def test_pretraining_step(index, dtype, ops):
    interpret_only(ops, index == 6)
    case = Case("pretrain_step")
    config = case.config
    online = _load(RCMViT, config["model"], case.weights("online"), ops).to(dtype)
    target = _load(RCMViT, config["model"], case.weights("target"), ops, trainable=False).to(dtype)
    images = [case[name].to(dtype) for name in ("x_start", "x_aug", "x_aug2", "noise")]
    schedule = NoiseSchedule(config["num_timesteps"])
    result = pretraining_loss(online, target, *images, index, schedule, temperature=config["tmin_tau"])
    result.loss.backward()
    case.check(f"index{index}.loss", result.per_sample)
    case.check(f"index{index}.contrastive_loss", result.terms["contrastive"])
    case.check(f"index{index}.consistency", result.terms["consistency"])
    case.check(f"index{index}.loss_mean", result.loss)
    case.check_gradients(online, f"index{index}.")
    buffers = dict(online.named_buffers())
    for name in case.spec["outputs"]:
        if name.startswith(f"index{index}.buffer_after."):
            case.check(name, buffers[name.split("buffer_after.")[1]])
    assert all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize("name", names("denoise_"))
@each_backend_and_dtype
def test_denoising_step(name, dtype, ops):
    case = Case(name)
    model = _load(EPGViT, case.config["model"], case.weights(), ops).to(dtype)
    result = denoising_loss(
        model,
        case["x_start"].to(dtype),
        case["noise"].to(dtype),
        case["y"],
        case["sigma"].to(dtype),
        NoiseSchedule(case.config["num_timesteps"]),
        parameterization=case.config["prediction_target"],
    )
    result.loss.backward()
    case.check("grid_index", result.terms["index"])
    case.check("loss_per_sample", result.per_sample)
    case.check("loss_mean", result.loss)
    case.check_gradients(model)


@pytest.mark.parametrize("variant", ["stage0", "stage0_with_encoder", "stage2", "stage2_perceptual"])
@each_backend_and_dtype
def test_consistency_step(variant, dtype, ops):
    interpret_only(ops, variant in ("stage0", "stage2_perceptual"))
    case = Case("consistency_step")
    model = _load(EPGViT, case.config["model"], case.weights("gen"), ops).to(dtype)
    perceptual = None
    if variant in ("stage2_perceptual", "stage0_with_encoder"):
        perceptual = _load(RCMViT, case.config["perceptual_model"], case.weights("rcm"), ops, trainable=False).to(dtype)
    stage = int(variant[5])
    recorded = variant.removesuffix("_with_encoder")
    result = consistency_loss(
        model,
        case["x_start"].to(dtype),
        case["noise"].to(dtype),
        case["y"],
        case["t"].to(dtype),
        case[f"r_stage{stage}"].to(dtype),
        stage,
        NoiseSchedule(case.config["num_timesteps"]),
        huber_c=case.config["pseudo_huber_c"],
        perceptual=perceptual,
        temperature=case.config["tmin_tau"],
    )
    result.loss.backward()
    case.check(f"{recorded}.loss", result.per_sample)
    case.check(f"{recorded}.loss_mean", result.loss)
    if variant == "stage2_perceptual":
        case.check("stage2_perceptual.perceptual_loss", result.terms["perceptual"])
    case.check_gradients(model, f"{recorded}.")


def test_contrastive_loss_arithmetic():
    case = Case("numerics")
    f, v = case["nce.f"], case["nce.f_target"]
    case.check("nce.default_tau", info_nce(f, v, 0.2))
    case.check("nce.constant_tau", info_nce(f, v, 0.1))
    others = case["nce.f_target_other_rank"]
    case.check("nce.two_processes_rank1", info_nce(f, v, 0.2, torch.cat([v, others])))
    tau = case["tau.interpolated"]
    case.check("nce.interpolated_tau_diagonal", info_nce(f, v, tau))


def test_interpolated_temperature():
    case = Case("numerics")
    case.check("tau.interpolated", interpolated_temperature(case["nce.sigma_unshifted"], 0.1, 0.35))
    ends = interpolated_temperature(torch.tensor([0.002, 80.0]), 0.1, 0.3)
    assert torch.allclose(ends, torch.tensor([0.1, 0.3]))
