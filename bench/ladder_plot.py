"""The picture of ladders: a bar per rung, with its spread, beside one another. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.results import Row, significant

# Okabe and Ito's colours, as in bench.roofline_plot
_PLAIN, _COMPILED, _OURS, _FP8 = "#999999", "#E69F00", "#D55E00", "#0072B2"
_ROW, _HEAD = 0.34, 1.1  # inches


def draw(ladders: Sequence[Sequence[Row]], path: Path, title: str) -> None:
    """Write the PNG, 1200 pixels wide, a panel per ladder. Raises ValueError where nothing was measured at all."""
    ladders = [rows for rows in ladders if any(row.median is not None for row in rows)]
    if not ladders:
        raise ValueError("plot: got no measured row, wanted one")
    heights = [_ROW * len(rows) + _HEAD for rows in ladders]
    figure = Figure(figsize=(12, sum(heights) + 0.6), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(len(ladders), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, rows in zip(panels, ladders, strict=True):
        _panel(axes, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    most = max(row.p80 for row in rows if row.median is not None)
    for place, row in zip(places, rows, strict=True):
        if row.median is None:
            axes.text(0.01 * most, place, row.note[:90], va="center", fontsize=9, color="#555555", style="italic")
            continue
        spread = [[row.median - row.p20], [row.p80 - row.median]]
        axes.barh(place, row.median, xerr=spread, color=_colour(row), height=0.7, error_kw={"linewidth": 1})
        text = f"{significant(row.median)}, {row.details['mfu']:.0%} of the GEMM ceiling"
        axes.text(row.p80 + 0.01 * most, place, text, va="center", fontsize=9)
    axes.set_yticks(places, [f"{row.rung} ({row.dtype})" for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * most)
    better = "more is better" if rows[0].unit == "images/s" else "less is better"
    axes.set_xlabel(f"{rows[0].unit}, {better}; the line is the 20th to the 80th percentile", fontsize=9)
    axes.set_title(f"{rows[0].job}: {rows[0].shape}", fontsize=10, loc="left")
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(row: Row) -> str:
    if row.rung.startswith("plain"):
        return _COMPILED if "compile" in row.rung else _PLAIN
    return _FP8 if row.dtype == "fp8" else _OURS
