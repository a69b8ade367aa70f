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
from epg_fast.training import progress as progress_module
from epg_fast.training.compilation import compile_stage
from epg_fast.training.loop import make_step_module
from epg_fast.training.metrics import Metrics
from epg_fast.training.progress import Progress
from epg_fast.training.state import RunState
from tests.waiting import NothingIsRead

needs_extension = pytest.mark.skipif(not extension_status()[0], reason="the extension is not built")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("job", ["pretrain", "finetune-diffusion", "finetune-consistency"])
def test_16_bit_training_stays_finite_and_learns(job, precision, tiny_run, tmp_path):
    recipe = {"pretrain": "digits_pretrain", "finetune-diffusion": "digits_diffusion"}.get(job, "digits_consistency")
    preview = [] if job == "pretrain" else ["--preview.every", "0"]
    flags = [*tiny_run[:2], "--config", recipe, *tiny_run[2:], "--steps", "200", "--checkpoint_every", "1000"]
    flags += ["--optimizer.warmup_steps", "20", "--precision", precision, *preview]
    assert main([job, *flags, "--outdir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 200 and all(math.isfinite(v) for line in lines for v in line.values())
    start, end = (sum(line["loss"] for line in part) for part in (lines[:20], lines[-20:]))
    assert end < 0.9 * start


class _Silent:
    def add(self, *values):
        self.values = values


@pytest.fixture
def run(digits):
    """Return a function: optimiser's backend, job, parts, parallelism -> (RunState, its module, batches)."""

    def make(backend="auto", job="pretrain", parts=1, parallelism="ddp"):
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
            gradient_accumulation=parts,
            precision="fp32",
            parallelism=parallelism,
        )
        ranks = groups.enter_context(joined("cpu", group_for_one=parallelism == "fsdp"))
        stage = stage_class(config, ranks)
        folder = ImageFolder(config.data.path)
        state = RunState(config, stage, folder, ranks)
        augment = config.data.augment if stage.three_views else None
        loader = PillowLoader(folder, image_size=32, batch_size=8, seed=0, augment=augment, workers=0)
        return state, make_step_module(stage), iter(loader)

    with contextlib.ExitStack() as groups:
        yield make


def _everything(state):
    tensors = [*state.stage.network.state_dict().values(), *state.stage.average.state_dict().values()]
    tensors += [v for s in state.optimizer.state.values() for v in s.values()]
    return [t.clone() for t in tensors]


def with_nan(batch):
    batch = {k: v.float() / 255 if v.dtype == torch.uint8 else v for k, v in batch.items()}
    batch["x"][0, 0, 0, 0] = float("nan")
    return batch


@pytest.mark.parametrize("backend", [pytest.param("fused", marks=needs_extension), "torch"])
def test_a_step_with_a_non_finite_gradient_is_skipped_whole(run, backend):
    state, step_module, batches = run(backend)
    state.update(step_module, next(batches), _Silent())
    before = _everything(state)
    state.update(step_module, with_nan(next(batches)), _Silent())
    assert all(torch.equal(a, b) for a, b in zip(before, _everything(state), strict=True))
    # the host learns of it with the next batch, or when it asks
    assert (state.step, state.iteration) == (2, 2)
    state.update(step_module, next(batches), _Silent())
    assert (state.step, state.iteration) == (2, 3)
    state.update(step_module, with_nan(next(batches)), _Silent())
    state.settle()
    assert (state.step, state.iteration) == (2, 4)


PLAIN = [(job, parts, "ddp") for job in ("pretrain", "diffusion", "consistency") for parts in (1, 2)]


@pytest.mark.parametrize("job, parts, parallelism", [*PLAIN, ("diffusion", 1, "fsdp"), ("pretrain", 2, "fsdp")])
def test_an_update_makes_nobody_wait(job, parts, parallelism, run):
    state, step_module, batches = run("torch", job, parts, parallelism)
    batches = [next(batches) for _ in range(3)]
    metrics = Metrics(None, False, 0, False, None, {})
    state.update(step_module, batches[0], metrics)
    with NothingIsRead():
        for batch in batches[1:]:
            state.update(step_module, batch, metrics)
    assert state.step == 3


@pytest.mark.parametrize("job, parts, parallelism", [*PLAIN, ("diffusion", 1, "fsdp")])
def test_compiled_blocks_have_no_graph_breaks_and_are_compiled_once(job, parts, parallelism, run):
    state, step_module, batches = run("auto", job, parts, parallelism)
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_stage(state.stage, "blocks", backend="eager", fullgraph=True)
    metrics = Metrics(None, False, 0, False, None, {})
    state.update(step_module, next(batches), metrics)
    graphs = counters["stats"]["unique_graphs"]
    # pre-training: three batches, two of them without gradient; fine-tuning: an encoder block and decoder blocks with
    # and without a skip, for consistency also without gradient; in parts, pre-training's three views come twice
    assert graphs == {"pretrain": 3 if parts == 1 else 4, "diffusion": 3, "consistency": 6}[job]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            state.update(step_module, next(batches), metrics)
    assert counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()


def test_the_target_network_is_averaged_but_not_its_batch_norm(run):
    state, step_module, batches = run()
    before = {k: v.clone() for k, v in state.stage.average.state_dict().items()}
    state.update(step_module, next(batches), _Silent())
    online, target = state.stage.network.state_dict(), state.stage.average.state_dict()
    for name in before:
        if "running" in name or "tracked" in name:
            assert torch.equal(target[name], before[name]) and not torch.equal(online[name], before[name])
        else:
            torch.testing.assert_close(target[name], 0.99 * before[name] + 0.01 * online[name])
    assert online["projection_head.1.num_batches_tracked"] == 4


def test_the_gradient_is_clipped_after_the_given_step_only(run):
    state, step_module, batches = run()
    state.config.optimizer.clip_norm, state.config.optimizer.clip_after = 1e-3, 1
    beta, seen = state.config.optimizer.betas[0], []
    for _ in range(2):
        before = {p: s["exp_avg"].clone() for p, s in state.optimizer.state.items()}
        state.update(step_module, next(batches), _Silent())
        gradient = [(s["exp_avg"] - beta * before.get(p, 0)) / (1 - beta) for p, s in state.optimizer.state.items()]
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


@pytest.fixture
def train_on_a_slow_disk(tiny_run, tmp_path, monkeypatch):
    """Return a function that trains five steps and returns the lines of metrics.jsonl; seconds(i) delays batch i."""

    def train(seconds):
        make = loop.make_loader
        monkeypatch.setattr(loop, "make_loader", lambda *a, **k: _SlowLoader(make(*a, **k), seconds))
        flags = ["--steps", "5", "--preview.every", "0"]
        command = ["finetune-diffusion", *tiny_run[:2], "--config", "digits_diffusion", *tiny_run[2:], *flags]
        assert main([*command, "--outdir", str(tmp_path / "run")]) == 0
        return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    return train


def test_a_slow_disk_shows_as_data_wait(train_on_a_slow_disk):
    lines = train_on_a_slow_disk(lambda i: 0.5)
    assert all(0.6 < line["data_wait"] <= 1 for line in lines[1:4])


def test_a_disk_that_hangs_is_shown_while_it_does_and_logged_once(train_on_a_slow_disk, digits, monkeypatch, capsys):
    monkeypatch.setattr(loop, "Prefetcher", functools.partial(loop.Prefetcher, patience=0.2))
    monkeypatch.setattr(progress_module, "_LONG_STALL", 1.5)  # longer than a loaded machine takes for another batch
    train_on_a_slow_disk(lambda i: 2.5 * (i == 3))
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
    monkeypatch.setattr(progress_module.log, "log", lambda level, text, *values: said.append((level, text % values)))
    with Progress("diffusion", 10, 0, "images of /gone", Ranks(3, 4, torch.device("cpu"))) as progress:
        for seconds in (25.0, 30.0, 35.0):
            progress.stalled(seconds)
        message = "rank 3 has been waiting for data for 30 s: images of /gone"
        assert said == [(logging.ERROR, message)]  # the only level that such a rank shows
        progress.data_came()
        progress.stalled(30.0)
        assert said == [(logging.ERROR, message)] * 2
