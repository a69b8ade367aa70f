"""What every benchmark writes, and how it is read back: one JSON file of rows, each on a line of its own.

    {"schema": "epg_fast.bench/1",
     "header": {"device": ..., "gpu": ..., "power_limit": ..., "driver": ..., "cuda": ..., "torch": ..., "triton": ...,
                "python": ..., "cpu": ..., "cores": ..., "threads": ..., "commit": ..., "date": ...},
     "rows": [{"job": ..., "variant": ..., "shape": ..., "dtype": ..., "unit": ..., "median": ..., "p20": ...,
               "p80": ..., "peak_memory_bytes": ..., "error": ..., "details": {...}, "note": ...}]}

A row is known by job, variant, shape, dtype and unit; the rest is what was measured. What the header cannot find out is
"none".
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

from epg_fast.files import write_atomically
from epg_fast.plans.plan import package_version, processor

SCHEMA = "epg_fast.bench/1"
UNITS = {"images/s": "more", "us": "less", "ms": "less", "kernels": "less"}
"""Units of a row, and whether more or less is better."""

ROOT = Path(__file__).resolve().parents[1]

UNFINISHED = "unfinished"
"""In the details of a row that there was no time for, and that is measured when the same command is given again."""

_SAME = ("device", "power_limit", "torch", "triton", "commit", "threads")
"""Of a header: what rows of one file share."""


@dataclass(frozen=True)
class Row:
    """One variant of one job. Raises ValueError for numbers that no measurement gives."""

    job: str
    """What is done: "pretrain", "finetune-diffusion", "finetune-consistency", "sample-heun", "sample-onestep", ..."""
    variant: str
    """How: "plain", "plain, 16 bits", "ours, compiled blocks", ..."""
    shape: str
    """Preset and batch, e.g. "epg_xl_16_256, batch 64"."""
    dtype: str
    unit: str
    median: float | None = None
    """In `unit`, as p20 and p80, the percentiles; None, all three, for what was not measured, and `note` says why."""
    p20: float | None = None
    p80: float | None = None
    peak_memory_bytes: int | None = None
    error: float | None = None
    """Of the output, relative L2, against float64 or float32."""
    details: dict = field(default_factory=dict)
    """Whatever else a benchmark knows: MFU, settings, the longest kernels."""
    note: str = ""

    def __post_init__(self):
        name = f"row {self.name}"
        if self.unit not in UNITS:
            raise ValueError(f"{name}: got unit {self.unit!r}, wanted one of {', '.join(UNITS)}")
        numbers = (self.p20, self.median, self.p80)
        if all(number is None for number in numbers):
            if not self.note:
                raise ValueError(f"{name}: got no numbers and no note, wanted the reason why nothing was measured")
            return
        plain = all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers)
        if not plain or not 0 < self.p20 <= self.median <= self.p80:
            got = f"p20, median and p80 of {self.p20}, {self.median} and {self.p80}"
            raise ValueError(f"{name}: got {got}, wanted rising positive numbers")

    @property
    def identity(self) -> tuple[str, ...]:
        return self.job, self.variant, self.shape, self.dtype, self.unit

    @property
    def name(self) -> str:
        return ", ".join(self.identity[:-1])

    @property
    def value(self) -> str:
        return f"not measured: {self.note}" if self.median is None else f"{significant(self.median, 4)} {self.unit}"

    @property
    def spread(self) -> str:
        return f"{significant(self.p20)} to {significant(self.p80)}"


class Results:
    """The file of a benchmark that is being measured, whole after every row: what is cut short keeps what it has."""

    def __init__(self, path: str | os.PathLike, header: dict, rows: Iterable[Row] = ()):
        self.path, self.header, self.rows = Path(path), header, list(rows)

    @classmethod
    def resume(cls, path: str | os.PathLike, header: dict) -> Results:
        """A file that is there goes on, but for its unfinished rows.

        Raises ValueError if it was measured elsewhere or by other code.
        """
        if not Path(path).exists():
            return cls(path, header)
        before, rows = read(path)
        for name in _SAME:
            if before.get(name) != header.get(name):
                was, now = before.get(name), header.get(name)
                raise ValueError(f"{path}: measured with {name} {was}, now it is {now}; give another folder")
        return cls(path, before, [row for row in rows if UNFINISHED not in row.details])

    def add(self, row: Row) -> None:
        """Append a row and write. Raises ValueError for a second row of the same identity."""
        if any(row.identity == other.identity for other in self.rows):
            raise ValueError(f"{self.path}: got a second row of {row.name}, {row.unit}, wanted one")
        self.rows.append(row)
        lines = [_json({k: v for k, v in asdict(row).items() if v not in ("", {}, None)}) for row in self.rows]
        head = f'{{"schema": {_json(SCHEMA)},\n"header": {_json(self.header)},\n"rows": [\n'
        write_atomically(self.path, head + ",\n".join(lines) + "\n]}\n")

    def say(self, row: Row) -> None:
        """`add`, and a line on standard error."""
        self.add(row)
        print(f"{row.job}, {row.shape}, {row.variant}: {row.value}", file=sys.stderr, flush=True)


def _json(value) -> str:
    return json.dumps(value, allow_nan=False)


def read(path: str | os.PathLike) -> tuple[dict, list[Row]]:
    """(header, rows) of a file of results. Raises ValueError, naming the file, for anything else."""
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: got schema {content.get('schema')!r}, wanted {SCHEMA!r}")
    header, rows = content.get("header"), content.get("rows")
    if not isinstance(header, dict) or not isinstance(rows, list):
        raise ValueError(f"{path}: wanted a header and a list of rows")
    try:
        return header, [Row(**row) for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {str(error).replace('Row.__init__()', 'a row')}") from None


def read_folder(folder: Path) -> dict[str, tuple[dict, list[Row]]]:
    """Name -> (header, rows) of the files of results in a folder, whose other JSON files are left alone.

    Raises ValueError as `read` does, and for a folder without any.
    """
    found = {path.stem: read(path) for path in sorted(folder.glob("*.json")) if "schema" in read_json(path)}
    if not found:
        raise ValueError(f"{folder}: holds no results; python -m bench --output {folder} makes some")
    return found


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file. Raises ValueError, naming the file, for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a JSON {type(content).__name__}, wanted an object")
    return content


def header() -> dict[str, str | int]:
    """Device and versions that rows belong to; "none" for what there is not."""
    gpu, power_limit, driver = None, "", ""
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        query = ("nvidia-smi", f"--id={uuid}", "--query-gpu=power.limit,driver_version", "--format=csv,noheader")
        power_limit, _, driver = _output(*query).partition(", ")
    return {
        "device": gpu or processor(),
        "gpu": gpu or "none",
        "power_limit": power_limit or "none",
        "driver": driver or "none",
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": package_version("triton") or "none",
        "python": sys.version.split()[0],
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The checkout's commit, with "+changes" if files differ from it."""
    found = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = found and _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno")
    return found + "+changes" * bool(changes) or "none"


def _output(*command: str) -> str:
    """What a command prints, "" if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a line per row. Columns of numbers are set to the right; one without any cell is left out."""
    cells = [["" if cell is None else str(cell).replace("|", "\\|") for cell in row] for row in rows]
    table = [column for column in zip(columns, *cells, strict=True) if any(column[1:]) or not cells]
    widths = [max(3, *map(len, column)) for column in table]
    right = [all(re.fullmatch(r"([-+]?[\d.,]+(e-?\d+)?)?[%x]?", cell) for cell in column[1:]) for column in table]

    def aligned(row):
        pairs = zip(row, widths, right, strict=True)
        return f"| {' | '.join(cell.rjust(width) if r else cell.ljust(width) for cell, width, r in pairs)} |"

    rule = ["-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True)]
    names, *lines = zip(*table, strict=True)
    return "\n".join(map(aligned, [names, rule, *lines])) + "\n"


def speed_up(row: Row, base: Row) -> float:
    """How many times as fast as `base` a row of the same unit is."""
    return row.median / base.median if UNITS[row.unit] == "more" else base.median / row.median


def significant(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent, "" for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"
