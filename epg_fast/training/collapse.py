"""Collapse of contrastive features: how many dimensions they use, whether views agree, whether images differ."""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F

from epg_fast.config import PretrainConfig
from epg_fast.data import ImageSource, PillowLoader
from epg_fast.distributed import Ranks
from epg_fast.training.draws import Draws
from epg_fast.training.measuring import Measurement
from epg_fast.training.state import RunState

log = logging.getLogger("epg_fast")
_MOST_IMAGES = 1024


def effective_rank(features: torch.Tensor) -> float:
    """Effective rank of the covariance matrix of features [N, E]: 1 to min(E, N - 1).

    exp of the entropy of the eigenvalues over their sum; where k eigenvalues are equal and the others 0, it is k. 1 for
    features that are all the same, up to rounding of float32.

    Source: Roy & Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007).
    """
    features = features.double()
    centred = features - features.mean(dim=0)
    if centred.square().mean() <= torch.finfo(torch.float32).eps ** 2 * features.square().mean():
        return 1.0
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0)
    return float(torch.special.entr(eigenvalues / eigenvalues.sum()).sum().exp())


def alignment(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean squared distance, 0 to 4, of the L2-normalised features of two views of the same images, [N, P] each.

    Source: Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere" (2020, arXiv 2005.10242), with alpha = 2.
    """
    one, other = (F.normalize(features.double(), dim=-1) for features in (one, other))
    return float((one - other).square().sum(dim=-1).mean())


def uniformity(features: torch.Tensor) -> float:
    """log of the mean of exp(-2 d^2) over pairs of different images, d the distance of L2-normalised features [N, P].

    0 for features that are all the same; about -4, the least in many dimensions, for those spread evenly; N >= 2.

    Source: as for `alignment`, with t = 2.
    """
    unit = F.normalize(features.double(), dim=-1)
    squares = 2 - 2 * unit @ unit.T
    rows, columns = torch.triu_indices(*squares.shape, offset=1, device=squares.device)
    return float((-2 * squares[rows, columns].clamp_min(0)).logsumexp(dim=0)) - math.log(len(rows))


class Collapse(Measurement):
    """Ranks of the encoder's features and of their projections, alignment and uniformity of the latter.

    On two views of a fixed batch of training images, as the contrastive term has them: projected with the BatchNorm
    statistics of the batch.
    """

    name = "collapse"

    def __init__(self, state: RunState):
        """Reads the images. Raises ValueError when too many are bad."""
        self._state, config, ranks = state, state.config, state.ranks
        batch = _fixed_batch(config, state.source, state.stage.network.image_size, ranks)
        self._views, self._count = (batch["view1"], batch["view2"]), len(batch["x"])
        self._draws = Draws(config.seed, 0, ranks.rank * self._count, self._count, ranks.device)

    def figures(self) -> dict[str, float]:
        state = self._state
        found = state.parallel.observe(self._features)
        views = [(state.ranks.gather_tensors(feature)(), state.ranks.gather_tensors(p)()) for feature, p in found]
        if not state.ranks.main:
            return {}
        (feature1, projection1), (feature2, projection2) = views
        if not all(t.isfinite().all() for view in views for t in view):
            raise ValueError("the features are not finite")
        return {
            "collapse/feature_rank": effective_rank(torch.cat([feature1, feature2])),
            "collapse/projection_rank": effective_rank(F.normalize(torch.cat([projection1, projection2]), dim=-1)),
            "collapse/alignment": alignment(projection1, projection2),
            "collapse/uniformity": (uniformity(projection1) + uniformity(projection2)) / 2,
        }

    def _features(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(features [B, E], projections [B, P]) of each view, in float32; encoded in parts of a micro-batch at most."""
        state, config = self._state, self._state.config
        size = max(config.batch_size // (state.ranks.world_size * config.gradient_accumulation), 1)
        parts = []
        for i in range(0, self._count, size):
            draws = self._draws.part(i, min(size, self._count - i))
            views = [state.stage.normalization.normalize(v[i : i + size].to(state.ranks.device)) for v in self._views]
            noise = draws.normal("noise", *views[0].shape[1:])
            parts.append(state.stage.objective(draws, 0).clean_features(*views, noise).chunk(2))
        features = [torch.cat(part) for part in zip(*parts, strict=True)]
        return [(f.float(), state.stage.network.projection_head(f).float()) for f in features]


def _fixed_batch(config: PretrainConfig, source: ImageSource, image_size: int, ranks: Ranks) -> dict[str, torch.Tensor]:
    """This rank's images of a batch that is the same at every step, after a resume and with any loader of the run."""
    size = min(config.batch_size, max(_MOST_IMAGES // ranks.world_size, 2) * ranks.world_size)
    log.info("collapse: reading two views of %d training images", size)
    with PillowLoader(
        source,
        image_size=image_size,
        batch_size=size,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        augment=config.data.augment,
        max_bad_fraction=config.data.max_bad_fraction,
        workers=0,
    ) as loader:
        return next(loader)
