"""What decodes the images of a run: the same on every rank, and after a resume what it was before."""

from __future__ import annotations

import logging

import torch

from epg_fast.data import resolve_backend
from epg_fast.distributed import Ranks

log = logging.getLogger("epg_fast")
_PIXELS = "their pixels differ slightly, so that the numbers are no longer those of an uninterrupted run"


def agreed_backend(wanted: str, used: str | None, ranks: Ranks) -> str:
    """`choose_backend` on every rank. Raises ValueError, on all of them, for machines that would decode differently."""
    chosen = ranks.gather(choose_backend(wanted, used, ranks.device))
    for rank, other in enumerate(chosen):
        if other != chosen[0]:
            raise ValueError(
                f"rank {rank} decodes images with {other}, rank 0 with {chosen[0]}: `epg-fast env` on both machines "
                "says what is missing; install it, or pass --data.backend pillow"
            )
    return chosen[0]


def choose_backend(wanted: str, used: str | None, device: torch.device | str = "cpu") -> str:
    """Return the loader, "dali" or "pillow", for `data.backend` = `wanted` in a run that has `used` so far (None: new).

    `auto` keeps to what the run has used, because the pixels of the two differ slightly; another one by name is obeyed
    with a warning. Raises ValueError if the one to keep to does not work here.
    """
    if used is None:
        return resolve_backend(wanted, device)
    if wanted not in ("auto", used):
        wanted = resolve_backend(wanted, device)
        log.warning("the images of this run were decoded by %s so far, now by %s as asked: %s", used, wanted, _PIXELS)
        return wanted
    try:
        found, reason = resolve_backend(used, device), "it is not installed"
    except (ValueError, ImportError) as error:
        found, reason = None, str(error)
    if found != used:
        raise ValueError(
            f"the images of this run were decoded by {used} so far, which does not work here: {reason}. Install it "
            f"(pip install nvidia-dali-cuda130, or -cuda120), or go on with --data.backend pillow: {_PIXELS}"
        )
    return used


def description(backend: str, workers: int) -> str:
    """The decoder and its threads or processes, for people."""
    if backend == "dali":
        return f"DALI ({max(workers, 1)} thread{'s' * (workers > 1)})"
    return f"Pillow ({workers} process{'es' * (workers != 1)})" if workers else "Pillow (in the training process)"
