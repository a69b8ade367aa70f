"""What a sweep leaves for people: sweep.md, sweep.html, plots, and what to type next. All are made of sweep.json."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from epg_fast import flags
from epg_fast.config import EvaluateConfig, JudgeConfig, SampleConfig, SweepConfig
from epg_fast.evaluation import page
from epg_fast.files import write_atomically
from epg_fast.sweep.folder import SweepFolder
from epg_fast.sweep.grid import Setting, shown
from epg_fast.wording import markdown_table

_FINAL = 50_000
_AXES = {"guidance": "guidance scale", "sigma_rel": "EMA width sigma_rel", "interval": "interval", "steps": "steps"}
_word = partial(shown, none="as it is")
_KINDS = {"low": "lower is better", "high": "higher is better"}


def final_commands(config: SweepConfig, best: Setting, folder: SweepFolder) -> list[str]:
    """The command that draws 50,000 images with the best setting, and the one that judges them.

    Another seed draws them: images that a setting was chosen for flatter it.
    """
    drawn = {f.name: getattr(config, f.name) for f in dataclasses.fields(SampleConfig) if hasattr(config, f.name)}
    drawn |= {"num": _FINAL, "seed": (config.seed + 1) % 2**63, "outdir": str(folder.path / "best")}
    drawn |= {"steps": best.steps, "guidance": best.guidance, "interval": best.interval}
    if best.sigma_rel is not None:
        drawn["checkpoint"] = str(folder.weights(best.sigma_rel))
    judged = {f.name: getattr(config, f.name) for f in dataclasses.fields(JudgeConfig)}
    judged |= {"samples": str(folder.path / "best" / "samples.npz"), "output": str(folder.path / "best.json")}
    judged |= {"device": config.device, "batch_size": config.batch_size}
    made = {"sample": SampleConfig(**drawn), "evaluate": EvaluateConfig(**judged)}
    return [shlex.join(["epg-fast", job, *flags.words(settings)]) for job, settings in made.items()]


def write_report(folder: SweepFolder, state: dict, commands: Sequence[str]) -> None:
    """Write sweep.md, sweep.html and the plots of a sweep that has a result; a file that is as it would be stays."""
    plots, title = _plots(state), f"{len(state['grid'])} settings of {state['settings']['checkpoint']}"
    texts = {"sweep.md": _table(title, state, commands, plots), "sweep.html": _page(title, state, commands, plots)}
    for name, content in (plots | {name: text.encode() for name, text in texts.items()}).items():
        path = folder.path / name
        if not (path.exists() and path.read_bytes() == content):
            write_atomically(path, content)


def ends(state: dict) -> list[str]:
    """The axes, such as `guidance 4`, at whose end the best lies: values beyond may be better."""
    found = []
    for name in ("guidance", "sigma_rel"):
        values = sorted({setting[name] for setting in state["grid"]} - {None})
        value = state["grid"][state["result"]][name]
        # below no guidance there is nothing
        if len(values) > 2 and value in (values[0], values[-1]) and (name, value) != ("guidance", 1):
            found.append(f"{name} {value:g}")
    return found


# ---- tables


def _remarks(state: dict) -> list[str]:
    """How to read the tables, a paragraph each."""
    figure, best = state["figure"], state["best"]
    lines = [
        f"Decided by {figure}: {_KINDS[best]}. Spreads are standard errors. Image i has the same noise and label in "
        "every setting, so that the spread of a difference is smaller than those of its two figures.",
        "A figure of few images is biased (FID upwards): compare equal numbers of images only, and none of these with "
        "one of 50,000. The best of many is flattered by having been chosen: the command below draws other noise.",
    ]
    if len(state["rounds"]) > 1:
        lines.append(
            f"Of a round stays the best {100 * state['settings']['keep']:g}%, and what is within one paired spread of "
            "the last of these, up to half of the settings; where no spread is known, half stay."
        )
    return lines + [f"The best lies at the end of its axis, {end}: try values beyond it." for end in ends(state)]


def _rounds(state: dict) -> Iterator[tuple[str, list[str], list[list[str]], str]]:
    """(title, heads and rows of its table, what is to be said below it) of each round, the last one first."""
    for number, this in reversed(list(enumerate(state["rounds"], 1))):
        grid = [state["grid"][n] for n in this["diverged"]]
        settings = ", ".join(" ".join(f"{name} {_axis_word(setting, name)}" for name in _AXES) for setting in grid)
        title = f"Round {number}: {len(this['order'])} settings, {this['images']} images of each"
        yield title, *_round_rows(state, this), f"Images that are not finite: {settings}." if settings else ""


def _table(title: str, state: dict, commands: Sequence[str], plots: Iterable[str]) -> str:
    parts = [f"# {title}", "\n".join(_remarks(state))]
    for name, heads, rows, below in _rounds(state):
        parts += [f"## {name}", markdown_table(heads, rows), *([below] if below else [])]
    parts += ["## The best", "\n".join(["```", *commands, "```"])]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def _page(title: str, state: dict, commands: Sequence[str], plots: Mapping[str, bytes]) -> str:
    tables = [
        page.section(name, page.table("", heads, rows), page.paragraph(below) if below else "")
        for name, heads, rows, below in _rounds(state)
    ]
    about = f"{state['figure']} by"
    pictures = [page.picture(content, f"{about} {name.removesuffix('.png')}") for name, content in plots.items()]
    return page.document(
        title,
        [
            *map(page.paragraph, _remarks(state)),
            page.section("The best", *map(page.command, commands)),
            page.section("Plots", page.plots(pictures)),
            *tables,
            page.protocol_section(state["protocol"]),
        ],
    )


def _round_rows(state: dict, this: dict) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a round's table."""
    figure = state["figure"]
    first = this["results"][str(this["order"][0])]
    others = [name for name in first["figures"] if name != figure]
    heads = [*_AXES, figure, "worse than the best by", *others, "s/image", ""]
    rows = []
    for n in this["order"]:
        result, setting = this["results"][str(n)], state["grid"][n]
        apart = abs(_number(result["difference"]))
        fates = {"kept_within_spread": "goes on, within the spread", "kept": "goes on"}
        fates["out_within_spread"] = "out, though within the spread"
        cells = [
            *(_axis_word(setting, name) for name in _AXES),
            _with_spread(_number(result["figures"][figure]), result["spread"][figure]),
            "" if n == this["order"][0] else _with_spread(apart, result["difference_spread"]),
            *(_with_spread(_number(result["figures"].get(name)), result["spread"].get(name)) for name in others),
            f"{result['seconds_per_image']:.3g}",
            next((fate for name, fate in fates.items() if n in this[name]), ""),
        ]
        rows.append(cells)
    return heads, rows


def _with_spread(value: float, spread: float | None) -> str:
    """`2.315 ± 0.021`: as many places as the spread's two digits have."""
    if not math.isfinite(value):
        return str(value)
    if not spread or not math.isfinite(_number(spread)):
        return f"{value:.4g}"
    places = max(0, 1 - math.floor(math.log10(spread)))
    return f"{value:.{places}f} ± {spread:.{places}f}"


def _number(value: float | str | None) -> float:
    """A number of sweep.json, where those that are not finite are texts."""
    return math.nan if value is None else float(value)


def _axis_word(setting: dict, name: str) -> str:
    return "-" if name == "interval" and setting["guidance"] == 1 else _word(setting[name])


# ---- plots


def _plots(state: dict) -> dict[str, bytes]:
    """File name -> PNG, of the axes that have several values."""
    state = state | {"grid": [setting | {"interval": tuple(setting["interval"])} for setting in state["grid"]]}
    several = {name for name in _AXES if len({_axis_word(setting, name) for setting in state["grid"]} - {"-"}) > 1}
    plots = {}
    if {"guidance", "sigma_rel"} <= several:
        plots["guidance_sigma_rel.png"] = _heat_maps(state)
        several -= {"guidance", "sigma_rel"}
    return plots | {f"{name}.png": _curves(state, name) for name in sorted(several)}


def _values(settings: list[dict], name: str) -> list:
    """The values of an axis in ascending order, `as it is` first."""
    return sorted({setting[name] for setting in settings}, key=lambda value: (value is not None, value))


def _best_of(state: dict, this: dict, *names: str) -> dict[tuple, tuple]:
    """Values of these axes, of the settings that a round has -> the best one's (number, figure, spread or 0)."""
    found = {}
    for number in this["order"]:
        result, setting = this["results"][str(number)], state["grid"][number]
        value, spread = (_number(result[kind][state["figure"]] or 0) for kind in ("figures", "spread"))
        found.setdefault(tuple(setting[name] for name in names), (number, value, spread))
    return found


def _heat_maps(state: dict) -> bytes:
    """Guidance and width, a panel for each round; in a cell the best over the other axes."""
    scales, widths = _values(state["grid"], "guidance"), _values(state["grid"], "sigma_rel")
    size = 1.6 + max(3.0, 0.85 * len(scales)), 1.3 + max(1.5, 0.55 * len(widths))

    def draw(panels):
        for panel, this in zip(panels[:, 0], state["rounds"], strict=True):
            cells = np.full((len(widths), len(scales)), math.nan)
            best = _best_of(state, this, "guidance", "sigma_rel")
            for (scale, width), (_, value, _) in best.items():
                cells[widths.index(width), scales.index(scale)] = value
            colours = "viridis_r" if state["best"] == "low" else "viridis"
            image = panel.imshow(cells, cmap=colours, aspect="auto", origin="lower")
            for (scale, width), (number, value, spread) in best.items():
                red, green, blue, _ = image.cmap(image.norm(value)) if math.isfinite(value) else (1, 1, 1, 1)
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                style = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if dark else "black"}
                style["weight"] = "bold" if number == this["order"][0] else "normal"
                text = _with_spread(value, spread).replace(" ± ", "\n± ")
                panel.annotate(text, (scales.index(scale), widths.index(width)), **style)
            panel.set_xticks(range(len(scales)), map(_word, scales))
            panel.set_yticks(range(len(widths)), map(_word, widths))
            panel.set(xlabel=_AXES["guidance"], ylabel=_AXES["sigma_rel"])
            panel.set_title(f"{state['figure']}, {this['images']} images ({_KINDS[state['best']]})", fontsize=9)
            panel.figure.colorbar(image, ax=panel)

    return page.drawn(draw, *size, rows=len(state["rounds"]))


def _curves(state: dict, name: str) -> bytes:
    """The figure over an axis, a line for each round; at each value the best over the other axes.

    For steps a second panel has the seconds of an image in the place of their number.
    """
    values = _values([setting for setting in state["grid"] if name != "interval" or setting["guidance"] != 1], name)
    numeric = name != "interval" and None not in values

    def draw(panels):
        for colour, this in enumerate(state["rounds"]):
            best = {value: chosen for (value,), chosen in _best_of(state, this, name).items()}
            present = [value for value in values if value in best]
            numbers, found, spreads = zip(*(best[value] for value in present), strict=True) if present else ((), (), ())
            places = present if numeric else [values.index(value) for value in present]
            seconds = [this["results"][str(number)]["seconds_per_image"] for number in numbers]
            style = {"color": f"C{colour}", "capsize": 3, "marker": "o", "label": f"{this['images']} images"}
            for panel, x, line in zip(panels[0], (places, seconds), ("-", "none"), strict=False):
                panel.errorbar(x, found, yerr=spreads, linestyle=line, **style)
        first = panels[0, 0]
        if len(values) <= 12 or not numeric:
            first.set_xticks(values if numeric else range(len(values)), map(_word, values))
        for panel, label in zip(panels[0], (_AXES[name], "seconds per image"), strict=False):
            panel.set(xlabel=label, ylabel=state["figure"])
            panel.grid(alpha=0.3)
        first.legend(frameon=False)
        kind = _KINDS[state["best"]]
        title = f"the best over the other axes ({kind})\ndifferences are known better than the bars say"
        first.set_title(title, fontsize=9)

    width = max(4.6, 0.0 if numeric else 1.0 * len(values))
    return page.drawn(draw, width, 3.8, columns=2 if name == "steps" else 1)
