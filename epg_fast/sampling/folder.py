"""The output folder: whose it is, of what settings its images are, who is at work in it."""

from __future__ import annotations

import json
from pathlib import Path

from epg_fast.files import OutputFolder, write_atomically

# What is written down and may differ between the runs that fill a folder: weights are compared by their checksum.
_NOT_COMPARED = ("checkpoint", "autoguidance", "evaluations", "drawn_with")
_DRAWN = ("samples.npz", "grid.png", "parts/*.npy", "png/*/*.png")


class SampleFolder(OutputFolder):
    """A folder that one `sample` at a time fills; settings.json holds what its images depend on."""

    def __init__(self, outdir: str | Path):
        super().__init__(outdir, "sample", "settings.json")

    @property
    def begun(self) -> bool:
        """Whether it holds an image; without any it is of no settings yet."""
        return any(any(self.path.glob(pattern)) for pattern in _DRAWN)

    def require(self, settings: dict) -> None:
        """Raise ValueError unless the folder is new, empty, or of these settings, which may be a part of them."""
        if self.check() and self.begun:
            before = self.read()
            self.require_same({k: before.get(k) for k in settings}, settings, _NOT_COMPARED)

    def read(self) -> dict:
        """Return settings.json. Raises ValueError when it is damaged."""
        try:
            settings = json.loads(self.marker.read_bytes())
            if not isinstance(settings, dict):
                raise ValueError("no mapping")
        except ValueError as error:
            raise self.unreadable(error) from None
        return settings

    def note(self, settings: dict, drawn_with: dict | None) -> None:
        """Write settings.json, where `drawn_with` joins those of earlier runs.

        drawn_with: what images may depend on in the last bits; None for a run that draws none.
        """
        runs = self.read().get("drawn_with", []) if self.begun else []
        if drawn_with is not None and drawn_with not in runs:
            runs = [*runs, drawn_with]
        write_atomically(self.marker, json.dumps(settings | {"drawn_with": runs}, indent=2) + "\n", sync=True)
