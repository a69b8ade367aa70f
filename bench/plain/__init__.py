"""EPG in the plainest PyTorch: the lowest rung of the ladders, without a line of what it is compared with.

The operations are those of the released implementation, one call each, in its order: networks.py (LayerNorm in float32,
modulation, gates, concatenated skips and GELU as passes of their own; an adaLN projection per block), diffusion.py
(noise levels, denoiser, guidance in two calls, samplers as loops), training.py (losses, and a step that reads the loss
on the host, clips, updates and averages parameter by parameter). Parameter names are the released checkpoints'.

Attention is `F.scaled_dot_product_attention`, what anyone would write today: the explicit softmax is slower, and would
flatter what is compared with it. Precision is autocast's, from outside.
"""

from bench.plain.diffusion import (
    Denoiser,
    IntervalGuidance,
    levels,
    sample_edm_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_euler_sde,
    sample_heun,
    sample_onestep,
    sigma_at,
)
from bench.plain.networks import PlainEncoder, PlainGenerator, from_config
from bench.plain.training import (
    Trainer,
    consistency_loss,
    consistency_r,
    consistency_step,
    denoising_loss,
    denoising_step,
    pretraining_loss,
    pretraining_step,
)

__all__ = [
    "Denoiser",
    "IntervalGuidance",
    "PlainEncoder",
    "PlainGenerator",
    "Trainer",
    "consistency_loss",
    "consistency_r",
    "consistency_step",
    "denoising_loss",
    "denoising_step",
    "from_config",
    "levels",
    "pretraining_loss",
    "pretraining_step",
    "sample_edm_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_euler_sde",
    "sample_heun",
    "sample_onestep",
    "sigma_at",
]
