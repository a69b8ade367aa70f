"""What happens inside the loop: 16-bit precision, gradients that are not finite, the curriculum, clipping."""

import json
import math

import pytest
import torch

from epg_fast.__main__ import main
from epg_fast.config import DataConfig, ModelConfig, OptimizerConfig, PretrainConfig
from epg_fast.data import ImageFolder, PillowLoader
from epg_fast.training import PretrainStage
from epg_fast.training.distributed import Ranks
from epg_fast.training.loop import RunState, make_step_module


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
    def add(self, **values):
        self.values = values


@pytest.fixture
def run(digits):
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "hidden_dim": 32, "output_dim": 16}
    config = PretrainConfig(
        outdir="unused",
        model=ModelConfig("digits_32", **sizes),
        data=DataConfig(f"{digits}/train", normalization="simple"),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0),
        batch_size=8,
        precision="fp32",
    )
    ranks = Ranks(0, 1, torch.device("cpu"))
    stage = PretrainStage(config, ranks)
    folder = ImageFolder(config.data.path)
    state = RunState(config, stage, folder, ranks)
    loader = PillowLoader(folder, image_size=32, batch_size=8, seed=0, augment=config.data.augment, workers=0)
    return state, make_step_module(stage), iter(loader)


def _everything(state):
    tensors = [*state.stage.network.state_dict().values(), *state.stage.average.state_dict().values()]
    tensors += [v for s in state.optimizer.state.values() for v in s.values()]
    return [t.clone() for t in tensors]


def test_a_step_with_a_non_finite_gradient_is_skipped_whole(run):
    state, step_module, batches = run
    assert state.update(step_module, next(batches), _Silent())
    before = _everything(state)
    batch = next(batches)
    batch = {k: v.float() / 255 if v.dtype == torch.uint8 else v for k, v in batch.items()}
    batch["x"][0, 0, 0, 0] = float("nan")
    assert not state.update(step_module, batch, _Silent())
    assert all(torch.equal(a, b) for a, b in zip(before, _everything(state), strict=True))
    assert (state.step, state.iteration) == (1, 2)
    assert state.update(step_module, next(batches), _Silent())
    assert (state.step, state.iteration) == (2, 3)


def test_the_target_network_is_averaged_but_not_its_batch_norm(run):
    state, step_module, batches = run
    before = {k: v.clone() for k, v in state.stage.average.state_dict().items()}
    assert state.update(step_module, next(batches), _Silent())
    online, target = state.stage.network.state_dict(), state.stage.average.state_dict()
    for name in before:
        if "running" in name or "tracked" in name:
            assert torch.equal(target[name], before[name]) and not torch.equal(online[name], before[name])
        else:
            torch.testing.assert_close(target[name], 0.99 * before[name] + 0.01 * online[name])
    assert online["projection_head.1.num_batches_tracked"] == 4


def test_the_gradient_is_clipped_after_the_given_step_only(run):
    state, step_module, batches = run
    state.config.optimizer.clip_norm, state.config.optimizer.clip_after = 1e-3, 1
    beta, seen = state.config.optimizer.betas[0], []
    for _ in range(2):
        before = {p: s["exp_avg"].clone() for p, s in state.optimizer.state.items()}
        state.update(step_module, next(batches), _Silent())
        gradient = [(s["exp_avg"] - beta * before.get(p, 0)) / (1 - beta) for p, s in state.optimizer.state.items()]
        seen.append(torch.nn.utils.get_total_norm(gradient).item())
    assert seen[0] > 0.1 and seen[1] == pytest.approx(1e-3, rel=1e-2)
