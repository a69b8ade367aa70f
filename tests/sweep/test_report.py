"""What a sweep leaves for people: a table that can be read, plots of the axes that have several values."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from epg_fast.sweep import report
from epg_fast.sweep.folder import SweepFolder

SCALES, WIDTHS, PAIRS = [1.0, 1.5, 2.0, 2.5, 3.0], [None, 0.05, 0.1], [[0.19, 1.61], [0.28, 2.9]]


def state(steps=(18, 32), best="low", scales=SCALES, widths=WIDTHS, pairs=PAIRS):
    """A sweep of two rounds whose landscape has its best at guidance 2, width 0.05, the second interval, all steps."""
    grid = [
        {"guidance": scale, "sigma_rel": width, "interval": pair, "steps": number, "evaluations": 2 * number}
        for width, number, pair, scale in itertools.product(widths, steps, pairs, scales)
        if scale != 1 or pair == pairs[0]
    ]
    sign = 1 if best == "low" else -1

    def result(setting, images):
        value = 2 + 100 / images + (setting["guidance"] - 2) ** 2 + 0.1 / setting["steps"]
        value += 0.3 * (setting["sigma_rel"] != 0.05) + 0.2 * (setting["interval"] == pairs[0])
        spread = 0.2 / images**0.5
        said = {"figures": {"fid": sign * value}, "spread": {"fid": spread}}
        said["seconds_per_image"] = setting["steps"] / 100
        if images == 1000:
            said["figures"]["recall"], said["spread"]["recall"] = 0.625, None
        return said

    rounds, alive = [], list(range(len(grid)))
    for images in (250, 1000):
        results = {n: result(grid[n], images) for n in alive}
        order = sorted(alive, key=lambda n: (sign * results[n]["figures"]["fid"], n))
        first = results[order[0]]["figures"]["fid"]
        for n in order:
            results[n] |= {"difference": results[n]["figures"]["fid"] - first, "difference_spread": 0.001}
        kept = order[: max(1, len(order) // 4)] if images == 250 else []
        this = {"images": images, "order": order, "kept": kept, "kept_within_spread": kept[-1:], "diverged": []}
        this |= {"out_within_spread": order[len(kept) : len(kept) + 1] if kept else []}
        rounds.append(this | {"results": {str(n): results[n] for n in order}})
        alive = kept
    wanted = {"checkpoint": "run", "keep": 0.25}
    said = {"text": "how", "sampling": {"seed": 3}, "judging": {"judges": {}}, "versions": {}}
    sweep = {"settings": wanted, "grid": grid, "figure": "fid", "best": best, "rounds": rounds, "protocol": said}
    return sweep | {"result": order[0]}


def test_a_figure_has_as_many_places_as_its_spread():
    assert report._with_spread(2.31478, 0.0213) == "2.315 ± 0.021"
    assert report._with_spread(231.4, 12.3) == "231 ± 12"
    assert report._with_spread(0.625, None) == "0.625"
    assert report._with_spread(float("nan"), None) == "nan"
    assert report._with_spread(2.31478, float("nan")) == "2.315"


@pytest.mark.parametrize("best", ["low", "high"])
def test_the_table_says_who_went_on_and_how_far_the_others_were_off(best, tmp_path):
    made = state(best=best)
    report.write_report(SweepFolder(tmp_path), made, ["epg-fast sample --num 50000", "epg-fast evaluate"])
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    rounds = [i for i, line in enumerate(lines) if line.startswith("## Round")]
    assert lines[rounds[0]] == f"## Round 2: {len(made['rounds'][1]['order'])} settings, 1000 images of each"
    last, first = lines[rounds[0] : rounds[1]], lines[rounds[1] :]
    assert last[2].split(" | ")[4:7] == ["fid", "worse than the best by", "recall"]
    sign = "" if best == "low" else "-"
    cells = [cell.strip() for cell in last[4].strip("|").split("|")]
    assert cells == ["2", "0.05", "0.28-2.9", "32", f"{sign}2.1031 ± 0.0063", "", "0.625", "0.32", ""]
    assert [cell.strip() for cell in last[5].split("|")][5:7] == [f"{sign}2.1056 ± 0.0063", "0.0024 ± 0.0010"]
    fates = [line.split("|")[-2].strip() for line in first if line.startswith("| ")][2:]
    kept = len(made["rounds"][0]["kept"])
    assert fates[:kept] == ["goes on"] * (kept - 1) + ["goes on, within the spread"]
    assert fates[kept] == "out, though within the spread" and set(fates[kept + 1 :]) == {""}
    assert "epg-fast sample --num 50000" in lines and not [line for line in lines if "end of its axis" in line]


def test_a_best_at_the_end_of_its_axis_is_said():
    assert report.ends(state(scales=[1.0, 1.5, 2.0])) == ["guidance 2"]
    assert report.ends(state(widths=[None, 0.05, 0.07, 0.1])) == ["sigma_rel 0.05"]
    assert report.ends(state(scales=[2.0, 3.0])) == []  # two values have no inside
    unguided = state(scales=[1.0, 4.0, 5.0])
    assert unguided["grid"][unguided["result"]]["guidance"] == 1 and report.ends(unguided) == []


@pytest.mark.parametrize(
    ("axes", "plots"),
    [
        ({}, {"guidance_sigma_rel.png", "interval.png", "steps.png"}),
        ({"widths": [None], "pairs": PAIRS[:1], "steps": (18,)}, {"guidance.png"}),
        ({"scales": [2.0], "widths": [0.05, 0.1], "pairs": PAIRS[:1], "steps": (18,)}, {"sigma_rel.png"}),
    ],
)
def test_every_axis_of_several_values_has_its_plot(axes, plots):
    drawn = report._plots(state(**axes))
    assert drawn.keys() == plots
    for content in drawn.values():
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert pixels.shape[0] > 300 and pixels.std() > 10
