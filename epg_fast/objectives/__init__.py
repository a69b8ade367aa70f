"""Objectives: plain functions of tensors and modules in which every random quantity is an argument."""

from epg_fast.objectives.consistency import consistency_loss, perceptual_keys
from epg_fast.objectives.contrastive import Gather, info_nce, interpolated_temperature
from epg_fast.objectives.denoising import denoising_loss
from epg_fast.objectives.loss import Loss
from epg_fast.objectives.pretraining import PretrainingObjective, noised_inputs, pretraining_loss

__all__ = [
    "Gather",
    "Loss",
    "PretrainingObjective",
    "consistency_loss",
    "denoising_loss",
    "info_nce",
    "interpolated_temperature",
    "perceptual_keys",
    "noised_inputs",
    "pretraining_loss",
]
