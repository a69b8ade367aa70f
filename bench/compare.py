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

from bench.results import Row, markdown_table, read, read_folder, speed_up

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
    header, rows = {}, {}
    for name, (found, here) in (read_folder(path) if path.is_dir() else {path.stem: read(path)}).items():
        if not found.get("device"):
            raise ValueError(f"{path}, {name}: does not say on which device it was measured")
        header |= {key: str(found[key]) for key in _TELLING if key in found}
        for row in here:
            if row.identity in rows:
                raise ValueError(f"{path}, {name}: has a second row of {row.name}; compare single files")
            rows[row.identity] = row
    return header, rows


def verdict(old: Row, new: Row, threshold: float) -> str | None:
    """ "slower" or "faster", if the spread and `threshold` (a fraction) do not explain it."""
    if old.p20 <= new.p80 and new.p20 <= old.p80:
        return None
    if speed_up(old, new) > 1 + threshold:
        return "slower"
    return "faster" if speed_up(new, old) > 1 + threshold else None


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
    common.sort(key=lambda pair: -abs(speed_up(*pair) - 1))
    gone = [now.get(key, row) for key, row in measured_was.items() if key not in measured_now]
    fresh = [row for key, row in measured_now.items() if key not in measured_was]
    changes = [(name, value, after.get(name, "unknown")) for name, value in before.items()]
    parts = ["".join(f"- {name}: {value} before, {now} now\n" for name, value, now in changes if value != now)]
    counts = {}
    for kind in ("slower", "faster"):
        pairs = [pair for pair in common if verdict(*pair, threshold) == kind]
        cells = [(b.name, a.value, b.value, f"{100 * (b.median / a.median - 1):+.1f}%") for a, b in pairs]
        parts.append(_section(kind.capitalize(), ("row", "before", "now", "change"), cells))
        counts[kind] = len(pairs)
    for title, rows in (("Disappeared", gone), ("New", fresh)):
        parts.append(_section(title, ("row", "value"), [(row.name, row.value) for row in rows]))
    parts.append(
        f"{len(common)} rows compared: {counts['slower']} slower, {counts['faster']} faster, "
        f"{len(common) - sum(counts.values())} within their spread or {100 * threshold:g} percent; "
        f"{len(gone)} disappeared, {len(fresh)} new.\n"
    )
    return "\n".join(filter(None, parts)), counts["slower"]


def _section(title: str, columns: tuple[str, ...], cells: list[tuple]) -> str:
    return f"## {title}\n\n{markdown_table(columns, cells)}" if cells else ""


if __name__ == "__main__":
    raise SystemExit(main())
