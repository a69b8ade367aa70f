"""Sampling engine and writers of its images."""

from epg_fast.sampling.engine import SamplingEngine, sample
from epg_fast.sampling.precision import image_error

__all__ = ["SamplingEngine", "image_error", "sample"]
