"""Who judges images: networks with what they have seen of a reference, or a classifier of small images."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from epg_fast.config import JudgeConfig
from epg_fast.distributed import Ranks
from epg_fast.evaluation.dinov2 import HUB, Dinov2Network
from epg_fast.evaluation.figures import Figure, Frechet, FrechetAtInfinity, InceptionScore, Kernel, Mean, Recall
from epg_fast.evaluation.generative import covered, squared_radii
from epg_fast.evaluation.inception import FeatureNetwork
from epg_fast.evaluation.network import ImageNetwork
from epg_fast.evaluation.reference import (
    MOST_COMPARED,
    Reference,
    Seen,
    file_name,
    keep_seen,
    kept_seen,
    open_reference,
    see,
)
from epg_fast.evaluation.rows import Judge, Rows
from epg_fast.evaluation.small import SmallJudge, check_folders
from epg_fast.wording import nearest

log = logging.getLogger("epg_fast")
FIGURES_TO_GO_BY = ("fid", "fd_dinov2", "frechet_distance")


_BEST = {"distance": "low", "infinity": "low", "score": "high", "kernel": "low", "precision": "high", "recall": "high"}


def _names(network: str) -> dict[str, str]:
    """Figures by a network: kind -> name."""
    inception = network == "inception"
    fid, kid, suffix = ("fid", "kid", "") if inception else (f"fd_{network}", f"kd_{network}", f"_{network}")
    return {
        "distance": fid,
        "infinity": f"{fid}_infinity",
        **({"score": "inception_score"} if inception else {}),
        "kernel": kid,
        "precision": f"precision{suffix}",
        "recall": f"recall{suffix}",
    }


class NetworkJudge(Judge):
    """Judges by the features of a network against those of a reference.

    The reference is shown to the network when it is first needed, or read from `cache`, a folder, where an earlier one
    has left what it saw. `ranks`, if there are several, share that work: then `see_reference` is called on all of them.
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
        self.device, self.least = network.device, max(2, config.splits, config.neighbors + 1)
        images = reference.images
        if images and images.num <= config.neighbors:
            raise ValueError(
                f"{reference.path} holds {images.num} images, want more than the {config.neighbors} neighbours of "
                "precision and recall; give more images or lower --neighbors"
            )
        self._names = _names(name)
        of_images = () if images else ("kernel", "precision", "recall")
        self.best = {figure: _BEST[kind] for kind, figure in self._names.items() if kind not in of_images}

    def rows(self, images, labels):
        if self.name != "inception":
            return {f"{self.name}/features": self._network.features(images)}
        features, probabilities = self._network.features_and_probabilities(images)
        return {"inception/features": features, "inception/probabilities": probabilities}

    def figures(self, rows):
        features, seen, names = rows[f"{self.name}/features"], self._seen, self._names
        distance = Frechet(seen.gaussian, features)
        found: dict[str, Figure] = {names["distance"]: distance}
        if FrechetAtInfinity.possible(*features.shape):
            found[names["infinity"]] = FrechetAtInfinity(distance)
        if self.name == "inception":
            found[names["score"]] = InceptionScore(rows["inception/probabilities"], self._config.splits)
        if seen.features is not None:
            chosen = np.linspace(0, len(features) - 1, min(len(features), MOST_COMPARED)).round().astype(int)
            k, device = self._config.neighbors, self.device
            own = features if len(chosen) == len(features) else features[torch.from_numpy(chosen)]
            found[names["kernel"]] = Kernel(seen.features, features, device)
            found[names["precision"]] = Mean(
                lambda: covered(own, seen.features, self._real_radii, device).numpy(),
            )

            def covers(chosen: torch.Tensor) -> np.ndarray:
                return covered(seen.features, chosen, squared_radii(chosen, k, device), device).numpy()

            found[names["recall"]] = Recall(
                lambda: covers(own), lambda some: covers(own[torch.from_numpy(some)]).mean(), len(own)
            )
        return found

    @property
    def missing(self):
        if self._reference.images:
            return {}
        reason = f"{self._reference.path} holds statistics but no images (arr_0)"
        return {self._names[name]: reason for name in ("kernel", "precision", "recall")}

    def facts(self, figures, rows, size):
        images = self._reference.images
        found = {"num_reference_images": images.num if images else None}
        if self.name == "inception":
            found["inception_score_std"] = figures["inception_score"].deviation
        if self._names["kernel"] in figures:
            found |= {f"{self._names['kernel']}_{k}": v for k, v in figures[self._names["kernel"]].facts.items()}
        if self._names["infinity"] in figures:
            end = figures[self._names["infinity"]]
            found |= {f"{self._names['distance']}_bias": end.bias, f"{self._names['infinity']}_curve": end.curve}
        return found

    def sentence(self, num, size):
        images, network = self._reference.images, self._network
        real = f"{images.num} reference images" if images else "a reference without images"
        against = real if self._reference.statistics is None else "the mean and covariance stored in the reference"
        score = f" Inception Score: {self._config.splits} splits of the samples in torch-fidelity's order."
        numbers = [min(n, MOST_COMPARED) for n in (num, images.num if images else 0)]
        pairwise = (
            f"Precision and recall: {numbers[0]} samples and {numbers[1]} reference images, {self._config.neighbors} "
            "neighbours."
            if images
            else "Precision and recall: not computed."
        )
        return (
            f"{num} samples of {size[1]}x{size[0]} pixels, {network.num_features} features of the {network.kind} "
            f"network in float32. {'FID' if self.name == 'inception' else 'FD'}: against {against}.{network.note}"
            f"{score if self.name == 'inception' else ''} {pairwise}"
        )

    def check(self, num):
        if num <= self._network.num_features:
            log.warning(
                "%d samples do not determine a covariance of %d features: their FID is far too high, compare it with "
                "nothing but FIDs of as many samples (published figures are of 50000)",
                num,
                self._network.num_features,
            )

    def see_reference(self, ranks: Ranks | None = None) -> None:
        """Show the reference to the network now; with several ranks, a share on each."""
        seen = kept_seen(self._kept, self.device) if self._kept else None
        known = ranks.gather(seen is not None)[0] if ranks else seen is not None
        if not known:
            if self._kept:
                log.info("%s looks at the reference, %s, and keeps what it sees", self.name, self._reference.path)
            seen = see(
                self._reference,
                self._network.features,
                self._network.num_features,
                self._batch_size,
                self.device,
                ranks,
            )
            if self._kept and seen is not None:
                keep_seen(self._kept, seen)
        if seen is not None:
            self._seen = seen

    @functools.cached_property
    def _seen(self) -> Seen:
        seen = kept_seen(self._kept, self.device) if self._kept else None
        if seen is None:
            self.see_reference()
            seen = self.__dict__["_seen"]
        return seen

    @functools.cached_property
    def _real_radii(self) -> torch.Tensor:
        return squared_radii(self._seen.features, self._config.neighbors, self.device)

    @property
    def _kept(self) -> Path | None:
        return self._cache / file_name(self._identity | {"files": self._reference.stamp}) if self._cache else None

    @functools.cached_property
    def _identity(self) -> dict:
        images = self._reference.images
        return {
            "network": self._network.description["sha256"],
            "reference": self._reference.identity,
            "statistics": "computed" if self._reference.statistics is None else "stored in the reference",
            "num_reference_images": images.num if images else None,
        }

    @functools.cached_property
    def description(self):
        c = self._config
        return {
            "network": self._network.description,
            **{name: value for name, value in self._identity.items() if name != "network"},
            **({"splits": c.splits} if self.name == "inception" else {}),
            "neighbors": c.neighbors,
        }


class Judges:
    """All judges of a command as one. `best`: figure -> "low" or "high"; `least`: images that they need."""

    def __init__(self, judges: Sequence[Judge]):
        self.judges = list(judges)
        self.best = {name: best for judge in judges for name, best in judge.best.items()}
        self.least = max(judge.least for judge in judges)

    @property
    def description(self) -> dict:
        """Who judges, by name, for JSON."""
        return {judge.name: judge.description for judge in self.judges}

    @property
    def missing(self) -> dict[str, str]:
        """Figures that another reference would give: name -> the reason why this one does not."""
        return {name: reason for judge in self.judges for name, reason in judge.missing.items()}

    def decisive(self, named: str | None, flag: str) -> str:
        """The figure to go by: `named`, else the first of FIGURES_TO_GO_BY. Raises ValueError for one that is none.

        flag: the flag that names it, for the message.
        """
        return _decisive(self.best, named, flag)

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

    def rows(self, images: torch.Tensor, labels: torch.Tensor | None) -> Rows:
        """What is kept of images uint8 [B, 3, H, W] with labels int64 [B]."""
        return {name: row for judge in self.judges for name, row in judge.rows(images, labels).items()}

    def figures(self, rows: Rows) -> dict[str, Figure]:
        """All figures of the images; each costs what it costs when its value is first asked for."""
        return {name: figure for judge in self.judges for name, figure in judge.figures(rows).items()}


def _decisive(figures: Collection[str], named: str | None, flag: str) -> str:
    found = named or next(name for name in FIGURES_TO_GO_BY if name in figures)
    if found not in figures:
        raise ValueError(f"{flag} {found!r}{nearest(found, figures)}: the judges have {', '.join(figures)}")
    return found


def check_judges(config: JudgeConfig, decisive: str | None = None, flag: str = "figure") -> None:
    """Raise ValueError for settings that do not go together, and for files that are not there. Nothing is loaded.

    decisive: the figure to go by, if one is named, which must be one that the judges may have; see `Judges.decisive`.
    """
    real = [name for name in ("train", "test") if getattr(config, name)]
    networks = [name for name in ("inception", "dinov2") if getattr(config, name)]
    by_network = [*(["reference"] if config.reference else []), *networks]
    if by_network and real:
        raise ValueError(
            f"got --{by_network[0]} and --{real[0]}; pass --reference and --inception (FID and others) or "
            "--train and --test (small data, without a pre-trained network)"
        )
    if not by_network and not real:
        raise ValueError(
            "nothing to judge by; pass --reference and --inception (FID and others), or --train and "
            "--test (small data, without a pre-trained network)"
        )
    if config.reference and not networks:
        raise ValueError(
            "got --reference without --inception; pass the path of inception-2015-12-05.pt (NVIDIA) or "
            "weights-inception-2015-12-05-6726825d.pth (torch-fidelity)"
        )
    if networks and not config.reference:
        raise ValueError(
            f"got --{networks[0]} without --reference; pass ADM's reference npz, samples.npz or a folder of images"
        )
    if real:
        check_folders(config)
    for name in by_network:
        path = Path(getattr(config, name))
        if not path.exists() and not (name == "dinov2" and config.dinov2 in HUB):
            raise ValueError(f"{name}: {path}: no such file or folder")
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
        return Judges([SmallJudge(config)])
    judges = []
    networks = (("inception", config.inception, FeatureNetwork), ("dinov2", config.dinov2, Dinov2Network))
    for name, path, network_class in networks:
        if path:
            network = network_class(path, device)
            # statistics in a file are of Inception
            width = network.num_features if name == "inception" else None
            reference = open_reference(config.reference, width, size)
            judges.append(NetworkJudge(name, network, reference, config, cache, batch_size))
    if cache or (ranks and ranks.world_size > 1):
        for judge in judges:
            judge.see_reference(ranks)
    return Judges(judges)
