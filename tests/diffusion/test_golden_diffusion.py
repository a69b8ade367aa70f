"""Schedules, preconditioning, guidance and samplers against the official implementation."""

import json
import math

import pytest
import torch

from epg_fast.diffusion import (
    SAMPLERS,
    STOCHASTIC,
    Denoiser,
    NoiseSchedule,
    consistency_r,
    consistency_stage,
    curriculum_scales,
    guided,
)
from epg_fast.models import EPGViT
from epg_fast.training.optimizer import lr_factor
from tests.golden_data import GOLDEN, Case, each_backend, each_backend_and_dtype, interpret_only

SCHEDULES = json.loads((GOLDEN / "schedules.json").read_text())


@pytest.mark.parametrize("scales", [20, 1280])
def test_grid_and_snapping(scales):
    case = Case("numerics")
    schedule = NoiseSchedule(scales)
    case.check(f"sigmas_{scales}", schedule.sigmas())
    case.check(f"get_sigmas_{scales}", schedule.sigma(torch.arange(scales + 1)))
    case.check(f"find_nearest_{scales}", schedule.nearest(case["find_nearest.sigma"]))


@pytest.mark.parametrize("image_size", [32, 64, 256])
def test_preconditioning(image_size):
    case = Case("numerics")
    scalings = Denoiser(None).scalings(case["scalings.sigma"], image_size)
    for name, value in zip(("c_skip", "c_out", "c_in"), scalings, strict=True):
        case.check(f"{name}_h{image_size}", value)


def test_loss_weights_and_consistency_pairs():
    case = Case("numerics")
    case.check("weightings_lognormal", NoiseSchedule(1280).weight(case["weightings_lognormal.index"]))
    parameters = case.config["ect"][0]["param"]
    d0, d1 = parameters["d"]
    for step in case.config["ect"][0]["steps"]:
        stage = consistency_stage(step, d0, d1, parameters["delta"])
        r = consistency_r(case["t_to_r.t"], stage, parameters["q"], parameters["k"], parameters["b"])
        case.check(f"t_to_r_0_step{step}", r)


@pytest.mark.parametrize("entry", SCHEDULES["ema_scale"], ids=lambda e: e["args"]["tau_schedule"])
def test_curriculum(entry):
    a = entry["args"]
    for step, scales in zip(entry["steps"], entry["num_scales"], strict=True):
        assert curriculum_scales(step, a["total_steps"], a["start_scales"], a["end_scales"]) == scales


@pytest.mark.parametrize("entry", SCHEDULES["lr"], ids=lambda e: "-".join(map(str, e["args"].values())))
def test_learning_rate(entry):
    a = entry["args"]
    for step, factor in zip(entry["steps"], entry["scale"], strict=True):
        got = lr_factor(step, a["name"], a["warmup_steps"], a["total_training_steps"], max(a.get("min_scale", 0), 0))
        assert math.isclose(got, factor, rel_tol=1e-9, abs_tol=1e-18)


@pytest.mark.parametrize("entry", SCHEDULES["ect_stage"])
def test_consistency_stage(entry):
    d0, d1 = entry["d"]
    for i, step in enumerate(entry["steps"]):
        assert consistency_stage(step, d0, d1, entry["delta"]) == entry["stage_in_sampler"][i]
        assert consistency_stage(step, d0, d1, entry["delta"], inclusive=False) == entry["stage_in_training_loop"][i]


def _network(case, ops="plain"):
    network = EPGViT(**case.config["model"]).use_ops(ops)
    network.load_state_dict(case.weights())
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("parameterization", ["x0", "edm"])
@each_backend_and_dtype
def test_denoiser(parameterization, dtype, ops):
    case = Case("gen_denoise")
    denoiser = Denoiser(_network(case, ops).to(dtype), parameterization=parameterization)
    x, sigma = case["x_t"].to(dtype), case["sigma"].to(dtype)
    case.check(f"{parameterization}.model_output", denoiser.network_output(x, sigma, case["y"]))
    case.check(f"{parameterization}.denoised", denoiser(x, sigma, case["y"]))


def _options(case, name):
    churn = {k.lower(): v for k, v in case.config["edm_sde"].items()} if name == "edm_sde" else {}
    return churn | ({"step_noise": case["noise_sequence"]} if name in STOCHASTIC else {})


@pytest.mark.parametrize("parameterization", ["x0", "edm"])
@pytest.mark.parametrize("name", SAMPLERS)
@each_backend
def test_sampler(parameterization, name, ops):
    interpret_only(ops, (parameterization, name) in (("edm", "heun"), ("x0", "euler")))
    case = Case("samplers")
    denoiser = Denoiser(_network(case, ops), parameterization=parameterization)
    levels = NoiseSchedule().levels(case.config["steps"], 32)
    torch.testing.assert_close(torch.tensor(levels), case["sigmas"], rtol=1e-6, atol=0)
    got = SAMPLERS[name](denoiser, case["initial_noise"], levels, case["y"], **_options(case, name))
    case.check(f"{parameterization}.{name}.sample", got)


def test_heun_trajectory():
    case = Case("samplers")
    inputs = case["initial_noise"], case["sigmas"], case["y"]
    case.check("x0.heun.trajectory", SAMPLERS["heun"](Denoiser(_network(case)), *inputs, trajectory=True))


@each_backend
@pytest.mark.parametrize("name", ["x0.heun", "edm.euler"])
def test_interval_guidance(name, ops):
    """Same samples as the official code, and the extra unconditional evaluation only inside the interval."""
    interpret_only(ops, name == "edm.euler")
    case = Case("samplers")
    network, cfg = _network(case, ops), case.config["interval_cfg"]
    parameterization, sampler = name.split(".")
    calls = []

    def counted(x, t, y):
        calls.append(x.shape[0] > case["initial_noise"].shape[0])
        return network(x, t, y)

    interval = cfg["low"], cfg["high"]
    denoiser = guided(Denoiser(counted, None, parameterization), cfg["scale"], interval, cfg["uncond_label"])
    got = SAMPLERS[sampler](denoiser, case["initial_noise"], case["sigmas"], case["y"])
    case.check(f"{name}.cfg.sample", got)
    assert calls == [call["guided"] for call in case.config["cfg_calls"][f"{name}.cfg"]]
