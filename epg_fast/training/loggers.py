"""Further places for the lines of metrics: Weights & Biases and Trackio, which have one interface."""

from __future__ import annotations

import dataclasses
import importlib
import uuid
from pathlib import Path

from epg_fast.config import RunConfig
from epg_fast.files import write_atomically

_REMEDIES = {
    "wandb": "`wandb login`, or WANDB_MODE=offline, which logs to files alone",
    "trackio": "choose another name, or unset TRACKIO_SPACE_ID, without which it logs to this machine alone",
}


def require_loggers(config: RunConfig) -> None:
    """Raise ValueError for a library that is asked for by its project, and not installed."""
    for library, project in _projects(config).items():
        try:
            importlib.import_module(library)
        except ImportError:
            raise ValueError(
                f"{library} project {project!r} asked for, but {library} is not installed: pip install {library}"
            ) from None


def open_loggers(config: RunConfig, outdir: Path, step: int) -> list:
    """The runs of all libraries asked for, each with `log(values, step=step)` and `finish()`.

    A run that goes on from `step` is the same one there: `.wandb` and `.trackio` in `outdir` have its id, because names
    of run folders repeat. Raises ValueError where a library refuses.
    """
    runs = []
    for library, project in _projects(config).items():
        path = outdir / f".{library}"
        own = path.read_text(encoding="utf-8") if step and path.exists() else uuid.uuid4().hex[:8]
        # a run of Trackio is known by its name
        names = {"name": outdir.name, "id": own} if library == "wandb" else {"name": f"{outdir.name}-{own}"}
        try:
            init = importlib.import_module(library).init
            runs.append(init(project=project, **names, resume="allow", config=dataclasses.asdict(config)))
        except Exception as error:  # which the libraries have of their own
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{library}: cannot log to project {project!r} ({why}); {_REMEDIES[library]}") from error
        write_atomically(path, own)
    return runs


def _projects(config: RunConfig) -> dict[str, str]:
    projects = {"wandb": config.wandb, "trackio": config.trackio}
    return {library: project for library, project in projects.items() if project}
