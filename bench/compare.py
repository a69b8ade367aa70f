"""What became slower between two sets of results of one machine.

    python -m bench.compare OLD NEW                 # folders of results, or single files
    python -m bench.compare OLD NEW --threshold 5   # percent that do not count

Rows are matched by what they measure. One counts as slower, or faster, if its 20th to 80th percentiles do not overlap
with the old ones and the median moved by more than the threshold. Exit code: 0, 1 if a row became slower, 2 if the
results cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.results import SCHEMA, UNITS, Row, markdown_table, read, read_json

_TELLING = ("device", "power_limit", "driver", "cuda", "torch", "triton", "cores", "threads")
"""Of a header, what can explain a change."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="folder or file")
    parser.add_argument("new", type=Path, help="folder or file")
    parser.add_argument("--threshold", type=float, default=3.0, help="percent that do not count (default: 3)")
    parser.add_argument("--force", action="store_true", help="compare different devices, too")
    options = parser.parse_args(arguments)
    try:
        text, slower = compare(options.old, options.new, options.threshold / 100, options.force)
    except ValueError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 1 if slower else 0


def load(path: Path) -> tuple[dict[str, str], dict[tuple[str, ...], Row]]:
    """(what headers tell, rows by identity) of a file, or of all files of results in a folder."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    header, rows, files = {}, {}, sorted(path.rglob("*.json")) if path.is_dir() else [path]
    for file in files:
        if path.is_dir() and "schema" not in read_json(file):
            continue
        found, here = read(file)
        if not found.get("device"):
            raise ValueError(f"{file}: does not say on which device it was measured")
        header |= {name: str(found[name]) for name in _TELLING if name in found}
        for row in here:
            if row.identity in rows:
                raise ValueError(f"{file}: has a second row of {', '.join(row.identity)}; compare single files")
            rows[row.identity] = row
    if not header:
        raise ValueError(f"{path}: holds no results; want JSON files of schema {SCHEMA}")
    return header, rows


def slowdown(old: Row, new: Row) -> float:
    """Time over old time, or old rate over rate."""
    return new.median / old.median if UNITS[old.unit] == "less" else old.median / new.median


def verdict(old: Row, new: Row, threshold: float) -> str | None:
    """ "slower" or "faster", if the spread and `threshold` (a fraction) do not explain it."""
    if old.p20 <= new.p80 and new.p20 <= old.p80:
        return None
    factor = slowdown(old, new)
    if factor > 1 + threshold:
        return "slower"
    return "faster" if 1 / factor > 1 + threshold else None


def compare(old: Path, new: Path, threshold: float = 0.03, force: bool = False) -> tuple[str, int]:
    """(report in markdown, how many rows became slower).

    Raises ValueError for results that cannot be read, of different devices (unless `force`) or without a common row.
    """
    if threshold < 0:
        raise ValueError(f"threshold: got {100 * threshold:g} percent, wanted 0 or more")
    (before, was), (after, now) = load(old), load(new)
    if before["device"] != after["device"] and not force:
        where = f"{old} was measured on {before['device']}, {new} on {after['device']}"
        raise ValueError(f"{where}: compare results of one device, or add --force")
    measured_was, measured_now = ({k: row for k, row in rows.items() if row.median is not None} for rows in (was, now))
    common = [(row, measured_now[key]) for key, row in measured_was.items() if key in measured_now]
    if not common:
        raise ValueError(f"{old} and {new} have no row in common: compare results of the same benchmarks")
    common.sort(key=lambda pair: -abs(slowdown(*pair) - 1))
    changed = {kind: [pair for pair in common if verdict(*pair, threshold) == kind] for kind in ("slower", "faster")}
    gone = [now.get(key, row) for key, row in measured_was.items() if key not in measured_now]
    fresh = [row for key, row in measured_now.items() if key not in measured_was]
    parts = [
        "".join(
            f"- {name}: {value} before, {after.get(name, 'unknown')} now\n"
            for name, value in before.items()
            if value != after.get(name)
        )
    ]
    for kind, pairs in changed.items():
        cells = [(_name(b), a.value, b.value, f"{100 * (b.median / a.median - 1):+.1f}%") for a, b in pairs]
        parts.append(_section(kind.capitalize(), ("row", "before", "now", "change"), cells))
    for title, rows in (("Disappeared", gone), ("New", fresh)):
        parts.append(_section(title, ("row", "value"), [(_name(row), row.value) for row in rows]))
    counts = {kind: len(pairs) for kind, pairs in changed.items()}
    parts.append(
        f"{len(common)} rows compared: {counts['slower']} slower, {counts['faster']} faster, "
        f"{len(common) - sum(counts.values())} within their spread or {100 * threshold:g} percent; "
        f"{len(gone)} disappeared, {len(fresh)} new.\n"
    )
    return "\n".join(filter(None, parts)), counts["slower"]


def _name(row: Row) -> str:
    return ", ".join(row.identity[:-1])


def _section(title: str, columns: tuple[str, ...], cells: list[tuple]) -> str:
    return f"## {title}\n\n{markdown_table(columns, cells)}" if cells else ""


if __name__ == "__main__":
    raise SystemExit(main())
