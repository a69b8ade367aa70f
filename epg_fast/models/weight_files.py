"""The tensors of one network in a file: official .pth files, safetensors, other people's checkpoints, hub ids.

The network is found wherever a file keeps it: below other names, and beside other things. Nothing in a file is
executed: its objects other than tensors and plain values are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch

from epg_fast.files import open_atomically
from epg_fast.models import hub
from epg_fast.models.presets import NETWORKS, require_arguments

log = logging.getLogger("epg_fast")

# Looked for in this order when a folder is given: our own runs, the released checkpoints, a pipeline of diffusers.
_FILES_IN_FOLDER = (
    *("model.safetensors", "nnet_ema.pth", "nnet.pth", "model.safetensors.index.json"),
    "transformer/model.safetensors",
)
# What comes in place of a file that was not fetched: what it is, and what to do.
_STAND_INS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file that it stands for; fetch that with `git lfs pull`",
    b"<!doctype html": "a web page, not the file that it offers; download that",
    b"<html": "a web page, not the file that it offers; download that",
}
# What config.json may say beside constructor arguments, by us or by other tools.
_NOT_ARGUMENTS = ("architectures", "epg_fast", "library_name", "model_type", "dtype", "torch_dtype")
# Each network has this tensor once: what stands before the name is where a file keeps the network.
_MARK = "patch_embed.proj.weight"
_AVERAGED = re.compile("ema|average|avg|shadow", re.IGNORECASE)
# What wrappers of modules, and pickles of modules, put into the names of tensors, also in the middle.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_modules|_parameters|_buffers)\.")


def load_weights(source: str | os.PathLike, **options) -> tuple[dict[str, torch.Tensor], dict]:
    """(state dict under the official names, metadata of our own files or {}) of a file, folder or hub id.

    options: those of `hf_hub_download`. What a config.json of `save_pretrained` beside the file says stands above what
    the file says itself. Raises ValueError for what holds no network, or leaves open which is meant.
    """
    path = _locate(source, options)
    described = _read_config(path)
    content, metadata = _read(path)
    arguments = {**metadata.get("config", {}), **described.get("config", {})}
    state = _network(content, path)
    if bad := next((name for name, tensor in state.items() if not _is_finite(tensor)), None):
        log.warning("%s: %s holds NaN or infinity, and so will what is computed with it", path, bad)
    return state, metadata | described | ({"config": arguments} if arguments else {})


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.sum(dtype=torch.float64).isfinite())


def _locate(source: str | os.PathLike, options: dict) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in _FILES_IN_FOLDER:
            if (path / name).is_file():
                return path / name
        above = next((folder for folder in path.absolute().parents if (folder / "model.safetensors").is_file()), None)
        run = f"; it is in the run folder {above}: pass that" if above else ""
        raise ValueError(f"{source}: no weights in this folder; want one of {', '.join(_FILES_IN_FOLDER)}{run}")
    # `runs/mine` is a misspelt folder when there is a folder `runs`, not a repository of a user of that name.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.parent.is_dir():
        return _download(str(source), options)
    raise ValueError(f"{source}: no such file or folder (a hub id has the form owner/name)")


def _download(name: str, options: dict) -> Path:
    repository = hub.Repository(name, options)
    if config := repository.get("config.json"):
        _parse_config(config)  # of another architecture's, before its weights
    for file in _FILES_IN_FOLDER:
        if path := repository.get(file):
            break
    else:
        holds = f"the hub repository holds none of {', '.join(_FILES_IN_FOLDER)}"
        raise ValueError(f"{name}: no such file or folder, and {repository.unreached or holds}")
    others = [shard.name for shard in _shards(path)] if file.endswith(".index.json") else ["config.json"]
    for other in others:
        repository.get(str(Path(file).with_name(other)))
    return path


def _read_config(path: Path) -> dict:
    """Metadata according to the config.json beside weights, which nothing else is."""
    file = path.with_name("config.json")
    return _parse_config(file) if path.name.startswith("model.") and file.is_file() else {}


def _parse_config(file: Path) -> dict:
    """Metadata of a config.json: {} unless it is one of `save_pretrained`.

    Raises ValueError for one of another architecture, and for names that are no arguments of a network.
    """
    try:
        content = json.loads(file.read_bytes())
        named = content.get("architectures") or []
        about = content.get("epg_fast", {})
        if not isinstance(named, list) or not isinstance(about, dict):
            raise ValueError("architectures is no list, or epg_fast no mapping")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not JSON of names and values ({error}); get it again, or remove it") from None
    if not named:
        return {}
    if not set(named) & NETWORKS.keys():
        raise ValueError(f"{file} is of another architecture, {named[0]}; want {' or '.join(sorted(NETWORKS))}")
    arguments = {k: v for k, v in content.items() if k not in _NOT_ARGUMENTS}
    try:
        require_arguments(arguments)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; correct or remove it") from None
    return about | {"config": arguments}


def _read(path: Path) -> tuple[dict, dict]:
    """(what a file holds, nested as it is there, metadata of our own files or {})."""
    if path.name.endswith(".index.json"):
        shards = _shards(path)
        missing = [shard for shard in shards if not shard.is_file()]
        if missing:
            raise ValueError(f"{path} names {missing[0].name}, which is not beside it; get it again")
        parts = [_read(shard) for shard in shards]
        return {k: v for content, _ in parts for k, v in content.items()}, parts[0][1]
    with open(path, "rb") as file:
        head = file.read(64)
    for start, what in _STAND_INS.items():
        if head.lower().startswith(start):
            raise ValueError(f"{path} is {what}")
    # Eight bytes with the length of a header, which is JSON.
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27):
        content, metadata = _read_safetensors(path)
        if isinstance(metadata.get("sigma_rel"), list):
            raise ValueError(f"{path} is a snapshot of post-hoc EMA; `epg-fast reconstruct-ema` makes weights of them")
        return content, metadata
    return _read_pickle(path), {}


def _shards(index: Path) -> list[Path]:
    """The files that an index of Hugging Face's names, beside it."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        return [index.with_name(name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of weights ({type(error).__name__}: {error}); get it again") from None


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator:
    """Open a file as safetensors' `safe_open` does, which refuses names that are not UTF-8."""
    from safetensors import safe_open

    with open(path, "rb") as file:
        utf8 = not any("\ud800" <= letter <= "\udfff" for letter in str(path))
        with safe_open(path if utf8 else f"/dev/fd/{file.fileno()}", framework="pt") as f:
            yield f


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    from safetensors import SafetensorError

    try:
        with open_safetensors(path) as f:
            metadata = json.loads((f.metadata() or {}).get("epg_fast", "{}"))
            if not isinstance(metadata, dict) or not isinstance(metadata.get("config", {}), dict):
                raise ValueError("its epg_fast metadata is not a mapping")
            return {name: f.get_tensor(name) for name in f.keys()}, metadata  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def save_weights(path: str | os.PathLike, state: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write a safetensors file atomically; `metadata` (JSON-able) is stored inside and returned by `load_weights`.

    Raises OSError when the disk does not take it; an earlier file of that name stays as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        with open_atomically(path) as file:
            save_file(tensors, file.name, metadata={"epg_fast": json.dumps(metadata), "format": "pt"})
            # it has put another file there, private to its owner
            os.chmod(file.name, os.fstat(file.fileno()).st_mode)
            with open(file.name, "rb") as written:
                os.fsync(written.fileno())
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None


class _Inert:
    """Stands for an object in a file that weights do not need: what the file wants done with it is not done."""

    state = None

    def __new__(cls, *arguments):
        return super().__new__(cls)

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        self.state = state


class _InertDict:
    """Stands for a mapping of another class: its items are kept, for the network may be among them."""

    def __new__(cls, *arguments):
        return OrderedDict()


class _InertList:
    def __new__(cls, *arguments):
        return []


def _read_pickle(path: Path) -> dict:
    """What torch.save has written; nothing in the file is executed, and objects are inert."""
    with open(path, "rb") as file:
        start = file.read(2)
    if not start or (start == b"PK" and not zipfile.is_zipfile(path)):
        raise ValueError(f"{path} is {'truncated' if start else 'empty'}; get it again")
    try:
        names = _foreign(path)
        content = _load_inert(path, names)
    except Exception as error:  # what a file of other things makes the unpickler raise is no closed list
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        text = (str(error).partition("WeightsUnpickler error:")[2] or str(error)).strip()
        reason = f"{type(error).__name__}: {text.partition(chr(10))[0][:160]}"
        if refused:
            reason = f"it holds {refused[1]}, which could execute code"
        raise ValueError(
            f"{path}: not a file of plain tensors, so it was not loaded ({reason}); save the weights alone where it "
            "was made: torch.save(model.state_dict(), path)"
        ) from None
    if names:
        log.info("%s: left out its objects of %s", path, ", ".join(sorted(names)[:4]) + " ..." * (len(names) > 4))
    return content if isinstance(content, dict) else {"": content}


def _load_inert(path: Path, names: list[str]):
    """torch.load with a stand-in for each of `names`, which turns out to be a mapping or a list when it is filled."""
    stand_ins = [type(f"_Inert{i}", (_Inert,), {}) for i in range(len(names))]
    while True:
        try:
            with torch.serialization.safe_globals(list(zip(stand_ins, names, strict=True))):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            filled = re.search(r"Can only (SETITEM|append|extend).*_Inert(\d+)'", str(error))
            if filled is None:
                raise
            stand_ins[int(filled[2])] = _InertDict if filled[1] == "SETITEM" else _InertList


def _foreign(path: Path) -> list[str]:
    """The classes and functions that a file wants and torch does not take for harmless."""
    if not zipfile.is_zipfile(path):
        return []
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if any(name.startswith("torch.distributed.") for name in names):
        importlib.import_module("torch.distributed.tensor")  # which vouches for its own
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return names


def _network(content: dict, path: Path) -> dict[str, torch.Tensor]:
    """The state dict of the one network in a file, or of the averaged one of several, under the official names."""
    tensors = {_WRAPPERS.sub("", name): tensor for name, tensor in _tensors(content)}
    places = [name.removesuffix(_MARK) for name in tensors if f".{name}".endswith(f".{_MARK}")]
    averaged = [place for place in places if _AVERAGED.search(place)]
    if not places:
        found = f"it holds {', '.join(list(tensors)[:3])}" if tensors else "it holds no tensors"
        raise ValueError(f"{path}: these are not the weights of an EPG network: {_MARK} is missing; {found}")
    if len(places) > 1 and len(averaged) != 1:
        names = ", ".join(place.rstrip(".") or "unnamed" for place in places[:5])
        raise ValueError(f"{path} holds several networks ({names}), want one, or one called ema; save the one you mean")
    place = averaged[0] if averaged else places[0]
    if len(places) > 1:
        log.info("%s holds several networks; taking %s", path, place.rstrip("."))
    return {n.removeprefix(place): _whole(n, t, path) for n, t in tensors.items() if n.startswith(place)}


def _tensors(value, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, _Inert):
        yield from _tensors(value.state, name)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


def _whole(name: str, tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """The values of a DTensor, if all are there; any other tensor."""
    part = getattr(tensor, "_local_tensor", tensor).detach()
    if part.shape != tensor.shape or any(p.is_partial() for p in getattr(tensor, "placements", ())):
        raise ValueError(
            f"{path}: {name} is one rank's part {list(part.shape)} of a sharded tensor {list(tensor.shape)}; save "
            "whole ones: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
        )
    return part


def state_sha256(network: torch.nn.Module, about: str = "") -> str:
    """SHA-256 of `about` and of a network's state dict: names in order, each with its dtype, shape and bytes."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
