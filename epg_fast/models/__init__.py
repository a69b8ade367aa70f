"""Networks: RCMViT (encoder), EPGViT (generator), presets and pre-trained weights."""

from epg_fast.models.encoder import RCMViT
from epg_fast.models.generator import DMViT, EPGViT
from epg_fast.models.presets import (
    create_encoder,
    create_model,
    encoder_from_config,
    generator_from_config,
    list_presets,
    preset_config,
)
from epg_fast.models.pretrained import export, from_pretrained, load_into
from epg_fast.models.weight_files import load_weights, save_weights

__all__ = [
    "DMViT",
    "EPGViT",
    "RCMViT",
    "create_encoder",
    "create_model",
    "encoder_from_config",
    "export",
    "from_pretrained",
    "generator_from_config",
    "list_presets",
    "load_into",
    "load_weights",
    "preset_config",
    "save_weights",
]
