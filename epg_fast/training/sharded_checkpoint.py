"""Checkpoints of sharded training: a folder step_<step>/ that all ranks write, for any number of ranks to read.

    __<rank>_<i>.distcp   a rank's parts of the tensors, written by torch.distributed.checkpoint
    .metadata             which part of which tensor is where in them
    state.pt              everything else, in torch's format
    checksums.json        file -> [bytes, CRC-32]

Tensors are known by name, those of the optimiser too: network/<tensor>, average/<tensor>,
posthoc_ema/<sigma_rel>/<tensor>, optimizer/<exp_avg or exp_avg_sq>/<tensor>.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from epg_fast.training.checkpoint import (
    CheckpointError,
    explained,
    read_checkpoint,
    remove_checkpoint,
    remove_old,
    sync_folder,
)
from epg_fast.training.sharding import Sharding, is_sharded, part_of

_CHECKSUMS, _REST, _METADATA = "checksums.json", "state.pt", ".metadata"
Likes = dict[str, torch.Tensor]
"""The network's state dict, of which every tensor of a checkpoint has the shape and the split."""


def save_sharded(
    folder: Path,
    step: int,
    state: dict,
    sharding: Sharding,
    likes: Likes,
    keep: int,
    keep_every: int = 0,
    weights: Callable[[], None] = lambda: None,
) -> None:
    """Write folder/step_<step>/ under a temporary name; the main rank renames it when every rank's part is on the disk.

    All ranks call this. state: as `save_checkpoint` takes it, with this rank's parts in host memory. weights: called
    before on the main rank, to write what must not be missing beside the checkpoint. Old checkpoints are removed as by
    `save_checkpoint`.

    Raises CheckpointError on every rank when the disk of one does not take it; what was there before stays usable.
    """
    from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save

    rank = torch.distributed.get_rank(sharding.group)
    path, temporary = folder / f"step_{step:09d}", folder / f".step_{step:09d}.tmp"
    tensors, rest = _taken_apart(state)
    tensors = {name: sharding.on_host(part, likes[_like(name)]) for name, part in tensors.items()}

    def begin():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        weights()
        temporary.mkdir()
        with open(temporary / _REST, "wb") as f:
            torch.save(rest, f)
            f.flush()
            os.fsync(f.fileno())

    def write_tensors():
        try:
            save(tensors, storage_writer=FileSystemWriter(temporary), process_group=sharding.group)
        except CheckpointException as error:
            failed = next(iter(error.failures.items()), (0, (error, None)))
            raise OSError(f"rank {failed[0]}: {_reason(failed[1][0])}") from None

    def finish(parts):
        checksums = {name: check for part in parts for name, check in part.items()}
        with open(temporary / _CHECKSUMS, "w", encoding="utf-8") as f:
            json.dump(checksums, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        sync_folder(temporary)
        if path.exists():
            remove_checkpoint(path)
        os.replace(temporary, path)
        sync_folder(folder)

    try:
        together(sharding, begin if rank == 0 else None)
        together(sharding, write_tensors)
        parts = together(sharding, lambda: {f.name: _checksum(f) for f in _own_files(temporary, rank)})
        together(sharding, (lambda: finish(parts)) if rank == 0 else None)
    except CheckpointError as error:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise explained(folder, path, str(error)) from None
    if rank == 0:
        remove_old(folder, keep, keep_every)


def together(sharding: Sharding, act: Callable | None) -> list:
    """What `act` returned on every rank (None: nothing to do); CheckpointError on all if it failed on one."""
    value = error = None
    try:
        value = act and act()
    except (OSError, RuntimeError) as failure:
        error = _reason(failure)
    values = sharding.everyone((value, error))
    for rank, (_, failed) in enumerate(values):
        if failed is not None:
            raise CheckpointError(failed if failed.startswith("rank ") else f"rank {rank}: {failed}")
    return [value for value, _ in values]


def _own_files(folder: Path, rank: int) -> list[Path]:
    """The files of `rank` in a checkpoint that is being written, among them those of all for the first."""
    return [*folder.glob(f"__{rank}_*"), *([folder / _REST, folder / _METADATA] if rank == 0 else [])]


def read_any(path: Path, sharding: Sharding | None, likes: Likes, share: tuple[int, int]) -> dict:
    """State of a file or a folder, each tensor in host memory as this rank holds it: its part, or the whole.

    share: (rank, number of ranks); the ranks verify the files of a folder between them. Raises what the reading of
    damaged files raises, ValueError mostly; another rank may have met the damage, which the caller is to ask.
    """
    if path.is_dir():
        return _read_folder(path, sharding, likes, share)
    state = read_checkpoint(path)
    return state if sharding is None else _split(state, likes)


def _read_folder(path, sharding, likes, share) -> dict:
    from torch.distributed.checkpoint import CheckpointException, load

    _verify(path, *share)
    rest = torch.load(path / _REST, map_location="cpu", weights_only=True)

    def blank(like):
        part = torch.empty(like.to_local().shape if is_sharded(like) else like.shape, dtype=like.dtype)
        return sharding.on_host(part, like) if sharding else part

    wanted = {name: blank(likes[_like(name)]) for name in _names(rest, likes)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it works without the other ranks is meant
            load(wanted, storage_reader=_plain_reader()(path), no_dist=True)
    except CheckpointException as error:
        raise ValueError(_reason(next(iter(error.failures.values()), (error, None))[0])) from None
    parts = {name: t.to_local() if is_sharded(t) else t for name, t in wanted.items()}
    return _puttogether(parts, rest)


def _plain_reader() -> type:
    """torch's FileSystemReader, which would execute code that someone has put into .metadata."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class PlainReader(FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            with open(Path(self.path) / _METADATA, "rb") as f:
                metadata = _PlainUnpickler(f).load()
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
            return metadata

    return PlainReader


_CLASSES = (
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_PLAIN = {("torch.distributed.checkpoint.metadata", name) for name in _CLASSES} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"{_METADATA} names {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)


def _verify(path: Path, rank: int, ranks: int) -> None:
    """Raise ValueError if a file is not what was written; each rank looks at a share of the parts."""
    checksums = json.loads((path / _CHECKSUMS).read_bytes())
    parts = sorted(checksums.keys() - {_REST, _METADATA})
    for name in (_REST, _METADATA, *parts[rank::ranks]):
        if list(_checksum(path / name)) != checksums[name]:
            raise ValueError(f"the checksum of {name} does not match")


def _checksum(path: Path) -> tuple[int, int]:
    size = crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _like(name: str) -> str:
    """The network's tensor that one of a checkpoint is shaped as."""
    return name.rpartition("/")[2]


_SHAPED = ("network", "average", "posthoc_ema", "optimizer")


def _taken_apart(state: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors by name, everything else) of a state."""
    tensors = {f"{part}/{name}": t for part in _SHAPED for name, t in state[part].items() if name != "step"}
    return tensors, state | {part: [*state[part]] for part in _SHAPED} | {"optimizer_step": state["optimizer"]["step"]}


def _names(rest: dict, likes: Likes) -> Iterator[str]:
    """The names of the tensors of a checkpoint."""
    yield from (f"{part}/{name}" for part in _SHAPED for name in rest[part] if name != "step")


def _puttogether(tensors: dict[str, torch.Tensor], rest: dict) -> dict:
    """The state that `_taken_apart` was given."""
    state = rest | {part: {n: tensors[f"{part}/{n}"] for n in rest[part] if n != "step"} for part in _SHAPED}
    state["optimizer"]["step"] = state.pop("optimizer_step")
    return state


def _split(state: dict, likes: Likes) -> dict:
    """This rank's parts of a state of whole tensors."""
    tensors, rest = _taken_apart(state)
    return _puttogether({name: part_of(t, likes[_like(name)]) for name, t in tensors.items()}, rest)


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
