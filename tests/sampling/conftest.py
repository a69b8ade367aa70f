"""Checkpoints to sample from."""

import pytest
import torch

from epg_fast.models import create_model, preset_config, save_weights
from tests.networks import randomized

SIZES = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 48, "decoder_depth": 1}
SIZES["decoder_num_heads"] = 2


def write_checkpoint(path, seed=0, **sizes):
    """A small generator of 32 x 32 images with random weights."""
    torch.manual_seed(seed)
    sizes = SIZES | sizes
    model = randomized(create_model("digits_32", **sizes), 0.05)
    metadata = {"config": preset_config("digits_32", **sizes), "parameterization": "x0", "normalization": "simple"}
    metadata |= {"step": 7, "ema_decay": 0.99}
    save_weights(path, model.state_dict(), metadata)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Of ten classes."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model.safetensors")
