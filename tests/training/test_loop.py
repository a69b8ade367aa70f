"""What happens inside the loop: 16-bit precision, gradients that are not finite, the curriculum, clipping."""

import contextlib
import functools
import json
import logging
import math
import time
import typing

import pytest
import torch

from epg_fast.__main__ import main
from epg_fast.config import DataConfig, ModelConfig, OptimizerConfig
from epg_fast.data import ImageFolder, PillowLoader
from epg_fast.distributed import Ranks, joined
from epg_fast.ops import extension_status
from epg_fast.training import ConsistencyStage, DiffusionStage, PretrainStage, loop
from epg_fast.training import metrics as metrics_module
from epg_fast.training.compilation import compile_stage
from epg_fast.training.loop import train_step
from epg_fast.training.metrics import Metrics, Progress
from epg_fast.training.state import RunState
from tests.training.runs import run_command, run_lines
from tests.waiting import NothingIsRead

needs_extension = pytest.mark.skipif(not extension_status()[0], reason="the extension is not built")


@pytest.mark.slow
@pytest.mark.parametrize(
    "job, precision, share", [("pretrain", "fp16", 0.9), ("diffusion", "bf16", 0.9), ("consistency", "bf16", 1)]
)
def test_16_bit_training_stays_finite_and_learns(job, precision, share, tiny_run, tmp_path):
    flags = {"steps": 80, "checkpoint_every": 80, "optimizer.warmup_steps": 20, "precision": precision}
    flags |= {} if job == "pretrain" else {"dropout": 0}
    assert main(run_command(job, tiny_run, tmp_path / "run", **flags)) == 0
    lines = run_lines(tmp_path / "run")
    assert len(lines) == 80 and all(math.isfinite(v) for line in lines for v in line.values())
    start, end = (sum(line["loss"] for line in part) for part in (lines[:20], lines[-20:]))
    assert end < share * start


class _Silent:
    def add(self, *values):
        self.values = values


# Process groups: a process that is forked later would wait in their destructor for threads that it lacks.
_KEPT = []


@pytest.fixture
def run(digits):
    """Return a function: optimiser's backend, job, micro-batches, parallelism -> (RunState, batches)."""

    def make(backend="auto", job="pretrain", micro_batches=1, parallelism="ddp"):
        stage_class = {"pretrain": PretrainStage, "diffusion": DiffusionStage, "consistency": ConsistencyStage}[job]
        sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2}
        if job == "pretrain":
            sizes |= {"hidden_dim": 32, "output_dim": 16}
        config = typing.get_type_hints(stage_class)["config"](
            outdir="unused",
            model=ModelConfig("digits_32", **sizes),
            data=DataConfig(f"{digits}/train", normalization="simple"),
            optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0, backend=backend),
            batch_size=8,
            gradient_accumulation=micro_batches,
            precision="fp32",
            parallelism=parallelism,
        )
        ranks = groups.enter_context(joined("cpu", group_for_one=parallelism == "fsdp"))
        stage = stage_class(config, ranks)
        folder = ImageFolder(config.data.path)
        state = RunState(config, stage, folder, ranks)
        _KEPT.append(state.parallel)
        augment = config.data.augment if stage.three_views else None
        return state, iter(PillowLoader(folder, image_size=32, batch_size=8, seed=0, augment=augment, workers=0))

    with contextlib.ExitStack() as groups:
        yield make


def with_nan(batch):
    batch = {k: v.float() / 255 if v.dtype == torch.uint8 else v for k, v in batch.items()}
    batch["x"][0, 0, 0, 0] = float("nan")
    return batch


@pytest.mark.parametrize("backend", [pytest.param("fused", marks=needs_extension), "torch"])
def test_a_step_with_a_non_finite_gradient_is_skipped_whole(backend, run, log):
    """Weights, averages, moments and statistics of BatchNorm stay; the counters do not."""
    state, batches = run(backend)
    train_step(state, next(batches), _Silent())
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    for skipped in (1, 2):
        train_step(state, with_nan(next(batches)), _Silent())
        assert state.iteration == 1 + skipped and state.skipped.tolist() == [skipped, skipped]
    assert [n for n, t in state.tensors().items() if not torch.equal(t, before[n])] == ["counters/skipped"]
    state.check_skipped()
    assert "up to step 3: the gradient was not finite for 2 more of the batches" in log.messages[-1]
    train_step(state, next(batches), _Silent())
    assert state.iteration == 4 and state.skipped.tolist() == [2, 0]
    assert not torch.equal(state.tensors()["network/pos_embed"], before["network/pos_embed"])
    state.check_skipped()
    assert sum("not finite" in message for message in log.messages) == 1


PLAIN = [(job, count, "ddp") for job in ("pretrain", "diffusion", "consistency") for count in (1, 2)]


@pytest.mark.parametrize("job, micro_batches, parallelism", [*PLAIN, ("diffusion", 1, "fsdp"), ("pretrain", 2, "fsdp")])
def test_a_step_makes_nobody_wait(job, micro_batches, parallelism, run):
    state, batches = run("torch", job, micro_batches, parallelism)
    batches = [next(batches) for _ in range(3)]
    metrics = Metrics(None, False)
    train_step(state, batches[0], metrics)
    with NothingIsRead():
        for batch in batches[1:]:
            train_step(state, batch, metrics)
    assert state.iteration == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "job, micro_batches, parallelism",
    [("pretrain", 1, "ddp"), ("pretrain", 2, "ddp"), ("consistency", 1, "ddp"), ("diffusion", 1, "fsdp")],
)
def test_compiled_blocks_have_no_graph_breaks_and_are_compiled_once(job, micro_batches, parallelism, run):
    state, batches = run("auto", job, micro_batches, parallelism)
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_stage(state.stage, "blocks", backend="eager", fullgraph=True)
    metrics = Metrics(None, False)
    train_step(state, next(batches), metrics)
    graphs = counters["stats"]["unique_graphs"]
    # pre-training: three batches, two of them without gradient; fine-tuning: an encoder block and decoder blocks with
    # and without a skip, for consistency also without gradient; GradCache runs pre-training's three views twice
    assert graphs == {"pretrain": 3 if micro_batches == 1 else 4, "diffusion": 3, "consistency": 6}[job]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            train_step(state, next(batches), metrics)
    assert counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()


def test_the_target_network_is_averaged_but_not_its_batch_norm(run):
    state, batches = run()
    before = {k: v.clone() for k, v in state.stage.ema.state_dict().items()}
    train_step(state, next(batches), _Silent())
    online, target = state.stage.network.state_dict(), state.stage.ema.state_dict()
    for name in before:
        if "running" in name or "tracked" in name:
            assert torch.equal(target[name], before[name]) and not torch.equal(online[name], before[name])
        else:
            torch.testing.assert_close(target[name], 0.99 * before[name] + 0.01 * online[name])
    assert online["projection_head.1.num_batches_tracked"] == 4


def test_the_gradient_is_clipped_after_the_given_step_only(run):
    state, batches = run()
    state.config.optimizer.clip_norm, state.config.optimizer.clip_after = 1e-3, 1
    beta, seen = state.config.optimizer.betas[0], []
    for _ in range(2):
        before = {n: t.clone() for n, t in state.tensors().items() if n.startswith("optimizer/exp_avg/")}
        train_step(state, next(batches), _Silent())
        gradient = [(state.tensors()[name] - beta * old) / (1 - beta) for name, old in before.items()]
        seen.append(torch.nn.utils.get_total_norm(gradient).item())
    assert seen[0] > 0.1 and seen[1] == pytest.approx(1e-3, rel=1e-2)


class _SlowLoader:
    """A loader behind a disk that takes `seconds(i)` for batch i."""

    def __init__(self, loader, seconds):
        self.loader, self.seconds = loader, seconds

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.seconds(self.loader.iteration))
        return next(self.loader)

    def __getattr__(self, name):
        return getattr(self.loader, name)


def test_a_disk_that_hangs_is_shown_while_it_does_and_logged_once(tiny_run, tmp_path, digits, monkeypatch, capsys):
    make = loop.make_loader
    monkeypatch.setattr(loop, "make_loader", lambda *a, **k: _SlowLoader(make(*a, **k), lambda i: 2.5 * (i == 3)))
    monkeypatch.setattr(loop, "Prefetcher", functools.partial(loop.Prefetcher, patience=0.2))
    monkeypatch.setattr(metrics_module, "_LONG_STALL", 1.5)  # longer than a loaded machine takes for another batch
    assert main(run_command("diffusion", tiny_run, tmp_path / "run", steps=5)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0.6 < lines[3]["data_wait"] <= 1
    shown = capsys.readouterr().err
    assert "images are decoded by Pillow (in the training process)" in shown
    assert "data wait=1 s" in shown
    assert shown.count("rank 0 has been waiting for data for") == 1
    images = f"{digits}/train, decoded by Pillow (in the training process)"
    assert images in shown.partition("waiting for data for")[2]


def test_the_wait_is_shown_in_place_of_its_share_until_data_comes(capsys):
    with Progress("diffusion", 10, 0, "images of /gone", Ranks(0, 1, torch.device("cpu"))) as progress:
        progress.show({"loss": 0.5, "images_per_second": 80.0, "data_wait": 0.02})
        capsys.readouterr()
        progress.stalled(25.0)
        assert "img/s=80, data wait=25 s" in capsys.readouterr().err
        progress.data_came()
        assert "img/s=80, data wait=2%" in capsys.readouterr().err
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
