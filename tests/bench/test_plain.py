"""The plain code computes what was recorded from the official implementation, without a line of the package."""

import re
from pathlib import Path

import pytest
import torch

from bench import plain
from bench.plain import PlainEncoder, PlainGenerator, from_config
from epg_fast.config import OptimizerConfig
from epg_fast.diffusion import NoiseSchedule
from epg_fast.models import EPGViT, encoder_from_config, generator_from_config, preset_config
from epg_fast.objectives import denoising_loss
from epg_fast.training.optimizer import make_optimizer
from tests.golden_data import Case, names


def _load(case, kind=PlainGenerator, part="", model="model", trainable=True, **changes):
    network = kind(**case.config[model] | changes)
    network.load_state_dict(case.weights(part), strict=True)
    return network.requires_grad_(trainable).train(trainable)


def test_it_shares_no_code_with_the_package():
    source = Path(plain.__file__).read_text(encoding="utf-8")
    assert "import torch" in source and not re.search(r"^\s*(import|from) (epg|bench)", source, re.MULTILINE)


@pytest.mark.parametrize("kind, make", [(PlainGenerator, generator_from_config), (PlainEncoder, encoder_from_config)])
def test_names_and_shapes_of_a_preset_are_those_of_the_package(kind, make):
    config = preset_config("epg_xl_16_256")
    with torch.device("meta"):
        ours, plains = (network.state_dict() for network in (make(config), from_config(kind, config)))
    assert {name: tensor.shape for name, tensor in plains.items()} == {name: t.shape for name, t in ours.items()}


@pytest.mark.parametrize("name", names("epgvit_"))
def test_generator_output_and_gradients(name):
    case = Case(name)
    network, x = _load(case), case["x"].requires_grad_()
    out = network(x, case["t"], case["y"])
    (out * case["r"]).sum().backward()
    case.check("out", out)
    case.check("grad.x", x.grad)
    case.check_gradients(network)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_encoder_output_and_running_statistics(mode):
    case = Case("rcmvit_forward")
    network = _load(case, PlainEncoder).train(mode == "train")
    projection, feature = network(case["x"], case["t"])
    case.check(f"{mode}.proj", projection)
    case.check(f"{mode}.feat", feature)
    _check_buffers(case, network, mode)


def _check_buffers(case, network, prefix):
    start, buffers = f"{prefix}.buffer_after.", dict(network.named_buffers())
    for name in case.spec["outputs"]:
        if name.startswith(start):
            case.check(name, buffers[name.removeprefix(start)])


def test_noise_levels_and_pairs():
    case = Case("numerics")
    for scales in (20, 1280):
        case.check(f"get_sigmas_{scales}", plain.sigma_at(torch.arange(scales + 1), scales).float())
    case.check("t_to_r_0_step99999", plain.consistency_r(case["t_to_r.t"], 1))
    case.check("t_to_r_0_step350000", plain.consistency_r(case["t_to_r.t"], 4))
    case.check("nce.constant_tau", plain.info_nce(case["nce.f"], case["nce.f_target"], 0.1))


@pytest.mark.parametrize("parameterization", ["x0", "edm"])
@pytest.mark.parametrize("name", ["heun", "onestep"])
def test_sampler(parameterization, name):
    case = Case("samplers")
    network = _load(case, trainable=False)
    levels = plain.levels(case.config["steps"], 32)
    torch.testing.assert_close(levels, case["sigmas"], rtol=1e-6, atol=0)
    sample = getattr(plain, f"sample_{name}")
    got = sample(plain.Denoiser(network, parameterization), case["initial_noise"], levels, case["y"])
    case.check(f"{parameterization}.{name}.sample", got)


def test_interval_guidance_calls_the_network_twice_inside_the_interval():
    case = Case("samplers")
    network = _load(case, trainable=False)
    cfg, calls = case.config["interval_cfg"], []

    def counted(x, t, y):
        calls.append((len(x), bool((y == cfg["uncond_label"]).all())))
        return network(x, t, y)

    interval = (cfg["low"], cfg["high"])
    guidance = plain.IntervalGuidance(counted, cfg["uncond_label"], "x0", cfg["scale"], interval)
    got = plain.sample_heun(guidance, case["initial_noise"], case["sigmas"], case["y"])
    case.check("x0.heun.cfg.sample", got)
    batch, wanted = len(case["y"]), []
    for call in case.config["cfg_calls"]["x0.heun.cfg"]:
        wanted += [(batch, False)] + [(batch, True)] * call["guided"]
    assert calls == wanted


def test_the_interval_of_guidance_has_its_upper_end_and_not_its_lower():
    calls = []
    guidance = plain.IntervalGuidance(lambda x, t, y: calls.append(int(y)) or x, 10, interval=(0.25, 1.0))
    for sigma in (0.25, 0.26, 1.0, 1.01):
        guidance(torch.ones(1, 3, 64, 64), torch.tensor([sigma]), torch.tensor([3]))
    assert calls == [3, 3, 10, 3, 10, 3]


@pytest.mark.parametrize("index", Case("pretrain_step").config["indices"])
def test_pretraining_loss(index):
    case = Case("pretrain_step")
    online, target = (_load(case, PlainEncoder, part, trainable=part == "online") for part in ("online", "target"))
    images = [case[name] for name in ("x_start", "x_aug", "x_aug2", "noise")]
    loss = plain.pretraining_loss(online, target, *images, torch.tensor(index), case.config["num_timesteps"])
    loss.mean().backward()
    case.check(f"index{index}.loss", loss)
    case.check_gradients(online, f"index{index}.")
    _check_buffers(case, online, f"index{index}")


@pytest.mark.parametrize("name", names("denoise_"))
def test_denoising_loss(name):
    case = Case(name)
    network, inputs = _load(case), [case[part] for part in ("x_start", "noise", "y", "sigma")]
    loss = plain.denoising_loss(network, *inputs, case.config["num_timesteps"], case.config["prediction_target"])
    loss.mean().backward()
    case.check("loss_per_sample", loss)
    case.check_gradients(network)


@pytest.mark.parametrize("variant", ["stage0", "stage0_with_encoder", "stage2", "stage2_perceptual"])
def test_consistency_loss(variant):
    case, stage, perceptual = Case("consistency_step"), int(variant[5]), None
    network = _load(case, part="gen")
    if variant in ("stage2_perceptual", "stage0_with_encoder"):
        perceptual = _load(case, PlainEncoder, "rcm", "perceptual_model", trainable=False)
    inputs = [case[name] for name in ("x_start", "noise", "y", "t", f"r_stage{stage}")]
    loss = plain.consistency_loss(network, *inputs, stage, perceptual)
    loss.mean().backward()
    recorded = variant.removesuffix("_with_encoder")
    case.check(f"{recorded}.loss", loss)
    case.check_gradients(network, f"{recorded}.")


def test_both_passes_of_the_consistency_loss_drop_the_same_values():
    case = Case("consistency_step")
    network = _load(case, part="gen", drop=0.5)
    x, noise, y, t = (case[name] for name in ("x_start", "noise", "y", "t"))
    assert not torch.equal(network(x, t, y), network(x, t, y))
    loss = plain.consistency_loss(network, x, noise, y, t, 0.999 * t, 2)
    apart = plain.consistency_loss(network.eval(), x, noise, y, t, 0.999 * t, 2)
    assert loss.sum() < 3 * apart.sum()  # other masks would make it many times as large


def _trainer(**options):
    case = Case("denoise_x0")
    network, ema = (_load(case) for _ in range(2))
    inputs = [case[part] for part in ("x_start", "noise", "y", "sigma")]
    return case, inputs, plain.Trainer(network, ema, exempt=("pos_embed", "cls_token"), **options)


def test_updates_are_those_of_the_package_clipping_included():
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 5.0, "clip_norm": 0.5}
    case, inputs, trainer = _trainer(ema_decay=0.9, dtype=None, **options)
    ours, our_ema = (_load(case, EPGViT) for _ in range(2))
    optimizer = make_optimizer(ours, OptimizerConfig("torch", **options), [our_ema])
    before = ours.state_dict()["out.weight"].clone()
    for _ in range(3):
        loss = denoising_loss(ours, *inputs, NoiseSchedule()).loss
        loss.backward()
        optimizer.schedule(1.0, 0.5, [0.9])
        norm, _ = optimizer.step()
        optimizer.zero_grad()
        assert norm > 0.5
        assert trainer.step(plain.denoising_loss, *inputs) == pytest.approx(loss.item(), rel=1e-3)
    assert (ours.state_dict()["out.weight"] - before).abs().max() > 1e-3
    for ends, own in ((ours, trainer.network), (our_ema, trainer.ema)):
        for (name, want), got in zip(ends.named_parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=3e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_but_the_loss_scale():
    _, inputs, trainer = _trainer(dtype=torch.float16)
    before = [tensor.clone() for net in (trainer.network, trainer.ema) for tensor in net.state_dict().values()]
    trainer.step(lambda network, *rest: plain.denoising_loss(network, *rest) * float("inf"), *inputs)
    after = [tensor for net in (trainer.network, trainer.ema) for tensor in net.state_dict().values()]
    assert trainer.scaler.get_scale() == 2**13 and all(map(torch.equal, before, after))
