"""Docstrings as reStructuredText. Here they are plain text, with code in backticks and structure by indentation."""

from __future__ import annotations

import re
from itertools import groupby, takewhile

_ITEM = re.compile(r"\w[\w, .]*: ")
_OWN_PARAGRAPH = re.compile("(Shapes|Dtypes|Error|Source|Sources): |Raises ")
_CODE = re.compile(r"(`[^`]*`)")


def restructured(lines: list[str]) -> list[str]:
    """A block under a line is a list of `name: text`; one behind an empty line is formulas, and kept as it is."""
    marked: list[tuple[bool, str]] = []  # (whether it is kept as it is, line)
    above, i = 0, 0
    while i < len(lines):
        line, hangs = lines[i], bool(lines[i].strip())
        above = _indent(line) if hangs else above
        block = _block(lines[i + 1 :], above + 4)
        i += 1 + len(block)
        marked += [(False, "")] * bool(_OWN_PARAGRAPH.match(line.lstrip())) + [(False, line)]
        if not block or line.lstrip().startswith("- "):
            marked += [(False, text) for text in block]
        elif not hangs:
            marked += [(False, " " * above + "::"), (False, ""), *((True, text) for text in block), (False, "")]
        elif _ITEM.match(block[0].strip()):
            marked += [(False, ""), *((False, text) for text in _bullets(block, " " * above)), (False, "")]
        else:
            marked += [(False, ""), *((False, text) for text in block), (False, "")]
    result = []
    for kept, group in groupby(marked, key=lambda pair: pair[0]):
        texts = [text for _, text in group]
        result += texts if kept else _escaped("\n".join(texts)).split("\n")
    return result


def _block(lines: list[str], depth: int) -> list[str]:
    return list(takewhile(lambda line: line.strip() and _indent(line) >= depth, lines))


def _bullets(block: list[str], margin: str) -> list[str]:
    """Each line at the block's own indentation begins an item."""
    depth = _indent(block[0])
    return [
        margin + ("- " if _indent(line) == depth and _ITEM.match(line.strip()) else "  ") + line.strip()
        for line in block
    ]


def _escaped(text: str) -> str:
    """No character means more than itself, but backticks."""
    parts = _CODE.split(text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"[*|\\]|_(?!\w)", r"\\\g<0>", parts[i])
    return _CODE.sub(lambda found: f"``{' '.join(found[0].strip('`').split())}``", "".join(parts))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
