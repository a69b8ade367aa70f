"""Folders that others read: a network with its config.json, and a pipeline of diffusers around one.

config.json   constructor arguments, `architectures`, and under `epg_fast` what a checkpoint says of its use
model.safetensors   the weights, which say the same
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from epg_fast.files import check_writable, open_atomically, write_atomically
from epg_fast.models import hub
from epg_fast.models.encoder import RCMViT, ViTEncoder
from epg_fast.models.generator import EPGViT
from epg_fast.models.model_card import model_card
from epg_fast.models.pretrained import from_pretrained, load_weights, model_config, network_arguments, save_weights

log = logging.getLogger("epg_fast")

_TEXTS_OF_PIPELINE = {
    "pipeline.py": "from epg_fast.diffusers import EPGPipeline  # noqa: F401 (diffusers looks for it here)\n",
    "transformer/network.py": "from epg_fast.models import EPGViT  # noqa: F401 (diffusers looks for it here)\n",
    "model_index.json": json.dumps(
        {"_class_name": ["pipeline", "EPGPipeline"], "transformer": ["network", "EPGViT"]}, indent=2
    )
    + "\n",
}
_OF_PIPELINE = ("transformer/model.safetensors", "transformer/config.json", *_TEXTS_OF_PIPELINE)


def save_pretrained(model: ViTEncoder, folder: str | os.PathLike) -> None:
    """Write config.json and model.safetensors; see `ViTEncoder.save_pretrained`."""
    folder = Path(folder)
    _check_folder(folder)
    arguments = network_arguments(model)
    metadata = dict(getattr(model, "metadata", {}))
    before = metadata.pop("config", {})
    # as they are written there where they are equal: 4, not 4.0
    arguments = {name: before[name] if before.get(name) == value else value for name, value in arguments.items()}
    config = {"architectures": [_kind(model).__name__], **arguments, "epg_fast": metadata}
    with contextlib.suppress(FileNotFoundError):
        (folder / "config.json").unlink()  # it would stand above what new weights say of themselves
    save_weights(folder / "model.safetensors", model.state_dict(), metadata | {"config": before | arguments})
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")


def save_pipeline(model: EPGViT, folder: str | os.PathLike) -> None:
    """Write what `EPGPipeline.from_pretrained` and diffusers' own `DiffusionPipeline.from_pretrained` load."""
    folder = Path(folder)
    _check_folder(folder)
    save_pretrained(model, folder / "transformer")
    for name, text in _TEXTS_OF_PIPELINE.items():
        write_atomically(folder / name, text)


def push(
    model: ViTEncoder,
    repo_id: str,
    *,
    save: Callable[[ViTEncoder, Path], None] = save_pretrained,
    evaluation: str | os.PathLike | Mapping | None = None,
    license: str | None = None,
    **options,
) -> str:
    """Upload what `save` writes, with a model card; see `ViTEncoder.push_to_hub`. options: of `hub.upload`."""
    hub.require(f"{repo_id}: pushing to the hub")
    card = model_card(model, repo_id, evaluation, license, pipeline=save is save_pipeline)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        write_atomically(Path(folder) / "README.md", str(card))
        return hub.upload(repo_id, folder, **options)


def _check_folder(folder: Path) -> None:
    """Raise ValueError unless files can be written into `folder`, which may not be there yet."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file, want a folder; choose another")
    check_writable(folder, "output")


def export(source: str | os.PathLike, output: str | os.PathLike, form: str = "safetensors") -> list[Path]:
    """Write the weights of `source` to `output`; returns the files written.

    form: `safetensors`, one file with the configuration inside; `official`, a folder with nnet.pth and nnet_ema.pth as
    the released code reads them (both hold the same weights); `diffusers`, the folder of a pipeline. Raises ValueError
    when a file is already there, and for an encoder that should be a pipeline.
    """
    output = Path(output)
    names = {"safetensors": [], "official": ["nnet.pth", "nnet_ema.pth"], "diffusers": _OF_PIPELINE}[form]
    files = [output / name for name in names] or [output]
    if form == "safetensors" and output.suffix != ".safetensors":
        raise ValueError(f"output {output}: want a name that ends in .safetensors")
    for path in files:
        if path.exists():
            raise ValueError(f"{path} exists; nothing is overwritten, choose another --output")
        check_writable(path, "output")
    if form == "diffusers":
        save_pipeline(from_pretrained(source, kind=EPGViT), output)
        return files
    state, metadata = load_weights(source)
    if form == "safetensors":
        save_weights(output, state, metadata or {"config": model_config(state, {})})
        return files
    for path in files:
        with open_atomically(path) as file:
            torch.save(state, file)
    lost = {k: metadata[k] for k in ("parameterization", "normalization") if metadata.get(k)}
    if lost:
        flags = " ".join(f"--{k} {v}" for k, v in lost.items())
        log.warning("official files do not say how they are to be used; sample from these with %s", flags)
    if untrained := metadata.get("untrained_classes"):
        log.warning("official files do not say that %d classes were never trained: %s", len(untrained), untrained)
    return files


def _kind(model: ViTEncoder) -> type[ViTEncoder]:
    """EPGViT or RCMViT, of which the model's class may be a subclass."""
    return EPGViT if isinstance(model, EPGViT) else RCMViT
