"""What messages and reports share."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType

# package: (project on PyPI, extra of ours that installs it)
_PROJECTS = {
    "gradio": ("gradio", "app"),
    "matplotlib": ("matplotlib", "demo"),
    "sklearn": ("scikit-learn", "demo"),
    "torch_fidelity": ("torch-fidelity", "eval"),
}


def nearest(name: str, valid: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" with the valid name that is most like `name`, or nothing."""
    match = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, a line for each row."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


def import_extra(name: str) -> ModuleType:
    """Import an optional module by its dotted name. Raises ImportError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        root = name.partition(".")[0]
        # A module missing inside an installed package is that package's trouble, not ours to explain.
        if error.name is None or error.name.partition(".")[0] != root:
            raise
        project, extra = _PROJECTS[root]
        raise ImportError(f"this needs {project}: pip install 'epg_fast[{extra}]'") from error
