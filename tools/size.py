"""Lines per folder and per file, beside those of the last release in CONTRIBUTING.md: growth is to be seen.

python tools/size.py            print them
python tools/size.py --record   write the table of folders into CONTRIBUTING.md, at a release
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = {".py", ".c", ".cpp", ".cu", ".cuh", ".h", ".sh"}
TOPS = ("epg_fast", "kernels", "bench", "demo", "tests", "tools")
ROW = re.compile(r"^\| (\w[\w/]*) +\| +(\d+) \| +(\d+) \|$", re.MULTILINE)


def count(root: Path = ROOT) -> dict[str, dict[str, int]]:
    """Lines by folder (two levels deep) and file."""
    folders = defaultdict(dict)
    for top in TOPS:
        for path in sorted((root / top).rglob("*")):
            if path.suffix in CODE and not any(part.startswith((".", "__pycache__")) for part in path.parts):
                place = path.relative_to(root)
                folder = "/".join(place.parts[:-1][:2])
                name = place.relative_to(folder).as_posix().removesuffix(".py")
                folders[folder][name] = len(path.read_text(encoding="utf-8").splitlines())
    return dict(folders)


def totals(folders: dict[str, dict[str, int]]) -> dict[str, tuple[int, int]]:
    """(files, lines) of each folder, and of each folder at the root with all that is in it."""
    found = defaultdict(lambda: (0, 0))
    for folder, files in folders.items():
        for name in dict.fromkeys((folder.partition("/")[0], folder)):
            found[name] = found[name][0] + len(files), found[name][1] + sum(files.values())
    return dict(sorted(found.items()))


def table(folders: dict[str, dict[str, int]]) -> str:
    """The table of CONTRIBUTING.md."""
    rows = [f"| {name:<22} | {files:>5} | {lines:>6} |" for name, (files, lines) in totals(folders).items()]
    return "\n".join([f"| {'folder':<22} | files |  lines |", f"| {'-' * 22} | ----: | -----: |", *rows])


def report(folders: dict[str, dict[str, int]], recorded: str) -> str:
    """Folders with what has changed since the table in `recorded`, each with its files, the largest first."""
    before = {name: (int(files), int(lines)) for name, files, lines in ROW.findall(recorded)}
    out = [f"{'':<24}{'files':>6}{'lines':>8}{'since the last release':>25}"]
    now = totals(folders)
    for name in sorted(now.keys() | before.keys()):
        files, lines = now.get(name, (0, 0))
        old = before.get(name, (0, 0))
        change = f"{lines - old[1]:+} lines, {files - old[0]:+} files" if (files, lines) != old else "-"
        out.append(f"{name:<24}{files:>6}{lines:>8}{change:>25}")
        inside = sorted(folders.get(name, {}).items(), key=lambda item: -item[1])
        text = ", ".join(f"{file} {length}" for file, length in inside)
        out += textwrap.wrap(text, 110, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(out)


def main() -> None:
    folders, guide = count(), ROOT / "CONTRIBUTING.md"
    text = guide.read_text(encoding="utf-8")
    if "--record" in sys.argv[1:]:
        start, end = text.index("| folder"), [match.end() for match in ROW.finditer(text)][-1]
        guide.write_text(text[:start] + table(folders) + text[end:], encoding="utf-8")
    else:
        print(report(folders, text))


if __name__ == "__main__":
    main()
