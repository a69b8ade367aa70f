"""What a ladder of benchmarks writes, and how it is read back: one JSON file per ladder, tables beside it.

    {"schema": "epg_fast.bench/1",
     "header": {"device": ..., "gpu": ..., "power_limit": ..., "driver": ..., "cuda": ..., "torch": ..., "triton": ...,
                "python": ..., "cpu": ..., "cores": ..., "threads": ..., "commit": ..., "date": ...},
     "rows": [{"job": ..., "rung": ..., "shape": ..., "dtype": ..., "unit": ..., "median": ..., "p20": ..., "p80": ...,
               "peak_memory_bytes": ..., "error": ..., "details": {...}, "note": ...}]}

A row is known by job, rung, shape, dtype and unit; the rest is what was measured. What the header cannot find out is
"none".
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path

import torch

SCHEMA = "epg_fast.bench/1"
UNITS = {"images/s": "more", "us": "less", "ms": "less", "kernels": "less"}
"""Units of a row, and whether more or less is better."""

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One rung of one ladder. Raises ValueError for numbers that no measurement gives."""

    job: str
    """What is done: "pretrain", "finetune-diffusion", "finetune-consistency", "sample-heun", "sample-onestep"."""
    rung: str
    """How: "plain", "16-bit", "compile", ..."""
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
    """Whatever else a ladder knows: speed-up, MFU, settings."""
    note: str = ""

    def __post_init__(self):
        name = f"row {self.job}, {self.rung}, {self.shape}"
        if self.unit not in UNITS:
            raise ValueError(f"{name}: got unit {self.unit!r}, wanted one of {', '.join(UNITS)}")
        numbers = (self.p20, self.median, self.p80)
        if all(number is None for number in numbers):
            if not self.note:
                raise ValueError(f"{name}: got no numbers and no note, wanted the reason why nothing was measured")
            return
        check_spread(name, *numbers)

    @property
    def identity(self) -> tuple[str, ...]:
        return self.job, self.rung, self.shape, self.dtype, self.unit


def check_spread(name: str, p20, median, p80) -> None:
    """Raise ValueError unless 0 < p20 <= median <= p80 and all are finite numbers."""
    numbers = (p20, median, p80)
    plain = all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in numbers)
    if not plain or not 0 < p20 <= median <= p80:
        raise ValueError(
            f"{name}: got p20, median and p80 of {p20}, {median} and {p80}, wanted rising positive numbers"
        )


@dataclass(frozen=True)
class Run:
    """A file of rows."""

    header: dict
    rows: tuple[Row, ...]


class Results:
    """The file of a ladder that is being measured, whole after every row: what is cut short keeps what it has."""

    def __init__(self, path: str | os.PathLike, header: dict):
        self.path, self.header, self.rows = Path(path), header, []

    def add(self, row: Row) -> None:
        """Append a row and write. Raises ValueError for a second row of the same identity."""
        if any(row.identity == other.identity for other in self.rows):
            raise ValueError(f"{self.path}: got a second row of {', '.join(row.identity)}, wanted one")
        self.rows.append(row)
        rows = [{name: value for name, value in asdict(row).items() if value not in ("", {})} for row in self.rows]
        write_json(self.path, {"schema": SCHEMA, "header": self.header, "rows": rows})


def read(path: str | os.PathLike) -> Run:
    """The rows of a ladder's file. Raises ValueError, naming the file, for anything else."""
    return parse(read_json(path), path)


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


def parse(content: dict, path: str | os.PathLike) -> Run:
    """The same of a file's content."""
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: got schema {content.get('schema')!r}, wanted {SCHEMA!r}")
    header, rows = content.get("header"), content.get("rows")
    if not isinstance(header, dict) or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: wanted a header and a list of rows")
    known = {f.name for f in fields(Row)}
    for row in rows:
        if unknown := set(row) - known:
            raise ValueError(f"{path}: a row has {', '.join(sorted(unknown))}, wanted {', '.join(sorted(known))}")
        if missing := {"job", "rung", "shape", "dtype", "unit"} - set(row):
            raise ValueError(f"{path}: a row lacks {', '.join(sorted(missing))}")
    try:
        return Run(header, tuple(Row(**row) for row in rows))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_json(path: str | os.PathLike, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file at once: it is there whole, or as it was before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def new_folder(parent: str | os.PathLike = ROOT / "bench" / "results") -> Path:
    """Make and return a folder named by the date and the device, with a number if there is one of that name."""
    device = "".join(c if c.isalnum() else "-" for c in (gpu_name() or "cpu")).strip("-").lower()
    stem = f"{datetime.now().date().isoformat()}-{device}"
    Path(parent).mkdir(parents=True, exist_ok=True)
    for name in (stem, *(f"{stem}-{i}" for i in range(2, 1000))):
        try:
            (Path(parent) / name).mkdir()
            return Path(parent) / name
        except FileExistsError:
            continue
    raise ValueError(f"{parent}: has 999 folders of {stem}; remove some")


def header() -> dict[str, str | int]:
    """Device and versions that rows belong to; "none" for what there is not."""
    power_limit, driver = _nvidia_smi()
    return {
        "device": gpu_name() or processor(),
        "gpu": gpu_name() or "none",
        "power_limit": power_limit,
        "driver": driver,
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": sys.version.split()[0],
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def gpu_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def processor() -> str:
    """The CPU's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with "+changes" if files differ from it."""
    found = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not found:
        return "none"
    return found + ("+changes" if _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else "")


def _nvidia_smi() -> tuple[str, str]:
    """(power limit, driver) of the GPU in use."""
    if not torch.cuda.is_available():
        return "none", "none"
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    query = ("nvidia-smi", f"--id={uuid}", "--query-gpu=power.limit,driver_version", "--format=csv,noheader")
    power_limit, _, driver = _output(*query).partition(", ")
    return power_limit or "none", driver or "none"


def _output(*command: str) -> str:
    """What a command prints, "" if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a line per row; a column whose cells are all numbers (or empty) is set to the right."""
    cells = [["" if cell is None else str(cell).replace("|", "\\|") for cell in row] for row in rows]
    if any(len(row) != len(columns) for row in cells):
        raise ValueError(f"table: got rows of {sorted({len(row) for row in cells})} cells for {len(columns)} columns")
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    widths = [max(3, *(len(row[i]) for row in [columns, *cells])) for i in range(len(columns))]

    def line(row):
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = (f"{'-' * (width - 1)}:" if to_right else "-" * width for width, to_right in zip(widths, right, strict=True))
    return "\n".join([line(columns), f"| {' | '.join(rule)} |", *(line(row) for row in cells)]) + "\n"


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "").rstrip("%x") or 0)
    except ValueError:
        return False
    return True


def header_lines(header: dict) -> str:
    """The header as a markdown list."""
    return "".join(f"- {name}: {value}\n" for name, value in header.items())


def significant(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent, "" for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"
