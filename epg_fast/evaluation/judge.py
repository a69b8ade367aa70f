"""Who judges images: networks with what they have seen of a reference, or a classifier of small images.

A judge keeps a row of each image that it has seen. Figures are a function of the rows in the images' order, so that
they do not depend on batches, ranks or interruptions, and images need not be kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from epg_fast.config import JudgeConfig
from epg_fast.distributed import Ranks
from epg_fast.evaluation.figures import Figure, Frechet, FrechetAtInfinity, InceptionScore, Mean, Recall
from epg_fast.evaluation.generative import covered, squared_radii
from epg_fast.evaluation.images import size_words
from epg_fast.evaluation.kernel_distance import Kernel
from epg_fast.evaluation.networks import HUB, Dinov2, ImageNetwork, Inception
from epg_fast.evaluation.reference import MOST_COMPARED, Reference, Seen, evenly, open_reference, see
from epg_fast.evaluation.small import SmallJudge, check_folders
from epg_fast.wording import nearest

log = logging.getLogger("epg_fast")
_BEST = {"distance": "low", "infinity": "low", "score": "high", "kernel": "low", "precision": "high", "recall": "high"}
_OF_IMAGES = ("kernel", "precision", "recall")
FIGURES_TO_GO_BY = ("fid", "fd_dinov2", "frechet_distance")
Rows = dict[str, torch.Tensor]
"""What is kept of n images: name -> [n, ...] on the CPU."""


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Rows one behind the other."""
    return {name: torch.cat([rows[name] for rows in parts]) for name in parts[0]}


def take_rows(rows: Rows, chosen: slice) -> Rows:
    """The rows of some of the images."""
    return {name: values[chosen] for name, values in rows.items()}


def _names(network: str) -> dict[str, str]:
    """Figures by a network: kind -> name."""
    inception = network == "inception"
    fid, kid, suffix = ("fid", "kid", "") if inception else (f"fd_{network}", f"kd_{network}", f"_{network}")
    names = {"distance": fid, "infinity": f"{fid}_infinity"} | ({"score": "inception_score"} if inception else {})
    return names | {"kernel": kid, "precision": f"precision{suffix}", "recall": f"recall{suffix}"}


class NetworkJudge:
    """Judges by the features of a network against those of a reference; its methods are those of `Judges`.

    The reference is shown to the network when it is first needed, or read from `cache`, a folder, where an earlier one
    has left what it saw.
    """

    def __init__(
        self,
        name: str,
        network: ImageNetwork,
        reference: Reference,
        config: JudgeConfig,
        cache: Path | None = None,
        batch_size: int = 64,
    ):
        self.name, self._network, self._reference, self._config = name, network, reference, config
        self._cache, self._batch_size = cache, batch_size
        self._seen: Seen | None = None
        self._device, self.least = network.device, max(2, config.splits, config.neighbors + 1)
        images = reference.images
        if images and images.num <= config.neighbors:
            raise ValueError(
                f"{reference.path} holds {images.num} images, want more than the {config.neighbors} neighbours of "
                "precision and recall; give more images or lower --neighbors"
            )
        self._names, without = _names(name), () if images else _OF_IMAGES
        reason = f"{reference.path} holds statistics but no images (arr_0)"
        self.best = {figure: _BEST[kind] for kind, figure in self._names.items() if kind not in without}
        self.missing = {self._names[kind]: reason for kind in without}

    def rows(self, images, labels):
        return {f"{self.name}/{kind}": row for kind, row in self._network.rows(images).items()}

    def figures(self, rows):
        if self._seen is None:
            self.see_reference(Ranks(0, 1, self._device))
        features, seen, names, device = rows[f"{self.name}/features"], self._seen, self._names, self._device
        distance = Frechet(seen.gaussian, features)
        found: dict[str, Figure] = {names["distance"]: distance}
        if FrechetAtInfinity.possible(*features.shape):
            found[names["infinity"]] = FrechetAtInfinity(distance)
        if "score" in names:
            found[names["score"]] = InceptionScore(rows["inception/probabilities"].numpy(), self._config.splits)
        if seen.features is not None:
            own = features
            if len(features) > MOST_COMPARED:
                own = features[torch.from_numpy(evenly(len(features), MOST_COMPARED))]
            found[names["kernel"]] = Kernel(features, seen.features, device)
            found[names["precision"]] = Mean(lambda: covered(own, seen.features, self._real_radii, device).numpy())
            found[names["recall"]] = Recall(seen.features, own, self._config.neighbors, device)
        return found

    def facts(self, figures, rows, size):
        images, names = self._reference.images, self._names
        score, kernel, end = (figures.get(names.get(kind)) for kind in ("score", "kernel", "infinity"))
        found = {"num_reference_images": images.num if images else None}
        if score:
            found[f"{names['score']}_std"] = score.deviation
        if kernel:
            found |= {f"{names['kernel']}_{name}": fact for name, fact in kernel.facts.items()}
        if end:
            found |= {f"{names['distance']}_bias": end.bias, f"{names['infinity']}_curve": end.curve}
        return found

    def sentence(self, num, size):
        images, network, c = self._reference.images, self._network, self._config
        against, pairwise, distance, score = "the mean and covariance stored in the reference", "not computed", "FD", ""
        if self._reference.statistics is None:
            against = f"{images.num} reference images"
        if images:
            numbers = [min(n, MOST_COMPARED) for n in (num, images.num)]
            pairwise = f"{numbers[0]} samples and {numbers[1]} reference images, {c.neighbors} neighbours"
        if "score" in self._names:
            distance, score = "FID", f" Inception Score: {c.splits} splits of the samples in torch-fidelity's order."
        return (
            f"{num} samples of {size_words(size)} pixels, {network.num_features} features of the {network.kind} "
            f"network in float32. {distance}: against {against}.{network.note}{score} Precision and recall: {pairwise}."
        )

    def check(self, num):
        if num <= self._network.num_features:
            log.warning(
                "%d samples do not determine a covariance of %d features: their FID is far too high, compare it with "
                "nothing but FIDs of as many samples (published figures are of 50000)",
                *(num, self._network.num_features),
            )

    def see_reference(self, ranks: Ranks) -> None:
        """Show the reference to the network, a share on each rank, unless what it saw is kept; all call this."""
        kept, seen, network, reference = None, None, self._network, self._reference
        if self._cache:
            key = [network.description["sha256"], reference.identity, reference.stamp, bool(reference.statistics)]
            digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
            kept = self._cache / f"reference_{digest[:16]}.npz"
            seen = Seen.kept(kept, self._device)
        if not ranks.gather(seen is not None)[0]:
            if kept:
                log.info("%s looks at the reference, %s, and keeps what it sees", self.name, reference.path)
            seen = see(reference, network.features, network.num_features, self._batch_size, ranks)
            if kept and seen is not None:
                seen.keep(kept)
        self._seen = seen

    @functools.cached_property
    def _real_radii(self) -> torch.Tensor:
        return squared_radii(self._seen.features, self._config.neighbors, self._device)

    @functools.cached_property
    def description(self):
        reference, images, c = self._reference, self._reference.images, self._config
        return {
            "network": self._network.description,
            "reference": reference.identity,
            "statistics": "computed" if reference.statistics is None else "stored in the reference",
            "num_reference_images": images.num if images else None,
            **({"splits": c.splits} if "score" in self._names else {}),
            "neighbors": c.neighbors,
        }


class Judges:
    """All judges of a command as one. `best`: figure -> "low" or "high"; `least`: images that they need.

    `missing`: figures that another reference would give: name -> the reason why this one does not.
    """

    def __init__(self, *judges: NetworkJudge | SmallJudge):
        self.judges = judges
        self.best = {name: best for judge in judges for name, best in judge.best.items()}
        self.missing = {name: reason for judge in judges for name, reason in judge.missing.items()}
        self.least = max(judge.least for judge in judges)

    @property
    def description(self) -> dict:
        """Who judges, by name, for JSON: files with their SHA-256, constants of the protocol."""
        return {judge.name: judge.description for judge in self.judges}

    def decisive(self, named: str | None, flag: str) -> str:
        """The figure to go by, which `flag` has `named`, or the first of FIGURES_TO_GO_BY; ValueError for none."""
        return _decisive(self.best, named, flag)

    def rows(self, images: torch.Tensor, labels: torch.Tensor | None) -> Rows:
        """What is kept of images uint8 [B, 3, H, W] with labels int64 [B]; names begin with the judge's."""
        return {name: row for judge in self.judges for name, row in judge.rows(images, labels).items()}

    def figures(self, rows: Rows) -> dict[str, Figure]:
        """All figures of images of which these are the rows; each costs what it costs when its value is asked for."""
        return {name: figure for judge in self.judges for name, figure in judge.figures(rows).items()}

    def facts(self, figures: Mapping[str, Figure], rows: Rows, size: tuple[int, int]) -> dict:
        """What helps to read the figures of images of `size` (height, width), for JSON."""
        return {name: fact for judge in self.judges for name, fact in judge.facts(figures, rows, size).items()}

    def sentence(self, num: int, size: tuple[int, int]) -> str:
        """How `num` images of `size` are judged, for people."""
        return " ".join(judge.sentence(num, size) for judge in self.judges)

    def check(self, num: int) -> None:
        """Warn where `num` images are too few for a figure to mean what others' do."""
        for judge in self.judges:
            judge.check(num)


def _decisive(figures: Collection[str], named: str | None, flag: str) -> str:
    found = named or next(name for name in FIGURES_TO_GO_BY if name in figures)
    if found not in figures:
        raise ValueError(f"{flag} {found!r}{nearest(found, figures)}: the judges have {', '.join(figures)}")
    return found


def check_judges(config: JudgeConfig, decisive: str | None = None, flag: str = "figure") -> None:
    """Raise ValueError for settings that do not go together, and for files that are not there. Nothing is loaded.

    decisive: the figure to go by, if one is named, which must be one that the judges may have; see `Judges.decisive`.
    """
    by_network = [name for name in ("reference", "inception", "dinov2") if getattr(config, name)]
    real = [name for name in ("train", "test") if getattr(config, name)]
    ways = "--reference and --inception (FID and others), or --train and --test (small data, without a network)"
    if by_network and real:
        raise ValueError(f"got --{by_network[0]} and --{real[0]}; pass {ways}")
    if not by_network and not real:
        raise ValueError(f"nothing to judge by; pass {ways}")
    if by_network == ["reference"]:
        raise ValueError(
            "got --reference without --inception; pass the path of inception-2015-12-05.pt (NVIDIA) or "
            "weights-inception-2015-12-05-6726825d.pth (torch-fidelity)"
        )
    if by_network and not config.reference:
        raise ValueError(
            f"got --{by_network[0]} without --reference; pass ADM's reference npz, samples.npz or a folder of images"
        )
    if real:
        check_folders(config)
    for name in by_network:
        path = Path(getattr(config, name))
        if not path.exists() and not (name == "dinov2" and config.dinov2 in HUB):
            raise ValueError(f"{name}: {path}: no such file or folder")
    networks = [name for name in by_network if name != "reference"]
    _decisive([figure for name in networks for figure in _names(name).values()] or SmallJudge.best, decisive, flag)


def open_judges(
    config: JudgeConfig,
    size: tuple[int, int],
    device: torch.device,
    cache: Path | None = None,
    ranks: Ranks | None = None,
    batch_size: int = 64,
) -> Judges:
    """The judges of images of `size` (height, width), on `device`.

    cache: folder where what is seen of the reference is kept, and found the next time. ranks: with several, all call
    this, and share what has to be computed for the reference. batch_size: images of the reference per network call.
    Raises ValueError for files that do not fit, ImportError with the command that installs what is missing.
    """
    check_judges(config)
    if not config.reference:
        return Judges(SmallJudge(config))
    judges = []
    for name, network_class in (("inception", Inception), ("dinov2", Dinov2)):
        if path := getattr(config, name):
            network = network_class(path, device)
            # statistics in a file are of Inception
            width = network.num_features if name == "inception" else None
            reference = open_reference(config.reference, width, size)
            judges.append(NetworkJudge(name, network, reference, config, cache, batch_size))
    if cache or (ranks and ranks.world_size > 1):
        for judge in judges:
            judge.see_reference(ranks or Ranks(0, 1, device))
    return Judges(*judges)
