"""Diffusion against closed forms: for Gaussian data the denoiser, the ODE and the SDE are known exactly."""

import math

import pytest
import torch

from epg_fast.diffusion import SAMPLERS, STOCHASTIC, Denoiser, NoiseSchedule, autoguided, consistency_r, guided
from tests.ops.kernel_checks import each_steps_backend

STD = 0.3


def gaussian_denoiser(x, sigma, y=None):
    """E[x0 | x] for data N(0, STD^2)."""
    return x * STD**2 / (STD**2 + sigma**2)


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "onestep"])
def test_samplers_turn_noise_into_the_data_distribution(name):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    levels = NoiseSchedule().levels(256, 64)
    options = {"generator": generator} if name in STOCHASTIC else {}
    options |= {"s_churn": 40.0} if name == "edm_sde" else {}
    x = SAMPLERS[name](gaussian_denoiser, noise, levels, clamp=None, **options)
    assert x.std() == pytest.approx(STD, rel=0.05) and abs(x.mean()) < 0.01


def test_heun_converges_with_second_order():
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for steps in (40, 80):
        levels = NoiseSchedule().levels(steps, 64)
        exact = levels[0] * math.sqrt((STD**2 + levels[-1] ** 2) / (STD**2 + levels[0] ** 2))
        got = SAMPLERS["heun"](gaussian_denoiser, noise, levels, clamp=None).item()
        errors.append(abs(got - exact))
    assert 3 < errors[0] / errors[1] < 5


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_repeat_with_a_generator_and_take_given_noise(name):
    noise, levels = torch.randn(2, 3, 4, 4), [8.0, 2.0, 0.5]
    options = {"s_churn": 40.0} if name == "edm_sde" else {}

    def run(**source):
        return SAMPLERS[name](gaussian_denoiser, noise, levels, **options, **source)

    draws = run(generator=torch.Generator().manual_seed(3))
    assert torch.equal(draws, run(generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(draws, run(generator=torch.Generator().manual_seed(4)))
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(noise.shape, generator=generator) for _ in range(2)]
    assert torch.equal(run(step_noise=given), draws)
    assert torch.equal(run(step_noise=torch.stack(given)), draws)
    assert torch.equal(run(step_noise=lambda i: given[i]), draws)


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "onestep"])
def test_too_few_levels_are_refused(name):
    with pytest.raises(ValueError, match="got 1 noise level"):
        SAMPLERS[name](gaussian_denoiser, torch.randn(1, 3, 4, 4), [80.0])


class _Classes(torch.nn.Module):
    """A network whose output is its label."""

    num_classes = 10

    def forward(self, x, t, y):
        return y.to(x.dtype).view(-1, 1, 1, 1).expand_as(x)


def test_guidance_combines_raw_outputs_inside_the_interval_only():
    x, y = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3])
    denoiser = guided(Denoiser(_Classes()), 2.5, (0.2, 1.6))
    inside = 10 + 2.5 * (y - 10.0)
    for sigma, want in ((0.8, inside), (0.1, y), (0.11, inside), (0.81, y), (5.0, y)):
        got = denoiser(x, sigma, y)
        torch.testing.assert_close(got[:, 0, 0, 0], want.to(got.dtype), msg=f"sigma {sigma}")
    mixed = denoiser(x, torch.tensor([0.8, 0.1, 5.0]), y)
    torch.testing.assert_close(mixed[:, 0, 0, 0], torch.tensor([inside[0].item(), 2.0, 3.0]))


def test_autoguidance_moves_away_from_the_weak_network():
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([4, 6])
    weak = lambda x, t, y: _Classes()(x, t, y) / 2  # noqa: E731
    got = autoguided(Denoiser(_Classes()), weak, 3.0)(x, 1.0, y)
    torch.testing.assert_close(got[:, 0, 0, 0], torch.tensor([4 + 3 * 2.0, 6 + 3 * 3.0]))


def test_guided_denoisers_can_be_guided_again():
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([4, 6])
    weak = lambda x, t, y: 0.5 * _Classes()(x, t, y)  # noqa: E731
    both = guided(autoguided(Denoiser(_Classes()), weak, 3.0), 2.0, (0.0, 100.0))(x, 1.0, y)
    auto = lambda label: label + 3 * (label - 0.5 * label)  # noqa: E731
    want = torch.tensor([auto(10) + 2 * (auto(label) - auto(10)) for label in (4.0, 6.0)])
    torch.testing.assert_close(both[:, 0, 0, 0], want)
    both = autoguided(guided(Denoiser(_Classes()), 2.0, (0.0, 100.0)), weak, 3.0)(x, 1.0, y)
    strong = torch.tensor([10 + 2 * (label - 10.0) for label in (4.0, 6.0)])
    torch.testing.assert_close(both[:, 0, 0, 0], strong + 3 * (strong - torch.tensor([2.0, 3.0])))


ODE = pytest.mark.parametrize("name", ["euler", "heun"])
LEVELS = [8.0, 2.0, 0.5, 0.1]


@ODE
@each_steps_backend
def test_sampling_leaves_the_noise_and_the_networks_outputs_alone(name, steps_backend):
    noise, outputs = torch.randn(2, 3, 4, 4), []

    def recording(x, sigma, y):
        outputs.append((output := gaussian_denoiser(x, sigma), output.clone()))
        return output

    before = noise.clone()
    SAMPLERS[name](recording, noise, LEVELS, steps_backend=steps_backend)
    assert torch.equal(noise, before)
    assert outputs and all(torch.equal(now, then) for now, then in outputs)


@ODE
@each_steps_backend
@pytest.mark.parametrize("clamp", [None, (-0.5, 0.5), (-0.5 * torch.ones(3, 1, 1), 0.5 * torch.ones(3, 1, 1))], ids=str)
def test_the_backend_of_the_steps_and_the_trajectory_change_nothing(name, steps_backend, clamp):
    noise = torch.randn(2, 3, 4, 4)
    wanted, x = [], noise * LEVELS[0]
    bounded = (lambda estimate: estimate) if clamp is None else (lambda estimate: estimate.clamp(*clamp))
    for sigma, sigma_next in zip(LEVELS, LEVELS[1:], strict=False):
        slope = (x - bounded(gaussian_denoiser(x, sigma))) / sigma
        ahead = x + (sigma_next - sigma) * slope
        slope_ahead = (ahead - bounded(gaussian_denoiser(ahead, sigma_next))) / sigma_next
        x = ahead if name == "euler" else x + (sigma_next - sigma) * (slope + slope_ahead) / 2
        wanted.append(x)
    options = {"clamp": clamp, "steps_backend": steps_backend}
    states = SAMPLERS[name](gaussian_denoiser, noise, LEVELS, trajectory=True, **options)
    assert torch.equal(states, torch.stack(wanted))
    assert torch.equal(SAMPLERS[name](gaussian_denoiser, noise, LEVELS, **options), wanted[-1])


@ODE
@each_steps_backend
@pytest.mark.parametrize("clamp", [None, (-0.5, 0.5)], ids=str)
def test_a_network_may_return_the_same_memory_again_or_its_input_or_another_layout(name, steps_backend, clamp):
    noise, place = torch.randn(2, 3, 4, 4), torch.empty(2, 3, 4, 4)
    options = {"clamp": clamp, "steps_backend": steps_backend}
    wanted = SAMPLERS[name](gaussian_denoiser, noise, LEVELS, clamp=clamp)
    same_memory = lambda x, sigma, y: place.copy_(gaussian_denoiser(x, sigma))  # noqa: E731
    assert torch.equal(SAMPLERS[name](same_memory, noise, LEVELS, **options), wanted)
    channels_last = lambda x, sigma, y: gaussian_denoiser(x, sigma).to(memory_format=torch.channels_last)  # noqa: E731
    assert torch.equal(SAMPLERS[name](channels_last, noise, LEVELS, **options), wanted)
    identity = lambda x, sigma, y: x  # noqa: E731
    wanted = SAMPLERS[name](lambda x, sigma, y: x.clone(), noise, LEVELS, clamp=clamp)
    assert torch.equal(SAMPLERS[name](identity, noise, LEVELS, **options), wanted)


@ODE
def test_plain_steps_have_gradients_and_the_extension_says_that_it_has_none(name):
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    SAMPLERS[name](gaussian_denoiser, noise, LEVELS, clamp=None).sum().backward()
    assert noise.grad.abs().min() > 0
    with pytest.raises(ValueError, match="got x in torch.float64, wanted torch.float32"):
        SAMPLERS[name](gaussian_denoiser, noise.detach(), LEVELS, steps_backend="extension")
    with pytest.raises(ValueError, match="got x that requires a gradient"):
        SAMPLERS[name](gaussian_denoiser, noise.detach().float().requires_grad_(), LEVELS, steps_backend="extension")
    with pytest.raises(ValueError, match="got backend='fast', wanted one of plain, extension"):
        SAMPLERS[name](gaussian_denoiser, noise.detach(), LEVELS, steps_backend="fast")


@pytest.mark.parametrize("sigmas", [[1.0, 2.0], [1.0, 0.0], [float("nan"), 1.0], [1.0, 1.0]])
def test_levels_must_be_positive_and_fall(sigmas):
    with pytest.raises(ValueError, match="positive noise levels that fall"):
        SAMPLERS["heun"](gaussian_denoiser, torch.randn(1, 3, 4, 4), sigmas)


def test_edm_denoiser_is_the_identity_at_the_lowest_level():
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    denoiser = Denoiser(_Classes(), parameterization="edm")
    torch.testing.assert_close(denoiser(x, 0.002 * 32 / 64, torch.tensor([1, 2])), x)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="x0, edm"):
        Denoiser(None, parameterization="epsilon")
    with pytest.raises(ValueError, match="at least 2"):
        NoiseSchedule(1)
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        NoiseSchedule(20, sigma_min=3, sigma_max=2)
    with pytest.raises(ValueError, match="labels y are missing"):
        guided(Denoiser(_Classes()), 2.0)(torch.randn(1, 3, 8, 8), 0.1)


def test_the_levels_of_a_pair_meet_after_thousands_of_stages():
    """2^1024 is no float."""
    t = torch.tensor([0.002, 0.5, 80.0])
    for stage in (1023, 1024, 100_000):
        assert torch.equal(consistency_r(t, stage), t)
