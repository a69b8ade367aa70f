"""Successive halving: how many images a round has, and which settings go on to the next.

Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", 2016. What is
added: a setting that the figure's spread cannot tell from the last one that stays, stays too, as far as there is room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from epg_fast.evaluation.figures import difference

FACTOR = 4
"""So many times as many images has the next round."""
FEW = 3
"""So many settings, or fewer, go on to the last round at once."""


@dataclass(frozen=True)
class Judged:
    """A figure of one setting's images: `effects` float64 [N], or None where none are known."""

    value: float
    spread: float | None
    effects: np.ndarray | None


def round_sizes(num: int, first: int, batch_size: int) -> list[int]:
    """Images per setting of each round: num / FACTOR^k in whole batches, `first` at least, and `num` in the last."""
    sizes = [num]
    while (part := num / FACTOR ** len(sizes)) >= first:
        whole = math.ceil(part / batch_size) * batch_size
        if whole >= sizes[0]:
            break
        sizes.insert(0, whole)
    return sizes


def ranked(judged: Mapping[int, Judged], best: str) -> list[int]:
    """The settings, best first: `best` is "low" or "high". Values that are not numbers come last."""
    sign = 1 if best == "low" else -1
    return sorted(judged, key=lambda number: (math.isnan(judged[number].value), sign * judged[number].value, number))


def cut(judged: Mapping[int, Judged], best: str, keep: float) -> dict[str, list[int]]:
    """What becomes of the settings of a round: `order` (best first) and `kept`, which go on.

    The share `keep` stays, and whatever is within one paired spread of the last of these, `kept_within_spread`, up to
    half; `out_within_spread` are those for which there was no room. Image i has the same noise and label in every
    setting, which cancels in the spread of their difference. Where it is not known, half stay.
    """
    order, half = ranked(judged, best), math.ceil(len(judged) / 2)
    known = all(judged[number].effects is not None for number in order)
    count = max(1, math.ceil(len(order) * keep)) if known else half
    near = []
    for number in order[count:] if known else []:
        apart, spread = difference(judged[number], judged[order[count - 1]], paired=True)
        near += [number] if abs(apart) <= spread else []
    too, out = near[: max(0, half - count)], near[max(0, half - count) :]
    return {"order": order, "kept": order[:count] + too, "kept_within_spread": too, "out_within_spread": out}
