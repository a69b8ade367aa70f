"""Checkpoints: a folder checkpoints/step_<iteration>/ that appears whole, for any number of ranks to read.

    rank_<rank>.safetensors   that rank's rows of every split tensor, and the main rank's also what is not split
    state.json                everything else, and how many ranks there are
    checksums.json            file -> [bytes, CRC-32]

Tensors are known by name, see `RunState.tensors`; rows follow one another in the order of the ranks. Nothing in a file
is executed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError

from epg_fast.distributed import Ranks
from epg_fast.files import sync_folder, write_atomically
from epg_fast.models import save_weights
from epg_fast.models.weight_files import open_safetensors
from epg_fast.training.parallel import Tensors, is_sharded, local, rows_of

log = logging.getLogger("epg_fast")
_STATE, _CHECKSUMS = "state.json", "checksums.json"
UNREADABLE = (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError)


class Background:
    """Runs one job at a time in a thread of this name, so that training goes on meanwhile."""

    def __init__(self, name: str):
        # Not a daemon: a process that ends, by an exception too, first finishes what it writes.
        self._executor = ThreadPoolExecutor(1, name)
        self._job: Future | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Wait for the job before, raise what it raised, and start this one."""
        self.wait()
        self._job = self._executor.submit(job)

    def wait(self) -> None:
        """Wait for the last job and raise what it raised, once."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    @property
    def failed(self) -> bool:
        """Whether the last job has ended with an exception that `wait` will raise."""
        return self._job is not None and self._job.done() and self._job.exception() is not None


def write_checkpoint(
    folder: Path,
    iteration: int,
    parts: Tensors,
    state: dict,
    savers: Ranks,
    first: Callable[[], None] = lambda: None,
) -> None:
    """Write folder/step_<iteration>/ under a temporary name; the main rank renames it when all that save are done.

    parts: what this rank holds of the tensors, in host memory. state: JSON-able. savers: the ranks that call this, in
    any thread. first: called before on the main rank, to write what must not be missing beside the checkpoint.

    Raises OSError, on every rank that saves, when the disk of one does not take it; earlier ones stay usable.
    """
    path = step_path(folder, iteration)
    temporary = path.with_name(f".{path.name}.tmp")

    def begin():
        first()
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write_part():
        own = temporary / _part(savers.rank)
        save_weights(own, {name: part for name, part in parts.items() if part.numel()}, {})
        return own.name, _checksum(own)

    def finish():
        content = json.dumps({"ranks": len(files)} | state)
        write_atomically(temporary / _STATE, content, sync=True)
        checksums = dict(files) | {_STATE: _checksum(temporary / _STATE)}
        write_atomically(temporary / _CHECKSUMS, json.dumps(checksums, indent=1), sync=True)
        sync_folder(temporary)
        if path.exists():
            _remove(path)
        os.replace(temporary, path)
        sync_folder(folder)

    try:
        savers.decide(begin)
        files = savers.together(write_part)
        savers.decide(finish)
    except OSError as error:
        if savers.main:
            shutil.rmtree(temporary, ignore_errors=True)
        earlier = next(iter(by_step(folder).values()), None)
        left = f"the previous checkpoint {earlier.name} is intact" if earlier else "there is no earlier checkpoint"
        reason = str(error).partition("\n")[0] or type(error).__name__
        remedy = "if the disk is full, free some space; the same command goes on"
        raise OSError(f"could not save {path}: {reason}; {left}; {remedy}") from None


def load_newest(folder: Path, tensors: Tensors, ranks: Ranks) -> tuple[dict | None, list[Path]]:
    """(`state` of the newest checkpoint that all ranks can read, None if there is none; the damaged ones before it).

    `tensors` are set to what it holds, in place; of a split one each rank reads its rows. The ranks verify the files
    between them. A checkpoint that is damaged, or lacks one of the tensors, is named, and the one before it is used.
    Raises ValueError when there are checkpoints and none will do.
    """
    found, damaged = ranks.gather([*by_step(folder).values()])[0], []
    for path in found:
        state = reason = None
        try:
            state = _verified(path, tensors, ranks)
        except UNREADABLE as error:
            reason = (str(error).partition("\n")[0] or type(error).__name__)[:160]
        reason = next(filter(None, ranks.gather(reason)), None)
        if reason is None:
            _load(path, state["ranks"], tensors)
            return state, damaged
        log.warning("checkpoint %s cannot be read (%s); trying the one before it", path, reason)
        damaged.append(path)
    if found:
        raise ValueError(
            f"none of the {len(found)} checkpoints in {folder} can be read; remove the folder to start anew"
        )
    return None, []


def _verified(path: Path, tensors: Tensors, ranks: Ranks) -> dict:
    """The state of a checkpoint. Raises one of `UNREADABLE` unless its files are what was written, and all is there.

    Each rank compares a share of the checksums.
    """
    checksums = json.loads((path / _CHECKSUMS).read_bytes())
    for name in [_STATE, *sorted(checksums)[ranks.rank :: ranks.world_size]]:
        if list(_checksum(path / name)) != checksums[name]:
            raise ValueError(f"the checksum of {name} does not match")
    state = json.loads((path / _STATE).read_bytes())
    shapes: dict[str, list[int]] = {}
    for rank in range(state["ranks"]):
        with open_safetensors(path / _part(rank)) as file:
            for name in list(file.keys()):
                shape = file.get_slice(name).get_shape()
                shapes[name] = [shapes[name][0] + shape[0], *shape[1:]] if name in shapes else shape
    for name, tensor in tensors.items():
        if shapes.get(name) != list(tensor.shape):
            raise ValueError(f"{name} has shape {shapes.get(name)}, wanted {list(tensor.shape)}")
    return state


@torch.no_grad()
def _load(path: Path, ranks: int, tensors: Tensors) -> None:
    read = dict.fromkeys(tensors, 0)  # rows of the ranks before
    for rank in range(ranks):
        with open_safetensors(path / _part(rank)) as file:
            for name in tensors.keys() & set(file.keys()):
                target, rows = local(tensors[name]), file.get_slice(name)
                if not rows.get_shape():  # a number
                    target.copy_(file.get_tensor(name))
                    continue
                begin, end = read[name], read[name] + rows.get_shape()[0]
                read[name] = end
                here, end_here = _rows_here(tensors[name])
                first, last = max(begin, here), min(end, end_here)
                if first < last:
                    target[first - here : last - here].copy_(rows[first - begin : last - begin])


def _rows_here(tensor: torch.Tensor) -> tuple[int, int]:
    if not is_sharded(tensor):
        return 0, len(tensor)
    return rows_of(len(tensor), tensor.device_mesh.get_local_rank(), tensor.device_mesh.size())


def _part(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _checksum(path: Path) -> tuple[int, int]:
    size = crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def step_path(folder: Path, step: int, ending: str = "") -> Path:
    """Where a run folder's `folder` has what is of a step."""
    return folder / f"step_{step:09d}{ending}"


def by_step(folder: Path, ending: str = "") -> dict[int, Path]:
    """What a folder has under such names, the newest first: checkpoints, or files with this ending."""
    names = {path: re.fullmatch(r"step_(\d+)" + re.escape(ending), path.name) for path in folder.glob("step_*")}
    return dict(sorted(((int(name[1]), path) for path, name in names.items() if name), reverse=True))


def is_kept(iteration: int, keep_every: int) -> bool:
    """Whether the checkpoint stays for good; that of iteration 0, where a run may be stopped, does not."""
    return iteration > 0 and keep_every > 0 and iteration % keep_every == 0


def remove_old(folder: Path, keep: int, keep_every: int) -> None:
    """Remove all checkpoints but the newest `keep` and those that stay for good."""
    for iteration, path in [*by_step(folder).items()][keep:]:
        if not is_kept(iteration, keep_every):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; what a kill leaves of it does not count as one."""
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.tmp-old")), ignore_errors=True)


def tidy(outdir: Path, iteration: int, damaged: Iterable[Path] = ()) -> None:
    """Leave in a run folder what a run that goes on from `iteration` may find.

    Damaged checkpoints get another name, so that they take no place among the newest. What a killed run was writing
    goes: all that is hidden and named tmp. So do snapshots and figures of later steps, which will be made again; until
    then nobody shall take them for the run's own.
    """
    for path in damaged:
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.rename(aside)
    for folder in ("", "checkpoints", "kept", "previews", "posthoc_ema", "evaluation"):
        for path in (outdir / folder).glob(".*tmp*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for folder, ending in (("posthoc_ema", ".safetensors"), ("evaluation", ".json")):
        later = [path for step, path in by_step(outdir / folder, ending).items() if step > iteration]
        for path in later:
            path.unlink(missing_ok=True)
        if later:
            log.info("%d files in %s are of steps after %d and are removed", len(later), outdir / folder, iteration)
