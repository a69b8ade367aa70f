"""What happens inside the loop: 16-bit precision, gradients that are not finite, the curriculum, clipping."""

import json
import logging
import math
import time

import pytest
import torch

from epg_fast.__main__ import main
from epg_fast.distributed import Ranks, joined
from epg_fast.training import loop
from epg_fast.training import metrics as metrics_module
from epg_fast.training.gradients import compile_stage
from epg_fast.training.metrics import Progress
from tests.ops.kernel_checks import needs_extension
from tests.training.runs import hang, run_command, run_lines
from tests.training.stages import ALONE, JOBS, Training
from tests.waiting import NothingIsRead


@pytest.mark.slow
@pytest.mark.parametrize(
    "job, precision, share",
    [("pretrain", "fp16", 0.9), ("finetune-diffusion", "bf16", 0.9)],
)
def test_16_bit_training_stays_finite_and_learns(job, precision, share, tiny_run, tmp_path):
    flags = {"steps": 80, "checkpoint_every": 80, "optimizer.warmup_steps": 20, "precision": precision}
    flags |= {} if job == "pretrain" else {"dropout": 0}
    assert main(run_command(tiny_run, tmp_path / "run", job, **flags)) == 0
    lines = run_lines(tmp_path / "run")
    assert len(lines) == 80 and all(math.isfinite(v) for line in lines for v in line.values())
    start, end = (sum(line["loss"] for line in part) for part in (lines[:20], lines[-20:]))
    assert end < share * start


# Process groups: a process that is forked later would wait in their destructor for threads that it lacks.
_KEPT = []


@pytest.fixture
def sharded():
    """Ranks of which the only one takes part in sharding."""
    with joined("cpu", group_for_one=True) as ranks:
        yield ranks


def _training(job, micro_batches, parallelism, request):
    ranks = request.getfixturevalue("sharded") if parallelism == "fsdp" else ALONE
    training = Training(job, ranks=ranks, gradient_accumulation=micro_batches, parallelism=parallelism)
    _KEPT.append(training.state.parallel)
    return training


@pytest.mark.parametrize("backend", [pytest.param("fused", marks=needs_extension), "torch"])
def test_a_step_with_a_non_finite_gradient_is_skipped_whole(backend, log):
    """Weights, EMA, moments and statistics of BatchNorm stay; the counters do not."""
    training = Training("pretrain", backend)
    state = training.state
    training.update()
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    for skipped in (1, 2):
        training.update(broken=True)
        assert state.iteration == 1 + skipped and state.skipped.tolist() == [skipped, skipped]
    assert [n for n, t in state.tensors().items() if not torch.equal(t, before[n])] == ["counters/skipped"]
    state.check_skipped()
    assert "up to step 3: the gradient was not finite for 2 more of the batches" in log.messages[-1]
    training.update()
    assert state.iteration == 4 and state.skipped.tolist() == [2, 0]
    assert not torch.equal(state.tensors()["network/pos_embed"], before["network/pos_embed"])
    state.check_skipped()
    assert sum("not finite" in message for message in log.messages) == 1


PLAIN = [(job, count, "ddp") for job in JOBS for count in (1, 2)]


@pytest.mark.parametrize(
    "job, micro_batches, parallelism", [*PLAIN, ("finetune-diffusion", 1, "fsdp"), ("pretrain", 2, "fsdp")]
)
def test_a_step_makes_nobody_wait(job, micro_batches, parallelism, request):
    training = _training(job, micro_batches, parallelism, request)
    batches = [training.batch() for _ in range(2)]
    training.update()
    with NothingIsRead():
        for batch in batches:
            loop.train_step(training.state, batch, training.metrics)
    assert training.state.iteration == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "job, micro_batches, parallelism",
    [("pretrain", 2, "ddp"), ("finetune-consistency", 1, "ddp"), ("finetune-diffusion", 1, "fsdp")],
)
def test_compiled_blocks_have_no_graph_breaks_and_are_compiled_once(job, micro_batches, parallelism, request):
    training = _training(job, micro_batches, parallelism, request)
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_stage(training.stage, "blocks", backend="eager", fullgraph=True)
    training.update()
    graphs = counters["stats"]["unique_graphs"]
    # pre-training: three batches, two of them without gradient, and the noised images of each; GradCache runs the three
    # views twice; fine-tuning: an encoder block, decoder blocks with and without a skip, for consistency also without
    # gradient, and blocks of the frozen encoder with and without
    want = {"pretrain": 8, "finetune-diffusion": 3, "finetune-consistency": 8}
    assert graphs == want[job]
    with torch._dynamo.config.patch(error_on_recompile=True):
        training.updated(3)
    assert counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()


def test_the_target_network_is_averaged_but_not_its_batch_norm():
    training = Training("pretrain")
    before = {k: v.clone() for k, v in training.stage.ema.state_dict().items()}
    training.update()
    online, target = training.stage.network.state_dict(), training.stage.ema.state_dict()
    for name in before:
        if "running" in name or "tracked" in name:
            assert torch.equal(target[name], before[name]) and not torch.equal(online[name], before[name])
        else:
            torch.testing.assert_close(target[name], 0.99 * before[name] + 0.01 * online[name])
    assert online["projection_head.1.num_batches_tracked"] == 4


def test_the_gradient_is_clipped_after_the_given_step_only():
    state = (training := Training("pretrain")).state
    state.config.optimizer.clip_norm, state.config.optimizer.clip_after = 1e-3, 1
    beta, seen = state.config.optimizer.betas[0], []
    for _ in range(2):
        before = {n: t.clone() for n, t in state.tensors().items() if n.startswith("optimizer/exp_avg/")}
        training.update()
        gradient = [(state.tensors()[name] - beta * old) / (1 - beta) for name, old in before.items()]
        seen.append(torch.nn.utils.get_total_norm(gradient).item())
    assert seen[0] > 0.1 and seen[1] == pytest.approx(1e-3, rel=1e-2)


def test_a_disk_that_hangs_is_shown_while_it_does_and_logged_once(tiny_run, tmp_path, digits, monkeypatch, capsys):
    hang(monkeypatch, 3, lambda: time.sleep(2.5))
    monkeypatch.setattr(metrics_module, "_LONG_STALL", 1.5)  # longer than a loaded machine takes for another batch
    assert main(run_command(tiny_run, tmp_path / "run", steps=5)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0.6 < lines[3]["data_wait"] <= 1
    shown = capsys.readouterr().err
    assert "images are decoded by Pillow (in the training process)" in shown
    assert "data wait=1 s" in shown
    assert shown.count("rank 0 has been waiting for data for") == 1
    images = f"{digits}/train, decoded by Pillow (in the training process)"
    assert images in shown.partition("waiting for data for")[2]


def test_the_wait_is_shown_in_place_of_its_share_until_data_comes(capsys):
    with Progress("diffusion", 10, 0, "images of /gone", ALONE) as progress:
        progress.show({"images_per_second": 80.0, "data_wait": 0.02, "mfu": 0.413, "peak_memory_gib": 61.04})
        shown = "img/s=80, data wait=2%, MFU=41.3%, peak=61.0 GiB"
        assert shown in capsys.readouterr().err
        progress.stalled(25.0)
        assert shown.replace("2%", "25 s") in capsys.readouterr().err
        progress.data_came()
        assert shown in capsys.readouterr().err
        progress.data_came()
        assert capsys.readouterr().err == ""


def test_another_rank_that_waits_says_so_once_for_each_long_stall(monkeypatch):
    said = []
    monkeypatch.setattr(metrics_module.log, "log", lambda level, text, *values: said.append((level, text % values)))
    with Progress("diffusion", 10, 0, "images of /gone", Ranks(3, 4, torch.device("cpu"))) as progress:
        for seconds in (25.0, 30.0, 35.0):
            progress.stalled(seconds)
        message = "rank 3 has been waiting for data for 30 s: images of /gone"
        assert said == [(logging.ERROR, message)]  # the only level that such a rank shows
        progress.data_came()
        progress.stalled(30.0)
        assert said == [(logging.ERROR, message)] * 2
