"""Noise schedule, denoiser, guidance and samplers."""

from epg_fast.diffusion.denoiser import PARAMETERIZATIONS, Denoiser
from epg_fast.diffusion.guidance import autoguided, guided
from epg_fast.diffusion.normalization import PixelNormalization
from epg_fast.diffusion.samplers import (
    SAMPLERS,
    STEPPED,
    STOCHASTIC,
    sample_edm_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_euler_sde,
    sample_heun,
    sample_onestep,
)
from epg_fast.diffusion.schedule import (
    NoiseSchedule,
    consistency_r,
    consistency_stage,
    curriculum_scales,
    shift,
)

__all__ = [
    "PARAMETERIZATIONS",
    "SAMPLERS",
    "STEPPED",
    "STOCHASTIC",
    "Denoiser",
    "NoiseSchedule",
    "PixelNormalization",
    "autoguided",
    "consistency_r",
    "consistency_stage",
    "curriculum_scales",
    "guided",
    "sample_edm_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_euler_sde",
    "sample_heun",
    "sample_onestep",
    "shift",
]
