"""Import of optional dependencies."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

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


def import_torch_fidelity(module: str) -> ModuleType:
    """Import a module of torch-fidelity. Raises ImportError with what to install, torchvision's failures included."""
    name = f"torch_fidelity.{module}"
    try:
        return import_extra(name)
    # A torchvision that was built for another torch fails with RuntimeError or OSError, wherever the two disagree.
    except (ImportError, RuntimeError, OSError) as error:
        if "torchvision" not in f"{error}{getattr(error, 'path', '')}":
            raise
        raise ImportError(
            f"torch-fidelity needs the torchvision that belongs to torch {torch.__version__} "
            f"({str(error).splitlines()[0]}): pip install torchvision from the index which that torch came from, for "
            "CPU builds with --index-url https://download.pytorch.org/whl/cpu"
        ) from error
