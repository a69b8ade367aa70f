"""The output folder: whose it is, of what settings its images are, who is at work in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

from epg_fast.data.files import lock_file
from epg_fast.data.names import is_junk
from epg_fast.outputs import check_writable
from epg_fast.sampling.writers import replacing

_SETTINGS = "settings.json"
# What is written down and may differ between the runs that fill a folder: weights are compared by their checksum.
_NOT_COMPARED = ("checkpoint", "autoguidance", "evaluations", "drawn_with")
_DRAWN = ("samples.npz", "grid.png", "parts/*.npy", "png/*/*.png")


def check_folder(outdir: Path, settings: dict) -> None:
    """Raise ValueError unless the folder is new, empty, or of these settings; nothing is written.

    `settings` may be a part of them. A folder without any image is of no settings yet.
    """
    if outdir.exists() and not outdir.is_dir():
        raise ValueError(f"{outdir} is a file, want a folder; choose another --outdir")
    path = outdir / _SETTINGS
    if not path.exists():
        if outdir.exists() and not all(is_junk(entry.name) for entry in outdir.iterdir()):
            raise ValueError(
                f"{outdir} is not an empty folder and not one of `sample` (no {_SETTINGS}); choose another --outdir"
            )
        check_writable(outdir, "outdir")
        return
    if not any(any(outdir.glob(pattern)) for pattern in _DRAWN):
        return
    before = read_settings(outdir)
    differing = [k for k in settings if k not in _NOT_COMPARED and before.get(k) != settings[k]]
    if differing:
        shown = ", ".join(f"{k} was {before.get(k)!r}, now {settings[k]!r}" for k in differing[:3])
        raise ValueError(f"{outdir} holds samples of other settings ({shown}); choose another --outdir")


def read_settings(outdir: Path) -> dict:
    """Return settings.json. Raises ValueError when it is damaged."""
    path = outdir / _SETTINGS
    try:
        settings = json.loads(path.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("no mapping")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or choose another --outdir") from None
    return settings


def note_settings(outdir: Path, settings: dict, drawn_with: dict | None) -> dict:
    """Write settings.json, where `drawn_with` joins those of earlier runs, and return what it holds.

    drawn_with: what images may depend on in the last bits; None for a run that draws none.
    """
    runs = []
    if any(any(outdir.glob(pattern)) for pattern in _DRAWN):
        runs = read_settings(outdir).get("drawn_with", [])
    if drawn_with is not None and drawn_with not in runs:
        runs = [*runs, drawn_with]
    settings = settings | {"drawn_with": runs}
    with replacing(outdir / _SETTINGS) as file:
        file.write((json.dumps(settings, indent=2) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    return settings


class FolderLock:
    """Lets one command at a time write to an output folder, until the `with` block ends."""

    def __init__(self, outdir: Path):
        self.outdir = outdir
        self._file: IO | None = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception) -> None:
        if self._file is not None:
            self._file.close()

    def take(self) -> None:
        """Create the folder and lock it. Raises ValueError when another process has, OSError when it is not ours."""
        busy = f"another process is sampling into {self.outdir}; wait for it, stop it or choose another --outdir"
        try:
            self.outdir.mkdir(parents=True, exist_ok=True)
            self._file = lock_file(self.outdir / ".lock", busy)
        except OSError as error:
            raise OSError(f"cannot write to {self.outdir}: {error.strerror}; choose another --outdir") from error
