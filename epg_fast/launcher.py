"""What torchrun, or whatever else has started this process, says of its place among others; imports no torch."""

from __future__ import annotations

import os


def number(name: str, default: int) -> int:
    """The environment variable as a number; some launchers set to nothing what they do not mean to set."""
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise ValueError(f"environment variable {name} is {text!r}, want a number; start with torchrun, or unset it")
    return int(text) if text else default


def is_main() -> bool:
    """Whether this process talks to the user."""
    return number("WORLD_SIZE", 1) < 2 or number("RANK", 0) == 0


def place() -> tuple[int, int]:
    """(rank, number of ranks). Raises ValueError for several ranks of which this one cannot tell which it is."""
    rank, world_size = number("RANK", 0), number("WORLD_SIZE", 1)
    if world_size < 2:
        return 0, 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name, "").strip()]
    if missing or rank >= world_size:
        got = f"no {missing[0]}" if missing else f"RANK={rank}"
        raise ValueError(f"got WORLD_SIZE={world_size} with {got} in the environment; start with torchrun, or unset it")
    return rank, world_size
