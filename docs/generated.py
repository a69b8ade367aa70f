"""Pages that are made of the sources whenever the site is built, and are in no commit.

flags/<job>.md: the flags of a job, from the dataclasses that are the command line.
api/ops.md: the operations, with the formulas in the docstrings of their files.
"""

from __future__ import annotations

import re
from pathlib import Path

from epg_fast import config, ops
from epg_fast.__main__ import _JOBS
from epg_fast.flags import explained

_TUNE = (config.TuneConfig,)


def pages() -> dict[str, str]:
    """{path below docs/: Markdown} of all of them."""
    kinds = {name: job.configs if job.configs is not None else _TUNE for name, job in _JOBS.items()}
    made = {f"flags/{name}.md": _flags(name, _JOBS[name].summary, kinds[name]) for name in _JOBS if kinds[name]}
    return made | {"api/ops.md": _operations()}


def write_pages(docs: Path) -> None:
    """Write the pages whose text has changed, and remove those of jobs that are no more."""
    made = {docs / name: text for name, text in pages().items()}
    (docs / "flags").mkdir(exist_ok=True)
    for path in {*(docs / "flags").glob("*.md")} - {*made}:
        path.unlink()
    for path, text in made.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _operations() -> str:
    """A section for each file with public names, in the order of the names."""
    files: dict[str, list[str]] = {}
    for name in ops.__all__:
        files.setdefault(getattr(ops, name).__module__, []).append(name)
    lines = ["# epg_fast.ops\n", "One section per operation: formula, shapes, dtypes, error bound and source.\n"]
    for module, names in files.items():
        lines += [f"## {module.rpartition('.')[2]}\n", "```{eval-rst}", f".. automodule:: {module}"]
        lines += [f"   :members: {', '.join(names)}", "```\n"]
    return "\n".join(lines)


def _flags(job: str, summary: str, kinds: tuple[type, ...]) -> str:
    """Flags without a group first, then each group under a heading."""
    groups: dict[str, list[str]] = {"": []}
    for flag, text, default in explained(kinds):
        group = flag.partition(" ")[0].lstrip("-").rpartition(".")[0]
        shown = f" Default: `{default}`." if default else ""
        groups.setdefault(group, []).append(f"`{flag}`\n:   {_escaped(text)}.{shown}\n")
    lines = [f"# Flags of {job}\n", f"`epg-fast {job}`: {summary}.\n"]
    if job == "tune":
        lines.append("The flags of the job that is tuned stand behind these.\n")
    for group, entries in groups.items():
        lines += [f"## {group}\n"] if group else []
        lines += entries
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Markdown in which only backticks mean something, as in the text."""
    parts = text.split("`")
    return "`".join(part if i % 2 else re.sub(r"([\\*_<>\[\]{}])", r"\\\1", part) for i, part in enumerate(parts))
