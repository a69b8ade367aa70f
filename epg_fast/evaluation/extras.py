"""Import of optional dependencies."""

from __future__ import annotations

import importlib
from types import ModuleType

# package: (project on PyPI, extra of ours that installs it)
_PROJECTS = {
    "gradio": ("gradio", "app"),
    "matplotlib": ("matplotlib", "demo"),
    "sklearn": ("scikit-learn", "demo"),
    "torch_fidelity": ("torch-fidelity", "eval"),
}


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
