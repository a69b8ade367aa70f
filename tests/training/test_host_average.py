"""Averages in host memory are those that the optimiser would have kept on the device."""

import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from epg_fast.__main__ import main
from epg_fast.config import DataConfig, OptimizerConfig, PosthocEmaConfig
from epg_fast.data import ImageFolder, PillowLoader
from epg_fast.distributed import Ranks
from epg_fast.ops import extension_status
from epg_fast.training import DiffusionStage, PretrainStage, parallel
from epg_fast.training.host_average import HostAverages
from epg_fast.training.loop import train_step
from epg_fast.training.metrics import Metrics
from epg_fast.training.posthoc_ema import list_snapshots
from epg_fast.training.state import RunState
from tests.training.runs import assert_same_run, crash_after_save, run_command
from tests.training.stages import make_config

needs_extension = pytest.mark.skipif(not extension_status()[0], reason="the extension is not built")


def make_state(digits, job, offload, backend="torch", ranks=None):
    torch.manual_seed(0)
    ranks, folder = ranks or Ranks(0, 1, torch.device("cpu")), ImageFolder(f"{digits}/train")
    config = make_config(
        job,
        data=DataConfig(str(folder.root)),
        optimizer=OptimizerConfig(lr=3e-2, warmup_steps=0, backend=backend),
        posthoc_ema=PosthocEmaConfig([0.05, 0.2]),
        batch_size=4,
        offload_ema=offload,
        ops="plain",  # which ranks that stand alone need not agree on
    )
    stage_class = PretrainStage if job == "pretrain" else DiffusionStage
    return RunState(config, stage_class(config, ranks), folder, ranks)


def averages_of(state):
    state.host_averages.wait()
    networks = [state.stage.ema, *state.posthoc_ema.averages]
    return [p.clone() for network in networks for p in network.parameters()]


@pytest.mark.parametrize(
    "job, backend",
    [("pretrain", "torch"), ("finetune-diffusion", "torch")]
    + [pytest.param("finetune-diffusion", "fused", marks=needs_extension)],
)
def test_they_follow_every_update_and_no_skipped_one(job, backend, digits, monkeypatch):
    """Bit for bit with torch's arithmetic, also when averaging takes longer than a step; some parameters are frozen."""
    average = HostAverages._average
    monkeypatch.setattr(HostAverages, "_average", lambda *arguments: (time.sleep(0.05), average(*arguments)))
    states = [make_state(digits, job, offload, backend) for offload in (False, True)]
    kept = [len(state.optimizer._averages) for state in states]
    assert kept == [3, 1 if job == "pretrain" else 0]
    metrics = Metrics(None, False, 0, False, None, {})
    augment = states[0].config.data.augment if job == "pretrain" else None
    batches = iter(PillowLoader(states[0].source, image_size=32, batch_size=4, seed=0, augment=augment, workers=0))
    for i in range(6):
        batch = next(batches)
        if i == 3:
            before = averages_of(states[1])
            batch["x"] = torch.full(batch["x"].shape, float("nan"))
        for state in states:
            train_step(state, batch, metrics)
        if i == 3:
            assert all(torch.equal(a, b) for a, b in zip(before, averages_of(states[1]), strict=True))
    assert states[1].skipped.tolist() == [1, 0]
    same, offloaded = map(averages_of, states)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if backend == "fused" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(offloaded, same, **tolerance)
    assert not all(torch.equal(a, b) for a, b in zip(before, offloaded, strict=True))


def test_training_does_not_wait_for_the_averaging_of_the_newest_update(monkeypatch):
    network, average = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).requires_grad_(False)
    go_on, lerp = threading.Event(), HostAverages._average
    monkeypatch.setattr(HostAverages, "_average", lambda *arguments: (go_on.wait(60), lerp(*arguments)))
    threads, averages = torch.get_num_threads(), HostAverages(network, [average])
    assert torch.get_num_threads() == threads
    want = torch.lerp(average.weight, network.weight.detach(), 1 - 0.75)
    averages.before_update()
    averages.after_update([0.75], torch.zeros(()))
    before = average.weight.clone()
    with torch.no_grad():  # the next update
        network.weight.fill_(100)
    assert torch.equal(average.weight, before) and not torch.equal(before, want)
    go_on.set()
    averages.wait()
    assert torch.equal(average.weight, want)


def test_an_error_of_the_averaging_thread_ends_the_run(monkeypatch):
    network = torch.nn.Linear(3, 2)
    averages = HostAverages(network, [torch.nn.Linear(3, 2).requires_grad_(False)])
    monkeypatch.setattr(HostAverages, "_average", lambda *arguments: 1 / 0)
    averages.after_update([0.5], torch.zeros(()))
    with pytest.raises(ZeroDivisionError):
        averages.after_update([0.5], torch.zeros(()))


def test_a_run_goes_on_with_the_averages_where_they_were_not(tiny_run, tmp_path, monkeypatch):
    """Snapshots, previews and weights are the same bits as those of a run that never had them in host memory."""
    flags = {"steps": 6, "checkpoint_every": 2, "optimizer.backend": "torch", "posthoc_ema.sigma_rel": "[0.05,0.1]"}
    flags |= {"posthoc_ema.every": 3, "preview.every": 3, "preview.num": 1, "preview.steps": 2}
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert main(run_command("diffusion", tiny_run, whole, **flags)) == 0
    for step, offload in ((2, "true"), (4, "false")):
        with monkeypatch.context() as patched:
            crash_after_save(patched, step)
            assert main(run_command("diffusion", tiny_run, moved, **flags, offload_ema=offload)) == 1
    assert main(run_command("diffusion", tiny_run, moved, **flags, offload_ema="true")) == 0
    assert_same_run(moved, whole)
    snapshots = [list_snapshots(run / "posthoc_ema") for run in (whole, moved)]
    assert len(snapshots[0]) == 2
    for one, two in zip(*snapshots, strict=True):
        (a, b) = load_file(one), load_file(two)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for picture in (whole / "previews").iterdir():
        assert (moved / "previews" / picture.name).read_bytes() == picture.read_bytes()


class _Alone(Ranks):
    """A rank among others that are not there to agree with."""

    def gather(self, value):
        return [value]


def test_other_ranks_keep_none_and_resume_all_the_same(digits, tiny_run, tmp_path, monkeypatch):
    """Two ranks train in test_interruptions."""
    monkeypatch.setattr(parallel, "DistributedDataParallel", lambda module, **options: module)
    main_rank, other = (
        make_state(digits, "finetune-diffusion", True, ranks=_Alone(rank, 2, torch.device("cpu"))) for rank in (0, 1)
    )
    assert other.stage.ema is None and other.posthoc_ema.averages == [] and not other.posthoc_ema.is_due(10_000)
    main_rank.iteration = 5
    with torch.no_grad():
        next(main_rank.stage.network.parameters()).fill_(3)
    (tmp_path / "checkpoints").mkdir()
    main_rank.save(tmp_path, Metrics(None, False, 0, False, None, {}))
    main_rank.writer.wait()
    other.resume(tmp_path / "checkpoints")
    assert other.iteration == 5 and bool((next(other.stage.network.parameters()) == 3).all())
    other.host_averages.before_update()
    other.host_averages.after_update([0.5] * 3, torch.zeros(()))
    other.host_averages.wait()


def test_the_target_network_is_not_offloaded(capsys, tmp_path):
    command = ["pretrain", "--config", "digits_pretrain", "--offload_ema", "true", "--outdir", str(tmp_path / "run")]
    assert main(command) == 2
    assert "offload_ema: pre-training calls its average" in capsys.readouterr().err
