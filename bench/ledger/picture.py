"""The picture of the ledger: a panel per job, stacked bars of the rival, ours and the minimum. Needs matplotlib."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.ledger.cost import KINDS
from bench.ledger.report import best
from bench.results import Row, significant

# Okabe and Ito's colours, as in bench.roofline_plot; products, of which nothing can be saved, in grey
_COLOURS = ("#BBBBBB", "#777777", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7")


def draw(jobs: dict[str, list[Row]], path: Path, title: str) -> None:
    """Write the PNG, 1200 pixels wide. jobs: rows of floors."""
    panels = {name: _bars(rows) for name, rows in jobs.items()}
    panels = {name: bars for name, bars in panels.items() if bars}
    if not panels:
        return
    heights = [0.35 * len(bars) + 0.75 for bars in panels.values()]
    figure = Figure(figsize=(12, sum(heights) + 1.1), dpi=100, layout="constrained")
    figure.suptitle(textwrap.fill(title, 120), fontsize=11)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for at, (name, bars) in zip(axes, panels.items(), strict=True):
        _panel(at, f"{name}: {jobs[name][0].shape}, {jobs[name][0].dtype}; milliseconds", bars)
    handles = [Patch(color=colour, label=kind) for kind, colour in zip(KINDS, _COLOURS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(KINDS), fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _bars(rows: Sequence[Row]) -> list[tuple[str, dict[str, float], str]]:
    """(label, milliseconds by kind, what stands behind the bar)."""
    bars = []
    for what, row in (("rival", best(rows, False)), ("ours", best(rows, True))):
        if row is not None:
            label = f"{what}: {row.rung}"
            bars.append((label, row.details["milliseconds"], f"{row.details['kernels']:,} kernels"))
    least = next((row.details["least"] for row in rows if "least" in row.details), None)
    return bars + ([("minimum", least, "")] if least and bars else [])


def _panel(axes: Axes, title: str, bars: list[tuple[str, dict[str, float], str]]) -> None:
    most = max(sum(split.values()) for _, split, _ in bars)
    for place, (_, split, behind) in enumerate(bars):
        left = 0.0
        for kind, colour in zip(KINDS, _COLOURS, strict=True):
            axes.barh(place, split.get(kind, 0.0), left=left, color=colour, height=0.72)
            left += split.get(kind, 0.0)
        axes.text(left + 0.008 * most, place, f"{significant(left, 4)} ms  {behind}", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=9)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 1.22 * most)
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
