"""Objectives: plain functions of tensors and modules in which every random quantity is an argument."""

from epg_fast.objectives.consistency import consistency_loss
from epg_fast.objectives.contrastive import info_nce, interpolated_temperature
from epg_fast.objectives.denoising import denoising_loss
from epg_fast.objectives.loss import Loss
from epg_fast.objectives.pretraining import pretraining_loss

__all__ = [
    "Loss",
    "consistency_loss",
    "denoising_loss",
    "info_nce",
    "interpolated_temperature",
    "pretraining_loss",
]
