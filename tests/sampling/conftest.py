"""Checkpoints to sample from."""

import pytest
import torch

from epg_fast.models import EPGViT, create_model, preset_config, save_weights

SIZES = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 48, "decoder_depth": 1}
SIZES["decoder_num_heads"] = 2


def make_model(depth=1, decoder_depth=2, **changes):
    """A generator of 16 x 16 images of five classes, with random weights."""
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 32, "depth": depth, "num_heads": 2, "num_classes": 5}
    decoder = {"decoder_depth": decoder_depth, "decoder_embed_dim": 48, "decoder_num_heads": 2}
    model = EPGViT(**(sizes | decoder | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def write_checkpoint(path, seed=0, **sizes):
    """A small generator of 32 x 32 images with random weights."""
    torch.manual_seed(seed)
    sizes = SIZES | sizes
    model = create_model("digits_32", **sizes)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    metadata = {"config": preset_config("digits_32", **sizes), "parameterization": "x0", "normalization": "simple"}
    metadata |= {"step": 7, "ema_decay": 0.99}
    save_weights(path, model.state_dict(), metadata)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Of ten classes."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model.safetensors")
