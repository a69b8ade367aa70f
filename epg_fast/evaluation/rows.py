"""What a judge has seen of images: one row an image in each of a few tensors, and what makes figures of them.

Figures are a function of the rows in the images' order, so that they do not depend on batches, ranks or interruptions,
and images need not be kept.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence

import torch

from epg_fast.evaluation.figures import Figure

Rows = dict[str, torch.Tensor]
"""What is kept of n images: name -> [n, ...] on the CPU."""


def collect(parts: Iterable[tuple[slice, Rows]], num: int) -> Rows:
    """The rows of `num` images from those of parts of them, (which images, their rows), each part in turn."""
    whole: Rows = {}
    for where, rows in parts:
        for name, values in rows.items():
            if name not in whole:
                whole[name] = torch.empty(num, *values.shape[1:], dtype=values.dtype)
            whole[name][where] = values
    return whole


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Rows one behind the other."""
    return {name: torch.cat([rows[name] for rows in parts]) for name in parts[0]}


def take_rows(rows: Rows, chosen: slice) -> Rows:
    """The rows of some of the images."""
    return {name: values[chosen] for name, values in rows.items()}


class Judge(abc.ABC):
    """`name`: the first part of its rows' names. `best`: figure -> "low" or "high"."""

    name: str
    best: dict[str, str]
    least: int
    """Images that its figures need at least."""

    @abc.abstractmethod
    def rows(self, images: torch.Tensor, labels: torch.Tensor | None) -> Rows:
        """What is kept of images uint8 [B, 3, H, W] with labels int64 [B]."""

    @abc.abstractmethod
    def figures(self, rows: Rows) -> dict[str, Figure]:
        """The figures of images of which these are the rows."""

    @property
    @abc.abstractmethod
    def description(self) -> dict:
        """Who judges, and against what: files with their SHA-256, constants of the protocol."""

    @property
    def missing(self) -> dict[str, str]:
        """Figures that it would have with another reference: name -> the reason."""
        return {}

    @abc.abstractmethod
    def facts(self, figures: Mapping[str, Figure], rows: Rows, size: tuple[int, int]) -> dict:
        """What helps to read the figures of images of `size` (height, width), for JSON."""

    @abc.abstractmethod
    def sentence(self, num: int, size: tuple[int, int]) -> str:
        """How `num` images of `size` are judged, for people."""

    def check(self, num: int) -> None:  # noqa: B027 (most have nothing to say)
        """Warn where `num` images are too few for a figure to mean what others' do."""
