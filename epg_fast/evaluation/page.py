"""Results as one HTML page that needs nothing else: no network, no script, no other file.

`result_page` is that of `evaluate`; `document`, `section`, `table`, `images`, `plots` and others make pages of the same
looks. Whatever is given to them is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from epg_fast.evaluation.images import open_stream
from epg_fast.evaluation.protocol import class_names
from epg_fast.files import flat
from epg_fast.wording import import_extra

_SHOWN, _TILE = 48, 128
_NO_PLOTS = "There are no plots, which need matplotlib: pip install 'epg_fast[demo]'."
MARK = '<meta name="generator" content="epg-fast">\n'
"""What tells a page of ours from other files."""
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5a616b; --line: #d5d9df; --back: #ffffff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a2a9b4; --line: #3a4048; --back: #16181c; --card: #1e2126; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { max-width: 45rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 1rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 600; }
table.numbers td { white-space: nowrap; overflow-wrap: normal; }
table.names tbody th { font-weight: 400; color: var(--soft); overflow-wrap: anywhere; width: 30%; min-width: 8rem; }
pre { background: var(--card); border: 1px solid var(--line); padding: .6rem .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .875rem; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)); gap: .4rem; }
.images figure { margin: 0; }
.images img { display: block; width: 100%; height: auto; }
.images figcaption { font-size: .75rem; color: var(--soft); text-align: center; overflow-wrap: anywhere; }
.small img { image-rendering: pixelated; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots figure { margin: 0; max-width: 100%; }
.plots figcaption { font-size: .875rem; color: var(--soft); max-width: 26rem; }
.plots img { display: block; max-width: 100%; height: auto; zoom: 64%; }
@media (max-width: 30rem) {
  table { font-size: .8125rem; }
  th, td { padding-right: .45rem; } }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --back: #fff; --card: #fff; }
  body { max-width: none; font-size: 10pt; }
  .images { grid-template-columns: repeat(12, 1fr); }
  .scroll { overflow: visible; }
  h2 { break-after: avoid; }
  figure, tr, pre { break-inside: avoid; }
}
"""


def result_page(result: Mapping, path: str | os.PathLike | None = None) -> str:
    """The page of a result of `evaluate_images`. path: where the result is written, for the command that repeats it."""
    stream = open_stream(result["samples"])
    num = min(stream.num, _SHOWN)
    _, first = next(stream.batches(num))
    labels = None if stream.labels is None else stream.labels[:num]
    missing = (paragraph(f"{name}: {reason}.") for name, reason in result.get("missing", {}).items())
    sections = [
        section("Figures", _figures(result), *missing),
        section("Images", images(first.permute(0, 2, 3, 1).numpy(), labels, class_names(result["samples"]))),
        _plots(result),
    ]
    optional = {"compared": ("Comparison", _comparison), "repeats": ("Repeats", _repeats)}
    optional["repeated"] = "Repeated", _repeated
    sections += [section(title, make(result[name])) for name, (title, make) in optional.items() if name in result]
    sections += [protocol_section(result["protocol"]), section("To repeat it", _command(result, path))]
    return document(f"Evaluation of {result['samples']}", sections)


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page of parts that the functions below have made."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'{MARK}<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_escaped(title)}</h1>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Parts under a title."""
    return f"<section>\n<h2>{_escaped(title)}</h2>\n{''.join(parts)}</section>\n"


def paragraph(text: str) -> str:
    """Text."""
    return f"<p>{_escaped(text)}</p>\n"


def command(words: str) -> str:
    """What is to be typed."""
    return f"<pre>{_escaped(words)}</pre>\n"


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "numbers") -> str:
    """A table whose first column names its rows. kind: `numbers`, or `names` for long text, which is wrapped."""
    head = "".join(f'<th scope="col">{_escaped(name)}</th>' for name in heads)
    body = ""
    for first, *values in rows:
        name = _shown(first)
        if kind == "names":  # a long one is broken between its parts first
            name = re.sub(r"(?<=[._])(?=\w)", "<wbr>", name)
        cells = "".join(f"<td>{_shown(value)}</td>" for value in values)
        body += f'<tr><th scope="row">{name}</th>{cells}</tr>\n'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_escaped(caption)}">'
        f'<table class="{kind}"><caption>{_escaped(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def images(pixels: np.ndarray, labels: Sequence[int] | None = None, names: Sequence[str] = ()) -> str:
    """A grid of uint8 images [N, H, W, 3], large ones reduced; `labels` [N] and their names stand below them."""
    height, width = pixels.shape[1:3]
    scale = min(1.0, _TILE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    tiles = []
    for i, array in enumerate(pixels):
        image = Image.fromarray(array)
        image = image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        about = caption = ""
        if labels is not None:
            label = int(labels[i])
            known = f"{label} {_escaped(names[label])}" if label < len(names) else f"class {label}"
            about, caption = f", {known}", f"<figcaption>{known}</figcaption>"
        source = f'src="{_inlined(file.getvalue())}" width="{size[0]}" height="{size[1]}"'
        tiles.append(f'<figure><img {source} alt="image {i}{about}">{caption}</figure>\n')
    reduced = "" if scale == 1 else f", reduced from {width}x{height} to {size[0]}x{size[1]} pixels"
    small = " small" if max(height, width) <= 64 else ""
    return f'{paragraph(f"The first {len(pixels)}{reduced}.")}<div class="images{small}">\n{"".join(tiles)}</div>\n'


def picture(png: bytes, alt: str, caption: str = "") -> str:
    """A PNG file, such as a plot."""
    about = f"<figcaption>{_escaped(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{_inlined(png)}" alt="{_escaped(alt)}">{about}</figure>\n'


def drawn(draw: Callable[[Any], None], width: float, height: float, rows: int = 1, columns: int = 1) -> bytes:
    """PNG file of what `draw(panels)` draws on matplotlib's axes [rows, columns], each of so many inches.

    Raises ImportError without matplotlib.
    """
    figure = import_extra("matplotlib.figure").Figure((width * columns, height * rows), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    draw(panels)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def plots(drawn: Iterable[str]) -> str:
    """Plots and pictures beside each other, as far as they have room."""
    return f'<div class="plots">\n{"".join(drawn)}</div>\n'


def protocol_section(protocol: Mapping) -> str:
    """A protocol's text, and a table of each part; of lists of mappings each has a number."""
    titles = {"sampling": "How the images were drawn", "judging": "How they were judged"}
    titles["versions"] = "Versions and device of judging"
    tables = []
    for part, title in titles.items():
        tree = dict(protocol[part])
        for name, value in tree.items():
            if isinstance(value, list) and value and isinstance(value[0], Mapping):
                tree[name] = {str(i + 1): item for i, item in enumerate(value)} if len(value) > 1 else value[0]
        rows = [(name, str(value) if isinstance(value, float) else value) for name, value in flat(tree).items()]
        tables.append(table(title, ("setting", "value"), rows, "names"))
    return section("Protocol", paragraph(protocol["text"]), *tables)


def _figures(result: Mapping) -> str:
    num = result["num_samples"]
    rows = [(name, result[name], _rounded(spread), num) for name, spread in result["spread"].items()]
    how = result["protocol"]["judging"]["spread"]
    return table(how, ("figure", "value", "spread", "images"), rows)


def _repeats(repeats: Mapping) -> str:
    rows = []
    for name, found in repeats.items():
        if isinstance(found, Mapping):
            best = next(f"{kind} {_number(found[kind])}" for kind in ("minimum", "maximum") if kind in found)
            values = ", ".join(map(_number, found["values"]))
            rows.append((name, found["mean"], _rounded(found["deviation"]), best, values))
    caption = f"{repeats['num']} parts of {repeats['images_each']} images, judged apart"
    return table(caption, ("figure", "mean", "deviation", "best", "values"), rows)


def _comparison(compared: Mapping) -> str:
    rows = []
    for name, found in compared.items():
        if isinstance(found, Mapping):
            differs = {None: "not known", True: "yes", False: "no"}[found["differs"]]
            rows.append((name, found["value"], found["difference"], _rounded(found["spread"]), differs))
    noise = "which share their noise" if compared["same_noise"] else "drawn from other noise"
    caption = f"{compared['samples']}: {compared['num_samples']} images, {noise}; yes: by more than two spreads"
    return table(caption, ("figure", "theirs", "difference", "spread", "differs"), rows)


def _repeated(repeated: Mapping) -> str:
    rows = [
        (name, f["then"], f["now"], f["difference"], _rounded(f["standard_errors"]))
        for name, f in repeated["figures"].items()
    ]
    about = repeated["images"]
    same = {None: f"not known: {about.get('why')}", True: "yes, bit for bit", False: "no"}[about["same"]]
    changes = [(*change.partition(" was ")[::2],) for change in repeated["protocol"]]
    figures = table("Figures then and now", ("figure", "then", "now", "difference", "in standard errors"), rows)
    return figures + table("What else differs", ("setting", "was"), [("images are the same", same), *changes], "names")


def _plots(result: Mapping) -> str:
    """The section of plots of what there is; without matplotlib it says so."""
    draw = [partial(_curve_plot, result, name) for name in result if name.endswith("_infinity_curve")]
    given = [name for name in result["spread"] if name.startswith("precision") and result[name] is not None]
    draw += [partial(_cover_plot, result, name.removeprefix("precision")) for name in given]
    if not draw:
        return ""
    try:
        return section("Plots", plots(make() for make in draw))
    except ImportError:
        return section("Plots", paragraph(_NO_PLOTS))


def _curve_plot(result: Mapping, name: str) -> str:
    infinity = name.removesuffix("_curve")
    distance, points = infinity.removesuffix("_infinity"), np.array(result[name], float)
    end, spread = result[infinity], result["spread"].get(infinity)

    def draw(panels):
        x, axes = 1 / points[:, 0], panels[0, 0]
        axes.plot([0, x.max()], [end, end + np.polyfit(x, points[:, 1], 1)[0] * x.max()], "C0", linewidth=1)
        axes.plot(x, points[:, 1], "C0o", markersize=4)
        axes.errorbar([0], [end], None if spread is None else [spread], fmt="C0D", markersize=5, capsize=3)
        ticks = [0, *x[[-1, len(x) // 2, 0]]]
        axes.set_xticks(ticks, ["infinitely\nmany", *(f"{round(1 / tick)}" for tick in ticks[1:])])
        axes.set(xlabel="images n, on a scale of 1/n", ylabel=distance)

    (first, at_first), (last, at_last) = points[[0, -1]]
    alt = f"{distance} against 1/n: {at_first:.4g} of {first:.0f} images, {at_last:.4g} of {last:.0f}, {end:.4g} at "
    caption = f"{distance} of parts of the images, and the line to infinitely many of them"
    return picture(drawn(draw, 4.4, 3), f"{alt}infinity", caption)


def _cover_plot(result: Mapping, suffix: str) -> str:
    names = [f"recall{suffix}", f"precision{suffix}"]
    values, spreads = [result[name] for name in names], [result["spread"].get(name) or 0 for name in names]
    theirs = [result.get("compared", {}).get(name, {}).get("value") for name in names]

    def draw(panels):
        axes = panels[0, 0]
        axes.errorbar(*values, yerr=spreads[1], xerr=spreads[0], fmt="C0o", capsize=3, label="samples")
        if None not in theirs:
            axes.plot(*theirs, "ks", fillstyle="none", label="compared")
            axes.legend(frameon=False)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=names[0], ylabel=names[1], aspect="equal")

    alt = f"{names[1]} {values[1]:.4g}, {names[0]} {values[0]:.4g}"
    return picture(drawn(draw, 3.4, 3), alt, f"{names[1]} and {names[0]}, with their spreads")


def _command(result: Mapping, path: str | os.PathLike | None) -> str:
    if "weights_sha256" not in result["protocol"]["sampling"]:
        return paragraph("The images do not say how they were drawn, so that they cannot be drawn again.")
    text = "Its images are drawn and judged again, and compared with these figures, by"
    without = "" if path else " (FILE is what --output writes)"
    file = shlex.quote(os.fspath(path)) if path else "FILE"
    return paragraph(f"{text}{without}:") + command(f"epg-fast evaluate --protocol {file} --outdir NEW_FOLDER")


def _escaped(text: str) -> str:
    # names of files may be no UTF-8
    return html.escape(str(text).encode(errors="backslashreplace").decode(), quote=True)


def _inlined(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _number(value: float) -> str:
    return f"{value:.5g}"


def _rounded(spread: float | None) -> str | None:
    """More digits of a spread say nothing."""
    return None if spread is None else f"{float(f'{spread:.2g}'):g}"


def _shown(value) -> str:
    """A value in a cell of a table, escaped."""
    if value is None or value == "":
        return "&ndash;"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(value)
    return _escaped(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
