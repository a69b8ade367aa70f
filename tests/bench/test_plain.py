"""The lowest rung computes what was recorded from the official implementation, without a line of the package."""

from pathlib import Path

import pytest
import torch

from bench import plain
from bench.plain.networks import timestep_embedding
from bench.plain.training import info_nce
from epg_fast.models import EPGViT, RCMViT
from tests.golden_data import Case, names
from tests.test_layout import imported_packages


def _load(kind, config, weights, trainable=True):
    network = kind(**config)
    network.load_state_dict(weights, strict=True)
    return network.requires_grad_(trainable).train(trainable)


def test_it_shares_no_code_with_the_package():
    for path in Path(plain.__file__).parent.glob("*.py"):
        assert not imported_packages(path) & {"epg_fast", "epg_kernels"}, path


@pytest.mark.parametrize("kind, twin", [(plain.PlainGenerator, EPGViT), (plain.PlainEncoder, RCMViT)])
def test_names_and_shapes_of_a_preset_are_those_of_the_package(kind, twin):
    from epg_fast.models import encoder_from_config, generator_from_config, preset_config

    config = preset_config("epg_xl_16_256")
    with torch.device("meta"):
        ours = (generator_from_config if twin is EPGViT else encoder_from_config)(config)
        network = plain.from_config(kind, config)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in ours.state_dict().items()}


def test_timestep_embedding():
    case = Case("timestep_embedding")
    for dim in case.config["dims"]:
        case.check(f"embedding_dim{dim}", timestep_embedding(case["t"], dim))


@pytest.mark.parametrize("name", names("epgvit_"))
def test_generator_output_and_gradients(name):
    case = Case(name)
    network = _load(plain.PlainGenerator, case.config["model"], case.weights())
    x = case["x"].requires_grad_()
    out = network(x, case["t"], case["y"])
    (out * case["r"]).sum().backward()
    case.check("out", out)
    case.check("grad.x", x.grad)
    case.check_gradients(network)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_encoder_output_and_running_statistics(mode):
    case = Case("rcmvit_forward")
    network = _load(plain.PlainEncoder, case.config["model"], case.weights()).train(mode == "train")
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
    case.check("nce.constant_tau", info_nce(case["nce.f"], case["nce.f_target"], 0.1))


@pytest.mark.parametrize("parameterization", ["x0", "edm"])
def test_denoiser(parameterization):
    case = Case("gen_denoise")
    network = _load(plain.PlainGenerator, case.config["model"], case.weights(), trainable=False)
    denoiser = plain.Denoiser(network, parameterization)
    arguments = case["x_t"], case["sigma"], case["y"]
    case.check(f"{parameterization}.model_output", denoiser.network_output(*arguments))
    case.check(f"{parameterization}.denoised", denoiser(*arguments))


SAMPLERS = ("euler", "heun", "onestep", "euler_sde", "euler_ancestral", "edm_sde")


@pytest.mark.parametrize("parameterization", ["x0", "edm"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler(parameterization, name):
    case = Case("samplers")
    network = _load(plain.PlainGenerator, case.config["model"], case.weights(), trainable=False)
    levels = plain.levels(case.config["steps"], 32)
    torch.testing.assert_close(levels, case["sigmas"], rtol=1e-6, atol=0)
    options = {"noises": case["noise_sequence"]} if name in SAMPLERS[3:] else {}
    if name == "edm_sde":
        options |= {option.lower(): value for option, value in case.config["edm_sde"].items()}
    sample = getattr(plain, f"sample_{name}")
    got = sample(plain.Denoiser(network, parameterization), case["initial_noise"], levels, case["y"], **options)
    case.check(f"{parameterization}.{name}.sample", got)


@pytest.mark.parametrize("name", ["x0.heun", "edm.euler"])
def test_interval_guidance_calls_the_network_twice_inside_the_interval(name):
    case = Case("samplers")
    network = _load(plain.PlainGenerator, case.config["model"], case.weights(), trainable=False)
    cfg, calls = case.config["interval_cfg"], []

    def counted(x, t, y):
        calls.append((len(x), bool((y == cfg["uncond_label"]).all())))
        return network(x, t, y)

    parameterization, sampler = name.split(".")
    guidance = plain.IntervalGuidance(
        counted, cfg["uncond_label"], parameterization, cfg["scale"], (cfg["low"], cfg["high"])
    )
    got = getattr(plain, f"sample_{sampler}")(guidance, case["initial_noise"], case["sigmas"], case["y"])
    case.check(f"{name}.cfg.sample", got)
    batch, wanted = len(case["y"]), []
    for call in case.config["cfg_calls"][f"{name}.cfg"]:
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
    online = _load(plain.PlainEncoder, case.config["model"], case.weights("online"))
    target = _load(plain.PlainEncoder, case.config["model"], case.weights("target"), trainable=False)
    images = [case[name] for name in ("x_start", "x_aug", "x_aug2", "noise")]
    loss = plain.pretraining_loss(online, target, *images, torch.tensor(index), case.config["num_timesteps"])
    loss.mean().backward()
    case.check(f"index{index}.loss", loss)
    case.check_gradients(online, f"index{index}.")
    _check_buffers(case, online, f"index{index}")


@pytest.mark.parametrize("name", names("denoise_"))
def test_denoising_loss(name):
    case = Case(name)
    network = _load(plain.PlainGenerator, case.config["model"], case.weights())
    inputs = [case[part] for part in ("x_start", "noise", "y", "sigma")]
    loss = plain.denoising_loss(network, *inputs, case.config["num_timesteps"], case.config["prediction_target"])
    loss.mean().backward()
    case.check("loss_per_sample", loss)
    case.check_gradients(network)


@pytest.mark.parametrize("variant", ["stage0", "stage0_with_encoder", "stage2", "stage2_perceptual"])
def test_consistency_loss(variant):
    case = Case("consistency_step")
    network = _load(plain.PlainGenerator, case.config["model"], case.weights("gen"))
    perceptual, stage = None, int(variant[5])
    if variant in ("stage2_perceptual", "stage0_with_encoder"):
        perceptual = _load(plain.PlainEncoder, case.config["perceptual_model"], case.weights("rcm"), trainable=False)
    inputs = [case[name] for name in ("x_start", "noise", "y", "t", f"r_stage{stage}")]
    loss = plain.consistency_loss(network, *inputs, stage, perceptual)
    loss.mean().backward()
    recorded = variant.removesuffix("_with_encoder")
    case.check(f"{recorded}.loss", loss)
    case.check_gradients(network, f"{recorded}.")


def test_both_passes_of_the_consistency_loss_drop_the_same_values():
    case = Case("consistency_step")
    network = _load(plain.PlainGenerator, case.config["model"] | {"drop": 0.5}, case.weights("gen"))
    x, noise, y, t = (case[name] for name in ("x_start", "noise", "y", "t"))
    assert not torch.equal(network(x, t, y), network(x, t, y))
    loss = plain.consistency_loss(network, x, noise, y, t, 0.999 * t, 2)
    apart = plain.consistency_loss(network.eval(), x, noise, y, t, 0.999 * t, 2)
    assert loss.sum() < 3 * apart.sum()  # other masks would make it many times as large


def _twins(betas, **options):
    """A plain trainer and the package's network with the same weights."""
    case = Case("denoise_x0")
    networks = [
        _load(kind, case.config["model"], case.weights()) for kind in (plain.PlainGenerator,) * 2 + (EPGViT,) * 2
    ]
    network, average, ours, our_average = networks
    trainer = plain.Trainer(network, average, betas=betas, exempt=("pos_embed", "cls_token"), **options)
    return case, trainer, ours, our_average


def test_three_updates_are_those_of_the_package_warm_up_and_clipping_included():
    from epg_fast.config import OptimizerConfig
    from epg_fast.diffusion import NoiseSchedule
    from epg_fast.objectives import denoising_loss
    from epg_fast.training.optimizer import lr_factor, make_optimizer

    options = {"lr": 1e-3, "weight_decay": 5.0}
    case, trainer, ours, our_average = _twins(
        (0.9, 0.99), average_decay=0.9, warmup_steps=2, clip_norm=0.5, dtype=None, **options
    )
    config = OptimizerConfig("torch", betas=(0.9, 0.99), clip_norm=0.5, clip_after=2, **options)
    optimizer = make_optimizer(ours, config, [our_average])
    inputs = [case[part] for part in ("x_start", "noise", "y", "sigma")]
    before = ours.state_dict()["out.weight"].clone()
    for step in range(4):
        loss = denoising_loss(ours, *inputs, NoiseSchedule()).loss
        loss.backward()
        optimizer.schedule(lr_factor(step, "warmup-step", 2, 10), 0.5 if step >= 2 else None, [0.9])
        norm, _ = optimizer.step()
        optimizer.zero_grad()
        assert norm > 0.5
        assert trainer.step(plain.denoising_loss, *inputs) == pytest.approx(loss.item(), rel=1e-3)
    assert (ours.state_dict()["out.weight"] - before).abs().max() > 1e-3
    for ends, own in ((ours, trainer.network), (our_average, trainer.average)):
        for (name, want), got in zip(ends.named_parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=3e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_but_the_loss_scale():
    case, trainer, *_ = _twins((0.9, 0.99), dtype=torch.float16, warmup_steps=0)
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    inputs = [case[part] for part in ("x_start", "noise", "y", "sigma")]
    trainer.step(lambda network, *rest: plain.denoising_loss(network, *rest) * float("inf"), *inputs)
    assert trainer.steps == 0 and trainer.scaler.get_scale() == 2**13
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.network.state_dict().items())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_each_stage_has_a_step_that_returns_the_loss_and_moves_weights_and_average(dtype):
    case = Case("consistency_step")
    generators = [_load(plain.PlainGenerator, case.config["model"], case.weights("gen")) for _ in range(2)]
    encoders = [_load(plain.PlainEncoder, case.config["perceptual_model"], case.weights("rcm")) for _ in range(3)]
    x, y = case["x_start"], case["y"]
    frozen = encoders.pop().eval().requires_grad_(False)
    steps = [
        (encoders, lambda trainer: plain.pretraining_step(trainer, x, x.flip(-1), x.flip(-2), num_scales=21)),
        (generators, lambda trainer: plain.denoising_step(trainer, x, y)),
        (generators, lambda trainer: plain.consistency_step(trainer, x, y, 2, frozen)),
    ]
    for (network, average), step in steps:
        average.eval()
        before, averaged = network.pos_embed.clone(), average.pos_embed.clone()
        loss = step(plain.Trainer(network, average, warmup_steps=0, dtype=dtype))
        assert isinstance(loss, float) and loss > 0
        assert not torch.equal(network.pos_embed, before) and not torch.equal(average.pos_embed, averaged)
