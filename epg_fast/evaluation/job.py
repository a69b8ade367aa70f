"""Loading of what `evaluate` judges."""

from __future__ import annotations

import torch

from epg_fast.config import EvaluateConfig
from epg_fast.models import create_encoder, from_pretrained, list_presets
from epg_fast.runtime import resolve_device


def load_encoder(config: EvaluateConfig) -> tuple[torch.nn.Module, str | None]:
    """(network to probe, its pixel normalisation or None for the checkpoint's own).

    The name of a preset gives a freshly initialised encoder.
    """
    device = resolve_device(config.device)
    if config.probe in list_presets():
        torch.manual_seed(config.seed)
        encoder = create_encoder(config.probe).to(device).eval()
    else:
        encoder = from_pretrained(config.probe, device=device)
    return encoder, None if config.normalization == "auto" else config.normalization
