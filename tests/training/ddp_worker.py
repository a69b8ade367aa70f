"""One rank of test_distributed: the losses and gradients of steps, averaged over the ranks."""

import pickle
import sys

import torch

from epg_fast import training
from epg_fast.data import ImageFolder, PillowLoader, PixelNormalization
from epg_fast.distributed import joined
from epg_fast.models.fp8 import use_fp8
from epg_fast.training.accumulation import Gradients
from epg_fast.training.draws import Draws
from epg_fast.training.loop import make_step_module
from epg_fast.training.loss_scale import LossScale


def gradients(config, stage_name, step, ranks, scaled=False):
    """{"loss": ..., "grad.<name>": ..., "buffer.<name>": ...} of the whole global batch, as rank 0 has them; of
    diffusion, the gradients with its linears in FP8 as well, "fp8.<name>"."""
    torch.manual_seed(0)
    stage = getattr(training, stage_name)(config, ranks)
    for p in stage.network.parameters():  # zero-initialised layers would hide most gradients
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    count = config.batch_size // ranks.world_size
    loader = PillowLoader(
        ImageFolder(config.data.path),
        image_size=stage.network.image_size,
        batch_size=config.batch_size,
        seed=0,
        rank=ranks.rank,
        world_size=ranks.world_size,
        augment=config.data.augment if stage.three_views else None,
        workers=0,
    )
    step_module = make_step_module(stage)  # its gradient hooks live as long as it does
    scale = LossScale(ranks.device, enabled=scaled)
    compute = Gradients(stage, step_module, PixelNormalization(config.data.normalization), scale)
    batch, draws = next(iter(loader)), Draws(0, 0, ranks.rank * count, count, ranks.device)
    result = compute(batch, draws, step)
    assert len(result.per_sample) == count and all(len(term) == count for term in result.terms.values())
    values = torch.stack([result.loss.detach(), result.level.double().mean()]) / ranks.world_size
    if ranks.world_size > 1:
        torch.distributed.all_reduce(values)
    found = {f"grad.{n}": p.grad for n, p in stage.network.named_parameters() if p.grad is not None}
    found |= {f"buffer.{n}": b for n, b in stage.network.named_buffers()}
    if ranks.world_size > 1:  # the gradients lie in the buckets that were summed, each like its parameter
        assert all(p.grad._base is not None and p.grad.stride() == p.stride() for p in _trained(stage))
    if stage_name == "DiffusionStage":
        found = {name: value.clone() for name, value in found.items()}
        use_fp8(stage.network, "plain")
        stage.network.zero_grad()
        compute(batch, draws, step)
        found |= {f"fp8.{n}": p.grad for n, p in stage.network.named_parameters() if p.grad is not None}
    return {"loss": values[0], "level": values[1]} | found


def _trained(stage):
    return [p for p in stage.network.parameters() if p.grad is not None]


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as f:
        jobs = pickle.load(f)
    with joined("cpu") as ranks:
        results = [gradients(*job, ranks) for job in jobs]
        if ranks.main:
            torch.save(results, sys.argv[2])
