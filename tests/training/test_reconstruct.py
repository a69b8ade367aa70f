"""EMA of any length after training: the fit of one profile by others, and weights from snapshots on disk."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from epg_fast.__main__ import main
from epg_fast.config import DiffusionConfig, PosthocEmaConfig
from epg_fast.models import from_pretrained, load_weights, save_weights
from epg_fast.training.ema import PosthocEma, gamma_of
from epg_fast.training.reconstruct import fit_profile, inner_products, reconstruct
from tests.training.runs import fails, run_command
from tests.training.stages import ALONE
from tests.training.test_ema import content, direct_ema

# ---- profiles


@pytest.mark.parametrize(
    "step_a, sigma_a, step_b, sigma_b", [(3, 0.05, 3, 0.05), (7, 0.05, 2, 0.1), (2, 0.25, 9, 0.07), (5, 0.1, 6, 0.1)]
)
def test_inner_products_agree_with_quadrature(step_a, sigma_a, step_b, sigma_b):
    nodes, quadrature = np.polynomial.legendre.leggauss(80)
    a, b, end = gamma_of(sigma_a), gamma_of(sigma_b), min(step_a, step_b)
    tau = end * (nodes + 1) / 2
    product = (a + 1) * tau**a / step_a ** (a + 1) * (b + 1) * tau**b / step_b ** (b + 1)
    assert inner_products(step_a, a, step_b, b) == pytest.approx(end / 2 * quadrature @ product, rel=1e-9)


def tracked(count, widths=(0.05, 0.1), every=10.0):
    """Profiles of `count` snapshots: (steps, gammas)."""
    return np.repeat(np.arange(1, count + 1) * every, len(widths)), np.tile([gamma_of(w) for w in widths], count)


@pytest.mark.parametrize(("count", "sigma_rel"), [(4, 0.075), (20, 0.075), (100, 0.15), (100, 0.03)])
def test_the_residual_is_the_distance_of_the_profiles(count, sigma_rel):
    steps, gammas = tracked(count)
    fit = fit_profile(steps, gammas, count * 10, gamma_of(sigma_rel))
    assert fit.weights.sum() == pytest.approx(1, abs=1e-9)
    tau = (np.arange(20_000) + 0.5) / 20_000 * count * 10
    profiles = [(g + 1) * (tau / t) ** g / t * (tau <= t) for t, g in zip(steps, gammas, strict=True)]
    gamma = gamma_of(sigma_rel)
    wanted = (gamma + 1) * (tau / count / 10) ** gamma / count / 10
    distance = np.linalg.norm(fit.weights @ np.array(profiles) - wanted) / np.linalg.norm(wanted)
    assert distance == pytest.approx(fit.residual, rel=0.05)


def test_no_weights_of_sum_1_fit_better():
    steps, gammas = tracked(6)
    gamma = gamma_of(0.07)
    products = inner_products(steps[:, None], gammas[:, None], steps, gammas)
    wanted = inner_products(steps, gammas, 60, gamma)
    gradient = products @ fit_profile(steps, gammas, 60, gamma).weights - wanted
    np.testing.assert_allclose(gradient, gradient.mean(), atol=1e-9 * abs(wanted).max())


@pytest.mark.parametrize("widths", [(0.05, 0.1), (0.1,), (0.1, 0.1001, 0.1002)])
def test_a_tracked_width_at_the_last_snapshot_is_that_snapshot(widths):
    steps, gammas = tracked(50, widths)
    fit = fit_profile(steps, gammas, 500, gamma_of(widths[-1]))
    assert fit.residual < 1e-6 and fit.gain <= 1 + 1e-6
    if len(widths) < 3:  # EMA that are nearly the same can stand for each other
        np.testing.assert_allclose(fit.weights, np.eye(len(steps))[-1], atol=1e-8)


# ---- snapshots

WIDTHS, STEPS, EVERY = [0.05, 0.10], 600, 20


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """(run folder with 30 snapshots, weights after each step): a trajectory that drifts, bends and trembles.

    float16 cannot hold one of the two parameters, and there is a buffer.
    """
    folder = tmp_path_factory.mktemp("synthetic") / "run"
    folder.mkdir()
    network = torch.nn.Module()
    network.weight = torch.nn.Parameter(torch.zeros(3, 40))
    network.huge = torch.nn.Parameter(torch.full((2,), 1e5))
    network.register_buffer("count", torch.tensor(0))
    about = {"stage": "synthetic", "config": {"depth": 1}}
    config = DiffusionConfig(outdir=str(folder), steps=STEPS, posthoc_ema=PosthocEmaConfig(WIDTHS, EVERY))
    stage = SimpleNamespace(config=config, network=network, ranks=ALONE, sharded=False, metadata=lambda: about)
    posthoc = PosthocEma(stage)
    trajectory, generator = [], torch.Generator().manual_seed(0)
    start, drift, tremble = (torch.randn(3, 40, generator=generator) for _ in range(3))
    for step in range(STEPS):
        progress = (step + 1) / STEPS
        noise = torch.randn(3, 40, generator=generator)
        weights = start + drift * progress**0.5 + 0.2 * tremble * np.sin(9 * progress) + 0.1 * noise
        trajectory.append(weights)
        with torch.no_grad():
            network.weight.copy_(weights)
            network.count.fill_(step + 1)
            for ema, decay in zip(posthoc.networks, posthoc.decays(step), strict=True):
                ema.weight.lerp_(weights, 1 - decay)
                ema.huge.lerp_(network.huge, 1 - decay)
        if posthoc.is_due(step + 1):
            posthoc.write(step + 1, posthoc.snapshot())
    return folder, trajectory


def _error(got, want):
    return (got.double() - want).square().mean().sqrt().item()


@pytest.mark.parametrize("sigma_rel, step", [(0.04, 600), (0.06, 300), (0.075, 600), (0.12, 300), (0.15, 600)])
def test_other_widths_are_the_ema_of_the_whole_trajectory(synthetic, sigma_rel, step):
    """The weights, of size 1, move by 1; root mean square error at a snapshot: below 7e-4, float16's part included."""
    folder, trajectory = synthetic
    state, metadata = reconstruct(folder, sigma_rel, step)
    want, made = direct_ema(trajectory[:step], sigma_rel), metadata["posthoc_ema"]
    error = _error(state["weight"], want)
    assert metadata["step"] == step and metadata["sigma_rel"] == sigma_rel
    assert state["count"] == step
    torch.testing.assert_close(state["huge"], torch.full((2,), 1e5))
    # the residual says how far the profile can be off, times what moves and the norm of the profile in steps
    gamma = gamma_of(sigma_rel)
    norm = ((gamma + 1) ** 2 / (2 * gamma + 1) / step) ** 0.5
    moved = torch.stack(trajectory[:step]).double()
    moved = (moved - moved.mean(0)).square().sum(0).mean().sqrt().item()
    assert error < made["residual"] * norm * moved + 2 * made["rounding"]
    saved = load_file(folder / f"posthoc_ema/step_{step:09d}.safetensors")
    assert error < 7e-4 < min(_error(saved[f"{width}/weight"], want) for width in WIDTHS) / 4


@pytest.mark.parametrize("step", [20, 600])
def test_a_tracked_width_at_a_snapshot_is_given_back(synthetic, step):
    folder, trajectory = synthetic
    saved = load_file(folder / "posthoc_ema" / f"step_{step:09d}.safetensors")
    state, metadata = reconstruct(folder, 0.1, step)
    assert saved["0.1/weight"].dtype == torch.float16 and saved["0.1/huge"].dtype == torch.float32
    assert state["weight"].dtype == torch.float32 and torch.equal(state["weight"], saved["0.1/weight"].float())
    assert metadata["posthoc_ema"]["residual"] == 0
    assert _error(state["weight"], direct_ema(trajectory[:step], 0.1)) < 4e-4


@pytest.mark.parametrize("job", ["finetune-diffusion", "pretrain"])
def test_reconstructed_weights_are_used_like_any(job, tiny_run, tmp_path, capsys):
    """Those of a step; the encoder's statistics of BatchNorm are of that step, too: four calls of the head a step."""
    run, out = tmp_path / "run", tmp_path / "new" / "wide.safetensors"
    flags = {"steps": 6, "posthoc_ema.sigma_rel": "[0.05,0.10]", "posthoc_ema.every": 1}
    assert main(run_command(tiny_run, run, job, **flags)) == 0
    command = ["reconstruct-ema", "--run", run, "--sigma_rel", "0.08", "--step", "5", "--output", out]
    capsys.readouterr()
    assert main([str(word) for word in command]) == 0
    said = capsys.readouterr().out
    assert "sigma_rel 0.08 (gamma 9.452)" in said and "step 5 from 5 snapshots of sigma_rel 0.05, 0.1" in said
    fails(capsys, command, "nothing is overwritten")
    model, own = from_pretrained(out), from_pretrained(run)
    assert model.metadata["parameterization"] == own.metadata["parameterization"]
    assert model.state_dict().keys() == own.state_dict().keys()
    counts = [b for name, b in model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert all(count == 20 for count in counts) and bool(counts) == (job == "pretrain")


# ---- mistakes


def _command(run, tmp_path, *flags):
    return ["reconstruct-ema", "--run", run, "--sigma_rel", "0.07", "--output", tmp_path / "x.safetensors", *flags]


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--sigma_rel", "0.3"], ["sigma_rel is 0.3", "less than 0.2887"]),
        (["--step", "601"], ["step is 601", "20 to 600", "such as 580 or 600"]),
        (["--step", "290"], ["step is 290", "such as 280 or 300"]),
        (["--step", "20"], ["the 1 snapshots up to there", "over max_residual 0.05", "--max_residual"]),
        (["--sigma_rel", "0.001"], ["relative residual of 0.86", "--posthoc_ema.every"]),
        (["--output", "x.pth"], [".safetensors"]),
        (["--run", "."], ["posthoc_ema holds no snapshots", "--posthoc_ema.sigma_rel"]),
    ],
    ids=str,
)
def test_impossible_requests_are_refused(flags, expected, capsys, synthetic, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(capsys, _command(synthetic[0], tmp_path, *flags), *expected)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def damaged(synthetic, tmp_path):
    """A copy of the synthetic run, and the snapshot of step 160 there."""
    shutil.copytree(synthetic[0], tmp_path / "run")
    return tmp_path / "run", tmp_path / "run/posthoc_ema/step_000000160.safetensors"


@pytest.mark.parametrize("damage", ["half", "header", "empty", "one bit"])
def test_a_damaged_snapshot_is_named_and_can_be_done_without(damage, capsys, damaged, tmp_path):
    run, snapshot = damaged
    content = bytearray(snapshot.read_bytes())
    content[-9] ^= 1
    length = {"half": len(content) // 2, "header": 20, "empty": 0}.get(damage, len(content))
    snapshot.write_bytes(content[:length])
    reason = "the checksum of" if damage == "one bit" else ""
    fails(capsys, _command(run, tmp_path), f"step_000000160.safetensors: not a readable snapshot ({reason}")
    snapshot.unlink()
    assert main([str(a) for a in _command(run, tmp_path)]) == 0


@pytest.mark.parametrize(
    "tensors, about, expected",
    [
        ({}, {"config": {"depth": 2}}, "config.depth was 1, now 2"),
        ({}, {"sigma_rel": [0.05, 0.2]}, "sigma_rel was [0.05, 0.1], now [0.05, 0.2]"),
        ({}, {"step": 60}, "it is of step 60, unlike its name"),
        ({}, {"crc32": None, "step": None, "sigma_rel": None}, "it does not say step, sigma_rel and crc32"),
        ({"0.05/weight": torch.zeros(3, 41)}, {}, "0.05/weight was [3, 40], now [3, 41]"),
        ({"0.1/huge": None}, {}, "0.1/huge was [2], now None"),
    ],
    ids=["another network", "other widths", "another step", "no snapshot", "another shape", "less"],
)
def test_snapshots_of_another_model_or_run_are_named(tensors, about, expected, capsys, damaged, tmp_path):
    run, snapshot = damaged
    with pytest.raises(ValueError, match="is a snapshot of"):
        load_weights(snapshot)
    state, metadata = content(snapshot)
    state = {name: t for name, t in (state | tensors).items() if t is not None}
    save_weights(snapshot, state, {name: v for name, v in (metadata | about).items() if v is not None})
    fails(capsys, _command(run, tmp_path), "step_000000160.safetensors", expected)
    assert not (tmp_path / "x.safetensors").exists()
