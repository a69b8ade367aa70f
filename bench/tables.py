"""Tables of ladders in markdown: what the commands print, and what the README of a folder of results holds."""

from __future__ import annotations

from collections.abc import Sequence

from bench.kernel_classes import CLASSES
from bench.results import UNITS, Row, markdown_table, significant

_GIB = 2**30


def ladder_table(rows: Sequence[Row]) -> str:
    """A row per rung, against the first one that was measured; "" for none."""
    if not rows:
        return ""
    first = next((row for row in rows if row.median is not None), None)
    cells = [
        (
            row.rung,
            row.dtype,
            significant(row.median),
            "" if row.median is None else f"{significant(row.p20)} to {significant(row.p80)}",
            "" if row.median is None else f"{significant(speed_up(row, first))}x",
            "" if row.peak_memory_bytes is None else significant(row.peak_memory_bytes / _GIB),
            "" if "mfu" not in row.details else f"{significant(100 * row.details['mfu'])}%",
            error_text(row.error),
            significant(row.details.get("psnr_db")),
            row.note,
        )
        for row in rows
    ]
    columns = ("rung", "dtype", rows[0].unit, "p20 to p80", "speed-up", "peak, GiB", "MFU", "error", "PSNR, dB", "note")
    # a column that no row has anything for says nothing
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    return markdown_table([columns[i] for i in kept], [[row[i] for i in kept] for row in cells])


def error_text(error: float | None) -> str:
    """Two digits, "" for None."""
    return "" if error is None else f"{error:.1e}" if error else "0"


def speed_up(row: Row, base: Row) -> float:
    """How many times as fast as `base` a row of the same unit is."""
    assert row.unit == base.unit, (row.unit, base.unit)
    return row.median / base.median if UNITS[row.unit] == "more" else base.median / row.median


def split_table(rows: Sequence[Row]) -> str:
    """Milliseconds by kernel class of the rows that were profiled; "" for none."""
    profiled = [row for row in rows if "split" in row.details]
    if not profiled:
        return ""
    cells = []
    for row in profiled:
        taken = row.details["split"]["milliseconds"]
        total = sum(taken.values())
        shares = (f"{significant(taken[name])} ({100 * taken[name] / total:.0f}%)" for name in CLASSES)
        cells.append((row.rung, row.details["split"]["of"], *shares))
    return markdown_table(("rung", "ms of", *CLASSES), cells)


def in_order(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Rows as the ladder goes up, those of unknown rungs last."""
    return sorted(rows, key=lambda row: names.index(row.rung) if row.rung in names else len(names))
