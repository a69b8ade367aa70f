"""The README.md and the plots of a folder of results, made from its JSON files alone.

python -m bench.report FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import cpu_compare
from bench.bench_sample import RUNGS as SAMPLING
from bench.bench_train import RUNGS as TRAINING
from bench.compare import op_rows
from bench.goals import goals_table
from bench.results import Row, header_lines, markdown_table, read, read_json, significant, write_text
from bench.tables import in_order, ladder_table, split_table

_OURS = ("triton", "cuda", "extension", "extension_")
_ORDER = {rung.name: None for rung in (*SAMPLING, *(rung for rungs in TRAINING.values() for rung in rungs))}

_HOW = """\
A row is one way of doing the job, in the order of the ladder; speed-up is against the first row with a number. Numbers
are medians with their 20th and 80th percentiles. Peak memory is the allocator's. MFU is the job's matrix products over
what a large bfloat16 product reached in the same process, FP8 included. The error of sampling is the relative L2 of
images against the plain code in float32 from the same noise, with random weights; that of training is of the first
losses, likewise. Rows without numbers say why.
"""

_REDUCED = """\
Without a GPU this is the reduced form: small networks on one thread, and compiled rungs in one ladder alone. It shows
that everything runs; what a GPU does cannot be told from it. The comparison on a CPU is meant as it stands.
"""


def write(folder: Path) -> str:
    """Write the README.md and the plots of `folder`; returns the text. Raises ValueError if nothing is in it."""
    found = {name: _read(folder / f"{name}.json") for name in ("sampling", "training", "cpu")}
    if not any(found.values()) and not _ops_files(folder):
        raise ValueError(f"{folder}: holds no results; python -m bench --output {folder} makes some")
    about = next((run.header for run in found.values() if run), None) or _ops_header(folder)
    rows = {name: list(run.rows) if run else [] for name, run in found.items()}
    both = [*rows["sampling"], *rows["training"]]
    sections = [
        f"# Benchmarks on {about.get('device', 'an unknown device')}\n",
        header_lines(about),
        _missing(folder),
        _REDUCED if about.get("gpu") == "none" else "",
        "## Goals\n",
        goals_table(both, about.get("gpu", "none")),
        "## How to read the ladders\n" if both else "",
        _HOW if both else "",
        _ladders("Sampling", rows["sampling"], folder / "sampling.png", about),
        _ladders("Training", rows["training"], folder / "training.png", about),
        _cpu(rows["cpu"]),
        _operations(folder),
        _data(folder),
        _roofline(folder),
    ]
    text = "\n".join(section for section in sections if section)
    write_text(folder / "README.md", text)
    return text


def ladders_of(rows: list[Row]) -> list[list[Row]]:
    """Rows by job and shape, each in the order of the ladder."""
    keys = dict.fromkeys((row.job, row.shape) for row in rows)
    return [in_order([row for row in rows if (row.job, row.shape) == key], list(_ORDER)) for key in keys]


def _read(path: Path):
    return read(path) if path.exists() else None


def _ladders(title: str, rows: list[Row], plot: Path, about: dict) -> str:
    if not rows:
        return ""
    parts = [f"## {title}\n"]
    if _draw(ladders_of(rows), plot, f"{title} on {about['device']}, torch {about['torch']}"):
        parts.append(f"![{title}]({plot.name})\n")
    for ladder in ladders_of(rows):
        parts += [f"### {ladder[0].job}: {ladder[0].shape}\n", ladder_table(ladder)]
        if split := split_table(ladder):
            parts += ["Milliseconds by class of kernel (of operator on a CPU), and what they leave as gaps:\n", split]
    return "\n".join(parts)


def _draw(ladders: list[list[Row]], path: Path, title: str) -> bool:
    """Whether the plot was drawn."""
    if not any(row.median is not None for rows in ladders for row in rows):
        return False
    try:
        from bench.ladder_plot import draw
    except ImportError:
        print(f"{path.name} needs matplotlib: pip install 'epg_fast[demo]'", file=sys.stderr)
        return False
    draw(ladders, path, title)
    return True


def _cpu(rows: list[Row]) -> str:
    if not rows:
        return ""
    how = "Float32, nothing compiled, in turns; a ratio above 1 says that the package is faster.\n"
    return "\n".join(["## On a CPU: the package against the plain code\n", how, cpu_compare.table(rows)])


def _ops_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("ops*.json"))


def _ops_header(folder: Path) -> dict:
    return dict(read_json(_ops_files(folder)[0]).get("machine_info", {}))


def _operations(folder: Path) -> str:
    """A row per operation, shape and direction: the package's fastest kernel against the others' fastest."""
    groups: dict[tuple, dict[str, dict]] = {}
    for file in _ops_files(folder):
        for identity, info in op_rows(read_json(file), file):
            key = tuple(part for part in identity if part != info["provider"])
            groups.setdefault(key, {})[info["provider"]] = info
    if not groups:
        return ""
    cells = []
    for key, providers in groups.items():
        ours = _fastest({name: info for name, info in providers.items() if name in _OURS})
        others = _fastest({name: info for name, info in providers.items() if name not in _OURS})
        factor = f"{significant(others[1] / ours[1])}x" if ours and others else ""
        kinds = [(f"{significant(found[1])} ({found[0]})" if found else "") for found in (ours, others)]
        cells.append((key[0], ", ".join(key[1:]).replace("torch.", ""), *kinds, factor))
    columns = ("operation", "what", "ours, us", "the fastest other, us", "other / ours")
    return "\n".join(["## Operations\n", markdown_table(columns, cells)])


def _fastest(providers: dict[str, dict]) -> tuple[str, float] | None:
    name = min(providers, key=lambda name: providers[name]["median_us"], default=None)
    return None if name is None else (name, providers[name]["median_us"])


def _data(folder: Path) -> str:
    if not (folder / "data.json").exists():
        return ""
    content = read_json(folder / "data.json")
    cells = [
        (row["loader"], row["views"], significant(row["rate"]), f"{significant(row['speed_up'])}x")
        for row in content["rows"]
    ]
    options = content["options"]
    how = f"{options['image_size']} pixels, {options['threads']} threads, decoding on {options['device']}.\n"
    table = markdown_table(("loader", "views", "images/s", "against Pillow"), cells)
    return "\n".join(["## Loading\n", how, table])


def _roofline(folder: Path) -> str:
    if not (folder / "roofline.md").exists():
        return ""
    picture = "![Roofline](roofline.png)\n" if (folder / "roofline.png").exists() else ""
    return "\n".join(
        ["## Roofline\n", "Floors of all parts and the operations under them: [roofline.md](roofline.md).\n", picture]
    )


def _missing(folder: Path) -> str:
    """What was not done, by bench.run's notes."""
    if not (folder / "progress.json").exists():
        return ""
    outcomes = {name: part["outcome"] for name, part in read_json(folder / "progress.json").items()}
    missing = {name: outcome for name, outcome in outcomes.items() if outcome != "complete"}
    if not missing:
        return "All parts are complete.\n"
    return "Missing:\n\n" + "".join(f"- {name}: {outcome}\n" for name, outcome in missing.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    try:
        write(options.folder)
    except ValueError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
