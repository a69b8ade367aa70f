"""The EMA that training tracks: their profiles, on the device and in host memory, their snapshots and resumed runs."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from epg_fast.__main__ import main
from epg_fast.config import DiffusionConfig, OptimizerConfig, PosthocEmaConfig
from epg_fast.distributed import Ranks
from epg_fast.training.ema import HostEma, PosthocEma, ema_copy, gamma_of, list_snapshots, power_decay
from epg_fast.training.optimizer import make_optimizer
from tests.ops.kernel_checks import needs_extension
from tests.training.runs import assert_same_run, crash_after_save, run_command
from tests.training.stages import make_config, make_stage

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


@pytest.mark.parametrize("sigma_rel", [1e-4, 0.01, 0.05, 0.1, 0.2, 0.2886])
def test_width_and_exponent_are_inverse(sigma_rel):
    gamma = gamma_of(sigma_rel)
    assert np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) == pytest.approx(sigma_rel, rel=1e-12)


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


def _tracking(backend="torch", **fields):
    """(network with frozen parameters, its optimiser, the tracked EMA, those in host memory)."""
    torch.manual_seed(0)
    config = make_config("finetune-diffusion", posthoc_ema=PosthocEmaConfig(WIDTHS), **fields)
    network = make_stage("finetune-diffusion", config).network
    stage = SimpleNamespace(network=network, ranks=Ranks(0, 1, torch.device("cpu")), sharded=False)
    tracked = PosthocEma(config, stage)
    host = HostEma(network, tracked.networks if config.offload_ema else [])
    on_device = [] if config.offload_ema else tracked.networks
    return network, make_optimizer(network, OptimizerConfig(backend, lr=3e-2), on_device), tracked, host


def _update(network, optimizer, tracked, host, step, spoilt=False):
    generator = torch.Generator().manual_seed(step)
    for p in network.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator) * (float("nan") if spoilt else 1)
    decays = tracked.decays(step)
    optimizer.schedule(decays=decays if optimizer.emas else ())
    host.before_update()
    host.after_update(decays, optimizer.step()[1])


@pytest.mark.parametrize("backend", [FUSED, "torch"])
def test_tracked_ema_are_those_of_the_whole_trajectory(backend):
    """A step whose gradient is not finite does not count."""
    network, *rest = _tracking(backend)
    trajectory = []
    for step in range(20):
        if step == 9:
            before = [_flat(ema) for ema in rest[1].networks]
            _update(network, *rest, step, spoilt=True)
            assert all(torch.equal(a, _flat(b)) for a, b in zip(before, rest[1].networks, strict=True))
        _update(network, *rest, step)
        trajectory.append(_flat(network))
    assert (trajectory[0] - trajectory[-1]).abs().max() > 0.1
    for sigma_rel, ema in zip(WIDTHS, rest[1].networks, strict=True):
        torch.testing.assert_close(_flat(ema).double(), direct_ema(trajectory, sigma_rel), rtol=1e-6, atol=1e-6)


def test_ema_in_host_memory_are_those_on_the_device_bit_for_bit():
    device, host = _tracking(), _tracking(offload_ema=True)
    assert len(device[1].emas) == 3 and not host[1].emas
    for step in range(5):
        for run in (device, host):
            _update(*run, step, spoilt=step == 3)
    host[3].wait()
    for one, two in zip(device[2].networks, host[2].networks, strict=True):
        assert torch.equal(_flat(one), _flat(two)) and not torch.equal(_flat(one), _flat(device[0]))


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


def test_an_error_of_the_thread_ends_the_run(monkeypatch):
    network = torch.nn.Linear(3, 2)
    host = HostEma(network, [torch.nn.Linear(3, 2).requires_grad_(False)])
    monkeypatch.setattr(HostEma, "_average", lambda *arguments: 1 / 0)
    host.after_update([0.5], torch.zeros(()))
    with pytest.raises(ZeroDivisionError):
        host.after_update([0.5], torch.zeros(()))


def test_ranks_other_than_the_first_keep_none_in_host_memory():
    """Two ranks train in test_interruptions."""
    network = torch.nn.Linear(3, 2)
    first, second = (SimpleNamespace(network=network, ranks=Ranks(i, 2, None), sharded=False) for i in (0, 1))
    assert ema_copy(network, second.ranks, offload=True) is None
    assert ema_copy(network, second.ranks, offload=False) is not None
    config = DiffusionConfig("run", posthoc_ema=PosthocEmaConfig(WIDTHS), offload_ema=True)
    first, second = PosthocEma(config, first), PosthocEma(config, second)
    assert first.is_due(10_000) and not second.is_due(10_000)
    assert second.networks == [] and second.state_dict() == {}
    host = HostEma(network, second.networks)
    host.before_update()
    host.after_update([], torch.zeros(()))
    host.wait()


# ---- runs


def _run(tiny_run, outdir, steps, every, **flags):
    flags = {"steps": steps, "posthoc_ema.sigma_rel": "[0.05,0.10]", "posthoc_ema.every": every, **flags}
    return run_command("diffusion", tiny_run, outdir, **flags)


def content(snapshot):
    """(tensors, metadata)."""
    with safe_open(snapshot, framework="pt") as file:
        return load_file(snapshot), json.loads(file.metadata()["epg_fast"])


def assert_same_snapshots(got, want, steps):
    got, want = (list_snapshots(run / "posthoc_ema") for run in (got, want))
    assert [f.name for f in got] == [f.name for f in want] == [f"step_{step:09d}.safetensors" for step in steps]
    for one, two in zip(got, want, strict=True):
        (a, about_a), (b, about_b) = map(content, (one, two))
        assert about_a == about_b and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_killed_run_goes_on_to_the_same_snapshots(tiny_run, tmp_path, monkeypatch):
    """That of the checkpoint's step is neither lost nor written again, those of later steps are removed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(_run(tiny_run, whole, 12, 5)) == 0
    with monkeypatch.context() as patched:
        crash_after_save(patched, 10)
        assert main(_run(tiny_run, killed, 12, 5)) == 1
    written = list_snapshots(killed / "posthoc_ema")[-1].stat().st_mtime_ns
    for name in ("step_000000011.safetensors", ".step_000000012.safetensors.tmp7"):
        (killed / "posthoc_ema" / name).write_bytes(b"of a run that went on for longer, or was killed in the middle")
    assert main(_run(tiny_run, killed, 12, 5)) == 0
    assert_same_snapshots(killed, whole, [5, 10, 12])
    assert list_snapshots(killed / "posthoc_ema")[1].stat().st_mtime_ns == written
    assert len(list((killed / "posthoc_ema").iterdir())) == 3


def test_training_goes_on_while_a_snapshot_is_written(tiny_run, tmp_path, monkeypatch):
    """Its EMA are those of its step all the same."""
    reached, saw, write, decays = threading.Event(), [], PosthocEma.write, PosthocEma.decays
    assert main(_run(tiny_run, tmp_path / "whole", 5, 2)) == 0

    def decays_and_tell(tracked, step):
        if step == 3:
            reached.set()
        return decays(tracked, step)

    def write_slowly(tracked, step, snapshot):
        saw.append((step, reached.wait(60)))
        write(tracked, step, snapshot)

    monkeypatch.setattr(PosthocEma, "decays", decays_and_tell)
    monkeypatch.setattr(PosthocEma, "write", write_slowly)
    assert main(_run(tiny_run, tmp_path / "slow", 5, 2)) == 0
    assert saw == [(2, True), (4, True), (5, True)]
    assert_same_snapshots(tmp_path / "slow", tmp_path / "whole", [2, 4, 5])


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
    assert [f.stem for f in (run / "checkpoints").iterdir()] == ["step_000000002"]
    assert main(command) == 0
    assert [f.name[5:14] for f in list_snapshots(run / "posthoc_ema")] == [f"{step:09d}" for step in range(1, 7)]


@pytest.mark.slow
def test_a_run_goes_on_with_the_ema_where_they_were_not(tiny_run, tmp_path, monkeypatch):
    """Snapshots, previews and weights are the same bits as those of a run that never had them in host memory."""
    flags = {"checkpoint_every": 2, "optimizer.backend": "torch"}
    flags |= {"preview.every": 3, "preview.num": 1, "preview.steps": 2}
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert main(_run(tiny_run, whole, 6, 3, **flags)) == 0
    for step, offload in ((2, "true"), (4, "false")):
        with monkeypatch.context() as patched:
            crash_after_save(patched, step)
            assert main(_run(tiny_run, moved, 6, 3, **flags, offload_ema=offload)) == 1
    assert main(_run(tiny_run, moved, 6, 3, **flags, offload_ema="true")) == 0
    assert_same_run(moved, whole)
    assert_same_snapshots(moved, whole, [3, 6])
    for picture in (whole / "previews").iterdir():
        assert (moved / "previews" / picture.name).read_bytes() == picture.read_bytes()


def _fails(capsys, arguments, *expected):
    assert main([str(a) for a in arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(text in line for text in expected), line


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
    _fails(capsys, command, said)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_target_network_is_not_offloaded(capsys, tmp_path):
    command = ["pretrain", "--config", "digits_pretrain", "--offload_ema", "true", "--outdir", tmp_path / "run"]
    _fails(capsys, command, "offload_ema: pre-training calls its average")
