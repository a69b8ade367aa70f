"""Training, of all three stages: `train(config, stage)`."""

from epg_fast.training.loop import train
from epg_fast.training.stages import ConsistencyStage, DiffusionStage, PretrainStage

__all__ = ["ConsistencyStage", "DiffusionStage", "PretrainStage", "train"]
