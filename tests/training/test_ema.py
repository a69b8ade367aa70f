"""The EMA that training tracks: their profiles, on the device and in host memory, snapshots and resumed runs."""

import json
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from epg_fast.__main__ import main
from epg_fast.config import PosthocEmaConfig
from epg_fast.training.checkpoint import by_step
from epg_fast.training.ema import HostEma, PosthocEma, gamma_of, power_decay
from tests.ops.kernel_checks import needs_extension
from tests.training.runs import assert_same_run, fails, run_command, saved_steps
from tests.training.stages import Training

WIDTHS = [0.05, 0.1, 0.2]
FUSED = pytest.param("fused", marks=needs_extension)


def direct_weights(steps, gamma):
    """How much theta(1..steps) count: the profile integrated over each step; [steps]."""
    return np.diff((np.arange(steps + 1) / steps) ** (gamma + 1))


def direct_ema(trajectory, sigma_rel):
    """Float64 EMA of the weights after each update, [steps, ...]: every step by its share."""
    shares = torch.from_numpy(direct_weights(len(trajectory), gamma_of(sigma_rel)))
    return torch.tensordot(shares, torch.stack([t.double() for t in trajectory]), 1)


# ---- profiles


def test_the_papers_widths_have_the_papers_exponents():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.1, 0.25])
def test_the_width_is_the_standard_deviation_of_the_steps_that_count(sigma_rel):
    weights, steps = direct_weights(20_000, gamma_of(sigma_rel)), np.arange(20_000) + 0.5
    mean = weights @ steps
    assert np.sqrt(weights @ (steps - mean) ** 2) / 20_000 == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_widths_that_no_ema_has_are_refused(sigma_rel):
    with pytest.raises(ValueError, match="want more than 0 and less than 0.2887"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_the_decays_give_the_integrated_profile(sigma_rel):
    gamma, weights = gamma_of(sigma_rel), np.zeros(50)
    for i in range(50):
        weights *= power_decay(i + 1, gamma)
        weights[i] += 1 - power_decay(i + 1, gamma)
    np.testing.assert_allclose(weights, direct_weights(50, gamma), rtol=1e-12)


# ---- updates


def _flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def _training(backend="torch", **fields):
    return Training(backend=backend, posthoc_ema=PosthocEmaConfig(WIDTHS), **fields)


@pytest.mark.parametrize("backend", [FUSED, "torch"])
def test_tracked_ema_are_those_of_the_whole_trajectory(backend):
    """An update whose gradient is not finite leaves them."""
    training, trajectory = _training(backend), []
    emas = training.state.posthoc_ema.networks
    for step in range(12):
        if step == 7:
            before = [_flat(ema) for ema in emas]
            training.update(broken=True)
            training.state.iteration -= 1
            assert all(torch.equal(a, _flat(b)) for a, b in zip(before, emas, strict=True))
        training.update()
        trajectory.append(_flat(training.stage.network))
    assert (trajectory[0] - trajectory[-1]).abs().max() > 5e-3
    for sigma_rel, ema in zip(WIDTHS, emas, strict=True):
        torch.testing.assert_close(_flat(ema).double(), direct_ema(trajectory, sigma_rel), rtol=1e-6, atol=1e-6)


def test_ema_in_host_memory_are_those_on_the_device_bit_for_bit():
    device, host = _training(), _training(offload_ema=True)
    assert len(device.state.optimizer.emas) == 4 and not host.state.optimizer.emas
    for step in range(4):
        for training in (device, host):
            training.update(broken=step == 2)
    host.state.host_ema.wait()
    pairs = [(t.stage.ema, *t.state.posthoc_ema.networks) for t in (device, host)]
    for one, two in zip(*pairs, strict=True):
        assert torch.equal(_flat(one), _flat(two)) and not torch.equal(_flat(one), _flat(device.stage.network))


def test_training_does_not_wait_for_the_ema_of_the_newest_update(monkeypatch):
    network, ema = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).requires_grad_(False)
    go_on, average = threading.Event(), HostEma._average
    monkeypatch.setattr(HostEma, "_average", lambda *arguments: (go_on.wait(60), average(*arguments)))
    threads, host = torch.get_num_threads(), HostEma(network, [ema])
    assert torch.get_num_threads() == threads
    want = torch.lerp(ema.weight, network.weight.detach(), 1 - 0.75)
    host.before_update()
    host.after_update([0.75], torch.zeros(()))
    before = ema.weight.clone()
    with torch.no_grad():  # the next update
        network.weight.fill_(100)
    assert torch.equal(ema.weight, before) and not torch.equal(before, want)
    go_on.set()
    host.wait()
    assert torch.equal(ema.weight, want)


# ---- runs


def _run(tiny_run, outdir, steps, every, **flags):
    flags = {"steps": steps, "posthoc_ema.sigma_rel": "[0.05,0.10]", "posthoc_ema.every": every, **flags}
    return run_command(tiny_run, outdir, **flags)


def content(snapshot):
    """(tensors, metadata)."""
    with safe_open(snapshot, framework="pt") as file:
        return load_file(snapshot), json.loads(file.metadata()["epg_fast"])


def snapshots_of(run):
    return sorted(by_step(run / "posthoc_ema", ".safetensors"))


def test_training_goes_on_while_snapshots_and_checkpoints_are_written(tiny_run, tmp_path, monkeypatch):
    """What is written is of its step all the same: every snapshot, and the checkpoint of 2, waits for the next step."""
    whole, slow, flags = tmp_path / "whole", tmp_path / "slow", {"steps": 4, "every": 1, "checkpoint_every": 2}
    assert main(_run(tiny_run, whole, **flags)) == 0
    reached, saw = [threading.Event() for _ in range(4)], []
    write, decays = PosthocEma.write, PosthocEma.decays

    def decays_and_tell(tracked, step):
        reached[step].set()
        return decays(tracked, step)

    def write_slowly(tracked, step, snapshot):
        saw.append(step == 4 or reached[step].wait(60))
        write(tracked, step, snapshot)

    monkeypatch.setattr(PosthocEma, "decays", decays_and_tell)
    monkeypatch.setattr(PosthocEma, "write", write_slowly)
    assert main(_run(tiny_run, slow, **flags)) == 0
    assert saw == [True] * 4 and snapshots_of(slow) == [1, 2, 3, 4] and saved_steps(slow) == [4, 2]
    assert_same_run(slow, whole)


@pytest.mark.parametrize("fails", [3, 4])
def test_no_checkpoint_passes_a_snapshot_that_could_not_be_written(fails, tiny_run, tmp_path, monkeypatch, capsys):
    """Checkpoints are due at 2, 4 and 6: with the snapshot of 4, after that of 3."""
    write, run = PosthocEma.write, tmp_path / "run"

    def fail(tracked, step, snapshot):
        if step == fails:
            raise OSError(f"could not write step {step}: disk full")
        write(tracked, step, snapshot)

    command = _run(tiny_run, run, 6, 1, checkpoint_every=2)
    with monkeypatch.context() as patched:
        patched.setattr(PosthocEma, "write", fail)
        assert main(command) == 1
    assert f"could not write step {fails}: disk full" in capsys.readouterr().err
    assert saved_steps(run) == [2]
    assert main(command) == 0 and snapshots_of(run) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "flag, value, said",
    [
        *(("posthoc_ema.sigma_rel", widths, "sigma_rel is") for widths in ("[0]", "[0.29]", "[0.1,0.1]", "[]")),
        ("posthoc_ema.every", 0, "every is 0"),
        pytest.param("posthoc_ema.sigma_rel", "[0.05,0.1,0.15,0.2]", "got 5 EMA", marks=needs_extension),
    ],
)
def test_widths_without_meaning_are_refused_before_training(flag, value, said, capsys, tiny_run, tmp_path):
    command = _run(tiny_run, tmp_path / "run", 2, 1, **{"optimizer.backend": "fused", flag: value})
    fails(capsys, command, said)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_target_network_is_not_offloaded(capsys, tmp_path):
    command = ["pretrain", "--config", "digits_pretrain", "--offload_ema", "true", "--outdir", tmp_path / "run"]
    fails(capsys, command, "offload_ema: pre-training calls its average")
