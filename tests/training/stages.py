"""Very small training stages, with random weights and a batch."""

from unittest import mock

import torch

from epg_fast import config as configs
from epg_fast import training
from epg_fast.distributed import Ranks
from epg_fast.models import encoder_from_config
from epg_fast.training.draws import Draws
from epg_fast.training.gradients import LossScale, add_gradients
from epg_fast.training.loop import train_step
from epg_fast.training.metrics import Metrics
from epg_fast.training.parallel import parallelize
from epg_fast.training.stages import network_config
from epg_fast.training.state import RunState

JOBS = {"pretrain": "Pretrain", "finetune-diffusion": "Diffusion", "finetune-consistency": "Consistency"}
SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "hidden_dim": 24, "output_dim": 16}
# Another width and one block more than the encoder, which has no skip.
DECODER = {"decoder_embed_dim": 48, "decoder_depth": 3, "decoder_num_heads": 2}
SMALLER = {"depth": 1, "decoder_depth": 2}
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def make_config(job, model=None, **fields):
    """Configuration of a job with a network of a few thousand parameters."""
    model = configs.ModelConfig("digits_32", **(SIZES | DECODER | (model or {})))
    return getattr(configs, JOBS[job] + "Config")(model=model, **({"precision": "fp32"} | fields))


def stage_class(job):
    return getattr(training, JOBS[job] + "Stage")


def make_stage(job, config, perceptual=True, ranks=ALONE):
    """The stage on the CPU; the frozen encoder of consistency training is a random one."""
    stage = stage_class(job)(config, ranks)
    if perceptual and job == "finetune-consistency":
        encoder = encoder_from_config(network_config(config)).use_ops(config.ops)
        stage.perceptual = encoder.eval().requires_grad_(False).to(ranks.device)
    return stage


def loss_of(stage, images=4, step=0):
    """The loss of a random batch."""
    return stage.loss(batch_of(stage, images), Draws(0, 0, 0, images, CPU), step)


def backward_of(stage, images=4, step=0):
    """Add the gradient of a random batch, in as many micro-batches as the configuration says, and return the loss."""
    scale = LossScale(CPU, enabled=False)
    draws = Draws(0, 0, 0, images, CPU)
    return add_gradients(stage, parallelize(stage), batch_of(stage, images), draws, step, scale)


def batch_of(stage, images):
    size = stage.network.image_size
    batch = {name: torch.randn(images, 3, size, size) for name in ("x", "view1", "view2")}
    return batch | {"label": torch.arange(images) % 10}


def spread(network, std=0.02):
    """Move all trained weights a little: layers that start at 0 would hide most gradients."""
    for p in (p for p in network.parameters() if p.requires_grad):
        p.data += std * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.device)


def spoil(batch):
    """Make the gradient of a batch NaN."""
    batch["x"] = torch.full(batch["x"].shape, float("nan"))


class Images:
    """What a run asks of its data before it begins."""

    root = "nowhere"

    def fingerprint(self):
        return "none"


class Training:
    """Updates of a small network, as a run makes them, on four random images each."""

    def __init__(self, job="finetune-diffusion", backend="torch", ranks=ALONE, **fields):
        torch.manual_seed(0)
        config = make_config(job, SMALLER | fields.pop("model", {}), **({"batch_size": 4} | fields))
        config.optimizer = configs.OptimizerConfig(lr=1e-3, warmup_steps=0, backend=backend)
        self.stage = make_stage(job, config, ranks=ranks)
        spread(self.stage.network)
        self.state, self.metrics = RunState(self.stage, Images()), Metrics(None)

    def batch(self, broken=False):
        """Bytes, as loaders give them; `broken`: images of NaN."""
        generator = torch.Generator().manual_seed(self.state.iteration)
        images = torch.randint(256, (3, 4, 3, 32, 32), generator=generator, dtype=torch.uint8)
        batch = dict(zip(("x", "view1", "view2"), images, strict=True)) | {"label": torch.arange(4)}
        if broken:
            spoil(batch)
        return {name: tensor.to(self.state.ranks.device) for name, tensor in batch.items()}

    def update(self, broken=False):
        train_step(self.state, self.batch(broken), self.metrics)

    def updated(self, times=1):
        """The networks' tensors after so many more updates."""
        for _ in range(times):
            self.update()
        networks = {name: getattr(self.stage, name).state_dict() for name in ("network", "ema")}
        return {f"{of}.{name}": value for of, state in networks.items() for name, value in state.items()}


def device_of(name):
    """Patches that make torch report one GPU of this name, with 3 GiB as its peak of memory."""
    return mock.patch.multiple(
        torch.cuda,
        is_available=lambda: True,
        get_device_name=lambda device=None: name,
        max_memory_allocated=lambda device=None: 3 * 2**30,
        reset_peak_memory_stats=lambda device=None: None,
    )
