"""Very small training stages, with random weights and a batch."""

from unittest import mock

import torch

from epg_fast import config as configs
from epg_fast import training
from epg_fast.distributed import Ranks
from epg_fast.models import encoder_from_config
from epg_fast.training.draws import Draws
from epg_fast.training.gradients import add_gradients
from epg_fast.training.loss_scale import LossScale
from epg_fast.training.parallel import parallelize
from epg_fast.training.stages import network_config

JOBS = {"pretrain": "Pretrain", "finetune-diffusion": "Diffusion", "finetune-consistency": "Consistency"}
SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "hidden_dim": 24, "output_dim": 16}
# Another width and one block more than the encoder, which has no skip.
DECODER = {"decoder_embed_dim": 48, "decoder_depth": 3, "decoder_num_heads": 2}


def make_config(job, model=None, **fields):
    """Configuration of a job with a network of a few thousand parameters."""
    model = configs.ModelConfig("digits_32", **(SIZES | DECODER | (model or {})))
    return getattr(configs, JOBS[job] + "Config")(model=model, **({"precision": "fp32"} | fields))


def make_stage(job, config, perceptual=True):
    """The stage on the CPU; the frozen encoder of consistency training is a random one."""
    stage = getattr(training, JOBS[job] + "Stage")(config, Ranks(0, 1, torch.device("cpu")))
    if perceptual and job == "finetune-consistency":
        encoder = encoder_from_config(network_config(config)).use_ops(config.ops)
        stage.perceptual = encoder.eval().requires_grad_(False)
    return stage


def loss_of(stage, images=4, step=0):
    """The loss of a random batch."""
    return stage.loss(_batch(stage, images), Draws(0, 0, 0, images, torch.device("cpu")), step)


def backward_of(stage, images=4, step=0):
    """Add the gradient of a random batch, in as many micro-batches as the configuration says, and return the loss."""
    scale = LossScale(torch.device("cpu"), enabled=False)
    draws = Draws(0, 0, 0, images, torch.device("cpu"))
    return add_gradients(stage, parallelize(stage), _batch(stage, images), draws, step, scale)


def _batch(stage, images):
    size = stage.network.image_size
    batch = {name: torch.randn(images, 3, size, size) for name in ("x", "view1", "view2")}
    return batch | {"label": torch.arange(images) % 10}


def device_of(name):
    """Patches that make torch report one GPU of this name, with 3 GiB as its peak of memory."""
    return mock.patch.multiple(
        torch.cuda,
        is_available=lambda: True,
        get_device_name=lambda device=None: name,
        max_memory_allocated=lambda device=None: 3 * 2**30,
        reset_peak_memory_stats=lambda device=None: None,
    )
