"""Judge samples against real images, by Inception features or without any network, and encoders by a linear probe.

What works without a network needs `pip install 'epg_fast[demo]'`.
"""

from epg_fast.evaluation.command import evaluate_images
from epg_fast.evaluation.figures import inception_score
from epg_fast.evaluation.frechet import frechet_distance
from epg_fast.evaluation.generative import precision_recall
from epg_fast.evaluation.images import load_images
from epg_fast.evaluation.probe import evaluate_probe

__all__ = [
    "evaluate_images",
    "evaluate_probe",
    "frechet_distance",
    "inception_score",
    "load_images",
    "precision_recall",
]
