"""What messages and reports share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, valid: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" with the valid name that is most like `name`, or nothing."""
    match = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, a line for each row."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))
