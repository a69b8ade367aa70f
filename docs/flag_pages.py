"""A page of flags for each job, from the dataclasses that are the command line: docs/flags/<job>.md.

They are written whenever the site is built, and are in no commit.
"""

from __future__ import annotations

import re
from pathlib import Path

from epg_fast import config
from epg_fast.__main__ import _JOBS
from epg_fast.flags import explained

_TUNE = (config.TuneConfig,)


def flag_pages() -> dict[str, str]:
    """{job: Markdown of its page}."""
    kinds = {name: job.configs if job.configs is not None else _TUNE for name, job in _JOBS.items()}
    return {name: _page(name, _JOBS[name].summary, kinds[name]) for name in _JOBS if kinds[name]}


def write_flag_pages(folder: Path) -> None:
    """Write the pages whose text has changed, and remove those of jobs that are no more."""
    pages = {folder / f"{name}.md": text for name, text in flag_pages().items()}
    folder.mkdir(exist_ok=True)
    for path in {*folder.glob("*.md")} - {*pages}:
        path.unlink()
    for path, text in pages.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _page(job: str, summary: str, kinds: tuple[type, ...]) -> str:
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
