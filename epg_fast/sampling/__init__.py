"""Sampling engine and writers of its images."""

from epg_fast.sampling.engine import sample

__all__ = ["sample"]
