"""One rank of test_distributed: writes the loss and gradients of one step, averaged over the ranks."""

import sys

import torch

from epg_fast.data import ImageFolder, PillowLoader, PixelNormalization
from epg_fast.training import distributed
from epg_fast.training.draws import Draws
from epg_fast.training.fp8 import use_fp8
from epg_fast.training.loop import make_step_module


def gradients(config, stage_class, step):
    """{"loss": ..., "grad.<name>": ..., "buffer.<name>": ...} of the whole global batch; of diffusion, the gradients
    with its linears in FP8 as well, "fp8.<name>"."""
    ranks = distributed.start("cpu")
    torch.manual_seed(0)
    stage = stage_class(config, ranks)
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
    pixels = PixelNormalization(config.data.normalization)
    batch = {k: pixels.normalize(v) if v.dtype == torch.uint8 else v for k, v in next(iter(loader)).items()}
    step_module = make_step_module(stage)  # its gradient hooks live as long as it does
    result = step_module(batch, Draws(0, 0, ranks.rank * count, count, ranks.device), step)
    result.loss.backward()
    loss = result.loss.detach() / ranks.world_size
    if ranks.world_size > 1:
        torch.distributed.all_reduce(loss)
    found = {f"grad.{n}": p.grad for n, p in stage.network.named_parameters() if p.grad is not None}
    found |= {f"buffer.{n}": b for n, b in stage.network.named_buffers()}
    if stage_class.name == "finetune-diffusion":
        use_fp8(stage.network, "reference")
        stage.network.zero_grad()
        step_module(batch, Draws(0, 0, ranks.rank * count, count, ranks.device), step).loss.backward()
        found |= {f"fp8.{n}": p.grad for n, p in stage.network.named_parameters() if p.grad is not None}
    if ranks.main:
        torch.save({"loss": loss} | found, sys.argv[2])
    del step_module, result  # before the process group they use
    distributed.stop()


if __name__ == "__main__":
    import pickle

    from epg_fast import training

    with open(sys.argv[1], "rb") as f:
        config, name, step = pickle.load(f)
    gradients(config, getattr(training, name), step)
