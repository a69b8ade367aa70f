"""What became slower between two sets of results of one machine.

    python -m bench.compare OLD NEW                 # folders of results, or single files
    python -m bench.compare OLD NEW --threshold 5   # percent that do not count

Reads ladders (`bench.results`) and the JSON of `pytest bench/ops --benchmark-json`. Rows are matched by what they
measure. One counts as slower, or faster, if its 20th to 80th percentiles do not overlap with the old ones and the
median moved by more than the threshold. Exit code: 0, 1 if a row became slower, 2 if the results cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.results import SCHEMA, UNITS, check_spread, markdown_table, parse, read_json, significant

_MEASURED = {"median_us", "p20_us", "p80_us", "gbps", "percent_of_copy", "tflops", "percent_of_gemm"}
"""Of a pytest-benchmark row's extra_info; the rest is what the row is."""

_TELLING = ("power_limit", "driver", "cuda", "torch", "triton", "cores", "threads")
"""Of a header, what can explain a change."""


@dataclass(frozen=True)
class Measurement:
    """A row of either kind of file."""

    identity: tuple[str, ...]
    unit: str
    median: float | None
    """None, as p20 and p80, where nothing was measured: `note` says why."""
    p20: float | None
    p80: float | None
    note: str = ""

    @property
    def value(self) -> str:
        return f"{significant(self.median, 4)} {self.unit}" if self.median is not None else f"not measured: {self.note}"


@dataclass(frozen=True)
class ResultSet:
    """What one side of a comparison holds."""

    devices: frozenset[str]
    headers: dict[str, str]
    """Power limit and versions, for what else has changed."""
    measurements: dict[tuple[str, ...], Measurement]

    def measured(self) -> dict[tuple[str, ...], Measurement]:
        """The rows that have numbers."""
        return {key: measurement for key, measurement in self.measurements.items() if measurement.median is not None}


@dataclass(frozen=True)
class Change:
    """A row on both sides. slowdown: time over old time, or old rate over rate."""

    old: Measurement
    new: Measurement
    slowdown: float

    def beyond(self, threshold: float) -> str | None:
        """ "slower" or "faster", if the spread and `threshold` (a fraction) do not explain it."""
        if self.old.p20 <= self.new.p80 and self.new.p20 <= self.old.p80:
            return None
        if self.slowdown > 1 + threshold:
            return "slower"
        return "faster" if 1 / self.slowdown > 1 + threshold else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="folder or file")
    parser.add_argument("new", type=Path, help="folder or file")
    parser.add_argument("--threshold", type=float, default=3.0, help="percent that do not count (default: 3)")
    parser.add_argument("--force", action="store_true", help="compare different devices, too")
    options = parser.parse_args(arguments)
    try:
        report, slower = compare(options.old, options.new, options.threshold / 100, options.force)
    except ValueError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    print(report, end="")
    return 1 if slower else 0


def compare(old: Path, new: Path, threshold: float = 0.03, force: bool = False) -> tuple[str, list[Change]]:
    """(report in markdown, the rows that became slower).

    Raises ValueError for results that cannot be read, of different devices (unless `force`) or without a common row.
    """
    if threshold < 0:
        raise ValueError(f"threshold: got {100 * threshold:g} percent, wanted 0 or more")
    with_files = old.is_dir() and new.is_dir()
    before, after = load(old, with_files), load(new, with_files)
    if before.devices != after.devices and not force:
        devices = [", ".join(sorted(side.devices)) for side in (before, after)]
        raise ValueError(
            f"{old} was measured on {devices[0]}, {new} on {devices[1]}: compare results of one device, or add --force"
        )
    was, now = before.measured(), after.measured()
    changes = [change_of(was[key], now[key]) for key in was if key in now]
    if not changes:
        raise ValueError(f"{old} and {new} have no row in common: compare results of the same benchmarks")
    found = {
        kind: sorted((c for c in changes if c.beyond(threshold) == kind), key=lambda c: -abs(c.slowdown - 1))
        for kind in ("slower", "faster")
    }
    gone = [after.measurements.get(key, measurement) for key, measurement in was.items() if key not in now]
    fresh = [measurement for key, measurement in now.items() if key not in was]
    within = len(changes) - sum(map(len, found.values()))
    parts = [_headers(before, after), *(_changed(kind, found[kind]) for kind in found)]
    parts += [_listed("Disappeared", gone), _listed("New", fresh)]
    parts.append(
        f"{len(changes)} rows compared: {len(found['slower'])} slower, {len(found['faster'])} faster, {within} within "
        f"their spread or {100 * threshold:g} percent; {len(gone)} disappeared, {len(fresh)} new.\n"
    )
    return "\n".join(part for part in parts if part), found["slower"]


def change_of(old: Measurement, new: Measurement) -> Change:
    less_is_better = UNITS[old.unit] == "less"
    return Change(old, new, new.median / old.median if less_is_better else old.median / new.median)


def load(path: Path, with_files: bool = False) -> ResultSet:
    """The rows of a file, or of a folder's files that hold some; `with_files` makes a file's name part of them."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    contents = [(file, read_json(file)) for file in files]
    known = [(file, content) for file, content in contents if _kind(content)]
    if not known:
        raise ValueError(f"{path}: holds no results; want a ladder's JSON ({SCHEMA}) or pytest-benchmark's")
    devices, headers, measurements = set(), {}, {}
    for file, content in known:
        read = _ladder if _kind(content) == "ladder" else _pytest_benchmark
        header, found = read(content, file)
        if not header.get("device"):
            raise ValueError(f"{file}: does not say on which device it was measured")
        devices.add(str(header["device"]))
        headers |= {name: str(header[name]) for name in _TELLING if name in header}
        for measurement in found:
            name = (file.relative_to(path).as_posix(),) if with_files else ()
            key = name + measurement.identity
            if key in measurements:
                raise ValueError(f"{file}: has a second row of {_name(measurement)}; compare single files")
            measurements[key] = measurement
    return ResultSet(frozenset(devices), headers, measurements)


def _kind(content: dict) -> str | None:
    if "schema" in content:
        return "ladder" if str(content["schema"]).startswith("epg_fast.bench/") else None
    return "pytest" if "benchmarks" in content and "machine_info" in content else None


def _ladder(content: dict, file: Path) -> tuple[dict, list[Measurement]]:
    run = parse(content, file)
    return run.header, [
        Measurement(row.identity[:-1], row.unit, row.median, row.p20, row.p80, row.note) for row in run.rows
    ]


def _pytest_benchmark(content: dict, file: Path) -> tuple[dict, list[Measurement]]:
    return content["machine_info"], [
        Measurement(identity, "us", info["median_us"], info["p20_us"], info["p80_us"])
        for identity, info in op_rows(content, file)
    ]


def op_rows(content: dict, file: Path) -> Iterable[tuple[tuple[str, ...], dict]]:
    """(what it is, its extra_info) of each row that `bench/ops` measured. Raises ValueError for one that is not."""
    for benchmark in content["benchmarks"]:
        info = benchmark.get("extra_info", {})
        name = f"{file}: {benchmark.get('name', 'a row')}"
        if missing := ({"op", "shape", "provider"} | _MEASURED) - set(info):
            raise ValueError(f"{name} lacks {', '.join(sorted(missing))}; want the JSON of `pytest bench/ops`")
        check_spread(name, info["p20_us"], info["median_us"], info["p80_us"])
        labels = [str(info[k]) for k in ("op", "shape", "dtype", "direction", "provider") if k in info]
        more = sorted(set(info) - _MEASURED - {"op", "shape", "dtype", "direction", "provider"})
        yield (*labels, *(f"{k}={info[k]}" for k in more)), info


def _name(measurement: Measurement) -> str:
    return ", ".join(measurement.identity)


def _headers(before: ResultSet, after: ResultSet) -> str:
    names = [name for name in before.headers if before.headers[name] != after.headers.get(name)]
    lines = [f"- {name}: {before.headers[name]} before, {after.headers.get(name, 'unknown')} now\n" for name in names]
    if before.devices != after.devices:
        lines.insert(
            0, f"- device: {', '.join(sorted(before.devices))} before, {', '.join(sorted(after.devices))} now\n"
        )
    return "".join(lines)


def _changed(kind: str, changes: list[Change]) -> str:
    if not changes:
        return ""
    rows = [
        (_name(c.new), c.old.value, c.new.value, f"{100 * (c.new.median / c.old.median - 1):+.1f}%") for c in changes
    ]
    return f"## {kind.capitalize()}\n\n" + markdown_table(("row", "before", "now", "change"), rows)


def _listed(title: str, measurements: list[Measurement]) -> str:
    if not measurements:
        return ""
    return f"## {title}\n\n" + markdown_table(("row", "value"), [(_name(m), m.value) for m in measurements])


if __name__ == "__main__":
    raise SystemExit(main())
