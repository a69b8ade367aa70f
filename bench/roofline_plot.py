"""The plot of bench.roofline: measured operations under the ceilings of products and memory. Needs matplotlib."""

from __future__ import annotations

import os
import statistics
import textwrap
from math import ceil, log10
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from bench.results import significant

if TYPE_CHECKING:
    from bench.parts import Ceilings, Point

# Okabe and Ito's colours, which colour-blind readers tell apart, too. What is ours comes last, on top.
_COLOURS = {"eager": "#999999", "torch.compile": "#E69F00", "library": "#0072B2", "kernel of this package": "#D55E00"}
_GROUPS = {"eager": "eager", "compile": "torch.compile", "compile_": "torch.compile"}
_GROUPS |= dict.fromkeys(("triton", "cuda", "extension", "extension_"), "kernel of this package")
_MARKERS = {"forward": "o", "forward+backward": "s", "step": "D"}
_STRIP = 0.32  # share of the height, at the bottom, for the operations' names
_GAP = 0.019  # of the width between two names


def draw(points: list[Point], ceilings: Ceilings, path: Path) -> None:
    """Write the PNG, 1200 pixels wide."""
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    _frame(axes, points, ceilings)
    _roof(axes, ceilings)
    for group, colour in _COLOURS.items():
        for direction, marker in _MARKERS.items():
            here = [p for p in points if _group(p) == group and _direction(p) == direction]
            style = {"marker": marker, "facecolor": colour, "edgecolor": "white", "linewidth": 0.6, "s": 40}
            axes.scatter([p.intensity for p in here], [p.tflops for p in here], zorder=3, alpha=0.9, **style)
    _names(axes, points)
    _legend(axes, points)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _frame(axes: Axes, points: list[Point], ceilings: Ceilings) -> None:
    """Scales, limits that leave the strip free, title and units."""
    ridge = ceilings.products / ceilings.memory
    xs = [log10(x) for x in (*(p.intensity for p in points), ridge)]
    ys = [log10(y) for y in (*(p.tflops for p in points), ceilings.products / 1e12)]
    left, right, low, high = min(xs) - 0.25, max(xs) + 0.3, min(ys) - 0.15, max(ys) + 0.35
    low = (low - _STRIP * high) / (1 - _STRIP)
    axes.set(xscale="log", yscale="log", xlim=(10**left, 10**right), ylim=(10**low, 10**high))
    axes.set_xlabel("arithmetic intensity, FLOP per byte of the operation's traffic model", fontsize=11)
    axes.set_ylabel("TFLOP/s", fontsize=11)
    axes.yaxis.set_major_locator(FixedLocator([10.0**i for i in range(ceil(min(ys) - 0.15), ceil(high))]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(which="major", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    source = "\n".join(textwrap.wrap(f"Ceilings {ceilings.source}", 130))
    axes.set_title(f"Operations under the roofline\n{source}", fontsize=11)


def _roof(axes: Axes, ceilings: Ceilings) -> None:
    left, right = axes.get_xlim()
    ridge = ceilings.products / ceilings.memory
    xs = sorted({left, ridge, right})
    axes.plot(xs, [ceilings.at(x) / 1e12 for x in xs], color="black", linewidth=1.6, zorder=2)
    products = f"{significant(ceilings.products / 1e12)} TFLOP/s, large product in bfloat16"
    axes.annotate(products, (right, ceilings.products / 1e12), (-6, 5), textcoords="offset points", ha="right")
    # where the slope is above the names' strip, two thirds of the way to the ridge
    low, high = map(log10, axes.get_ylim())
    start = max(log10(left), low + _STRIP * (high - low) - log10(ceilings.memory / 1e12))
    place = 10 ** (start + 2 / 3 * (log10(min(ridge, right)) - start))
    copy = f"{significant(ceilings.memory / 1e9)} GB/s, large copy"
    axes.annotate(copy, (place, ceilings.at(place) / 1e12), (-8, 4), textcoords="offset points", ha="right")


def _names(axes: Axes, points: list[Point]) -> None:
    """Each operation's name in the strip, with a line to the lowest of its points."""
    transform, left = axes.transAxes, log10(axes.get_xlim()[0])
    width = log10(axes.get_xlim()[1]) - left
    anchors = {}
    for op in {p.op for p in points}:
        own = [p for p in points if p.op == op]
        middle = statistics.median(p.intensity for p in own)
        anchors[op] = min(own, key=lambda p: (abs(log10(p.intensity / middle)) > 0.1, p.tflops))
    ops = sorted(anchors, key=lambda op: (anchors[op].intensity, op))
    places = spread([(log10(anchors[op].intensity) - left) / width for op in ops], _GAP)
    for op, x in zip(ops, places, strict=True):
        axes.text(x, _STRIP - 0.03, op, transform=transform, rotation=90, ha="center", va="top", fontsize=9, zorder=4)
        axes.annotate(
            "",
            (anchors[op].intensity, anchors[op].tflops),
            (x, _STRIP - 0.025),
            textcoords=transform,
            arrowprops={"arrowstyle": "-", "color": "#777777", "linewidth": 0.7, "shrinkB": 4},
            zorder=1,
        )


def spread(places: list[float], gap: float) -> list[float]:
    """Rising places in 0..1, moved as little as can be (least squares) so that neighbours are `gap` apart, inside it.

    Raises ValueError for more than there is room for.
    """
    if (len(places) - 1) * gap > 1 - gap:
        raise ValueError(f"plot: got {len(places)} names, wanted {int(1 / gap)} at most; measure fewer operations")
    groups: list[list[float]] = []  # of places less their rank's gaps, which must not fall: equal within a group
    for i, place in enumerate(places):
        groups.append([place - i * gap])
        while len(groups) > 1 and statistics.mean(groups[-2]) > statistics.mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    level = [statistics.mean(group) for group in groups for _ in group]
    first, last = gap / 2, 1 - gap / 2 - (len(places) - 1) * gap
    return [min(max(y, first), last) + i * gap for i, y in enumerate(level)]


def _legend(axes: Axes, points: list[Point]) -> None:
    groups, directions = {_group(p) for p in points}, {_direction(p) for p in points}
    handles = [
        Line2D([], [], linestyle="", marker="o", color=colour, label=group)
        for group, colour in _COLOURS.items()
        if group in groups
    ]
    handles += [
        Line2D([], [], linestyle="", marker=marker, markerfacecolor="none", color="black", label=direction)
        for direction, marker in _MARKERS.items()
        if direction in directions
    ]
    axes.legend(handles=handles, loc="upper left", fontsize=9, framealpha=1)


def _group(point: Point) -> str:
    return _GROUPS.get(point.provider, "library")


def _direction(point: Point) -> str:
    return point.direction if point.direction in _MARKERS else "forward"
