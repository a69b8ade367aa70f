"""Networks with weights: from files, folders and the hub and into them, with the configuration that belongs to them.

A folder of `save_pretrained`:
config.json   constructor arguments, `architectures`, and under `epg_fast` what a checkpoint says of its use
model.safetensors   the weights, which say the same
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F

from epg_fast.files import check_writable, open_atomically, write_atomically
from epg_fast.models import hub
from epg_fast.models.model_card import model_card
from epg_fast.models.presets import NETWORKS, arguments_of, list_presets, preset_config, require_arguments
from epg_fast.models.weight_files import load_weights, save_weights

if TYPE_CHECKING:
    from epg_fast.models.encoder import RCMViT, ViTEncoder
    from epg_fast.models.generator import EPGViT

log = logging.getLogger("epg_fast")

_TEXTS_OF_PIPELINE = {
    "pipeline.py": "from epg_fast.diffusers import EPGPipeline  # noqa: F401 (diffusers looks for it here)\n",
    "transformer/network.py": "from epg_fast.models import EPGViT  # noqa: F401 (diffusers looks for it here)\n",
    "model_index.json": json.dumps(
        {"_class_name": ["pipeline", "EPGPipeline"], "transformer": ["network", "EPGViT"]}, indent=2
    )
    + "\n",
}
_FILES = {
    "safetensors": [""],
    "official": ["nnet.pth", "nnet_ema.pth"],
    "diffusers": ["transformer/model.safetensors", "transformer/config.json", *_TEXTS_OF_PIPELINE],
}


class Pretrained(nn.Module, hub.PyTorchModelHubMixin):
    """A network as a model of the hub: read from files, folders and repositories, and written to them."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are in."""
        return self.pos_embed.dtype

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options) -> ViTEncoder:
        """Network of this class, in eval mode, from a file, folder or hub id; see `epg_fast.from_pretrained`."""
        return from_pretrained(pretrained_model_name_or_path, kind=cls, **options)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, push_to_hub: bool = False, repo_id: str | None = None, **options
    ) -> str | None:
        """Write config.json and model.safetensors, in the place of earlier ones, for `from_pretrained` and `sample`.

        config.json has the constructor arguments and, under `epg_fast`, what the checkpoint said of its use (attribute
        `metadata`): parameterization, normalization, noise schedule, preset, stage, step, EMA. An edited one is obeyed.
        push_to_hub: also push to `repo_id`, by default of the folder's name, with `options` of the method of that name.
        Raises ValueError when the folder cannot be written, OSError when the disk fails.
        """
        if options and not push_to_hub:
            raise TypeError(f"save_pretrained: {next(iter(options))} is for push_to_hub=True")
        folder = Path(save_directory)
        _check_folder(folder)
        kind, metadata = _kind(self), dict(self.metadata)
        before = metadata.pop("config", {})
        # as they are written there where they are equal: 4, not 4.0
        arguments = {k: before[k] if before.get(k) == v else v for k, v in network_arguments(self).items()}
        config = {"architectures": [kind], **arguments, "epg_fast": metadata}
        with contextlib.suppress(FileNotFoundError):
            (folder / "config.json").unlink()  # it would stand above what new weights say of themselves
        save_weights(folder / "model.safetensors", self.state_dict(), metadata | {"config": before | arguments})
        write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
        return self.push_to_hub(repo_id or folder.name, **options) if push_to_hub else None

    generate_model_card = model_card

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload weights",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        evaluation: str | os.PathLike | Mapping | None = None,
        license: str | None = None,
        pipeline: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes, with a model card, in one commit; returns its URL.

        The repository is made if need be; a README.md that it has stays. evaluation: result of `epg-fast evaluate`
        (JSON file or what it holds), for the card. license: of the weights, as the hub names it, such as "apache-2.0".
        pipeline: upload the folder of a pipeline of diffusers.
        Needs huggingface_hub. Raises ValueError when the hub refuses or cannot be reached; nothing is pushed then.
        """
        hub.require(f"{repo_id}: pushing to the hub")
        card = self.generate_model_card(repo_id, evaluation=evaluation, license=license, pipeline=pipeline)
        with tempfile.TemporaryDirectory() as folder:
            save_pipeline(self, folder) if pipeline else self.save_pretrained(folder)
            write_atomically(Path(folder) / "README.md", str(card))
            return hub.upload(repo_id, folder, commit_message, private, token, branch, create_pr)


def save_pipeline(model: EPGViT, folder: str | os.PathLike) -> None:
    """Write what `EPGPipeline.from_pretrained` and diffusers' own `DiffusionPipeline.from_pretrained` load."""
    folder = Path(folder)
    _check_folder(folder)
    model.save_pretrained(folder / "transformer")
    for name, text in _TEXTS_OF_PIPELINE.items():
        write_atomically(folder / name, text)


def _check_folder(folder: Path) -> None:
    """Raise ValueError unless files can be written into `folder`, which may not be there yet."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file, want a folder; choose another")
    check_writable(folder, "output")


def _kind(model: ViTEncoder) -> str:
    """EPGViT or RCMViT, of which the model's class may be a subclass."""
    return next(name for name, kind in NETWORKS.items() if isinstance(model, kind))


def from_pretrained(
    source: str | os.PathLike,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    kind: type[ViTEncoder] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    **overrides,
) -> EPGViT | RCMViT:
    """Network with the weights of `source`, in eval mode: EPGViT, or RCMViT when the file holds an encoder.

    source: a .safetensors of this package, an official .pth, a folder (a run folder, one of `save_pretrained` or of
    `export`, or one holding nnet_ema.pth), or a hub id `owner/name` (needs huggingface_hub, whose `hf_hub_download`
    takes `revision` and what stands after it). The configuration is read from the file, or from a config.json of
    `save_pretrained` beside it, or inferred from the tensors; `overrides` are constructor arguments. With another
    `image_size` the position embedding is interpolated. dtype (diffusers also says torch_dtype): of the weights,
    None for float32. kind: EPGViT, RCMViT or a subclass, None for whichever it is.
    Raises ValueError for weights that do not fit, naming the first few, for those of another `kind`, for files that are
    not plain tensors, and when the hub does not give them.
    """
    how = {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only}
    state, metadata = load_weights(source, revision=revision, token=token, **how)
    found = "EPGViT" if is_generator(state) else "RCMViT"
    kind = kind or NETWORKS[found]
    if not issubclass(kind, NETWORKS[found]):
        remedy = "it is a generator" if found == "EPGViT" else "it is a pre-trained encoder, to be fine-tuned first"
        raise ValueError(f"{source} holds an {found}, want an {kind.__name__}: {remedy}")
    config = model_config(state, metadata, **overrides)
    model = kind(**{name: config[name] for name in arguments_of(found) & config.keys()})
    load_into(model, state, source)
    model.metadata = metadata
    return model.to(device, dtype or torch_dtype).eval()


def export(source: str | os.PathLike, output: str | os.PathLike, form: str = "safetensors") -> list[Path]:
    """Write the weights of `source` to `output`; returns the files written.

    form: `safetensors`, one file with the configuration inside; `official`, a folder with nnet.pth and nnet_ema.pth as
    the released code reads them (both hold the same weights); `diffusers`, the folder of a pipeline. Raises ValueError
    when a file is already there, and for an encoder that should be a pipeline.
    """
    output = Path(output)
    files = [output / name for name in _FILES[form]]
    if form == "safetensors" and output.suffix != ".safetensors":
        raise ValueError(f"output {output}: want a name that ends in .safetensors")
    for path in files:
        if path.exists():
            raise ValueError(f"{path} exists; nothing is overwritten, choose another --output")
        check_writable(path, "output")
    if form == "diffusers":
        save_pipeline(from_pretrained(source, kind=NETWORKS["EPGViT"]), output)
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


def is_generator(state: dict[str, torch.Tensor]) -> bool:
    """Whether the tensors are those of EPGViT (RCMViT has no output layer)."""
    return "out.weight" in state


def model_config(state: dict[str, torch.Tensor], metadata: dict, **overrides) -> dict:
    """Constructor arguments for the tensors: shapes tell all but the number of heads, which the preset tells."""
    config = dict(metadata.get("config") or _infer_config(state, overrides))
    overrides = {k: v for k, v in overrides.items() if v is not None}
    require_arguments(overrides)
    return {**config, **overrides}


def network_arguments(model: EPGViT | RCMViT) -> dict:
    """Constructor arguments that make a network of this kind and computation; rates of dropout are left out."""
    blocks = {"num_heads": model.blocks, "decoder_num_heads": getattr(model, "decoder_blocks", [])}
    heads = {name: part[0].attn.num_heads for name, part in blocks.items() if len(part)}
    config = _infer_config(model.state_dict(), heads) | heads
    attention = model.blocks[0].attn
    if attention.scale != (model.embed_dim // attention.num_heads) ** -0.5:
        config["qk_scale"] = attention.scale
    return config


def load_into(model: nn.Module, state: dict[str, torch.Tensor], source="the checkpoint", encoder_only: bool = False):
    """Copy `state` into `model`, strictly; the position embedding is interpolated to the model's grid.

    encoder_only: take the encoder trunk alone (the projection head, and decoder if any, of `state` are ignored and the
    rest of `model` keeps its values). Raises ValueError naming the first few tensors that are missing, unexpected or of
    another shape.
    """
    target = model.state_dict()
    state = dict(state)
    if "pos_embed" in state and state["pos_embed"].shape != target["pos_embed"].shape:
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], target["pos_embed"], model.extras)
    if encoder_only:
        trunk = re.compile(r"cls_token|pos_embed|patch_embed\.|blocks\.|norm\.")
        state = {k: v for k, v in state.items() if trunk.match(k)}
        target = {k: v for k, v in target.items() if trunk.match(k)}
    problems = [f"missing {k}" for k in target if k not in state]
    problems += [f"unexpected {k}" for k in state if k not in target]
    problems += [
        f"{k} has shape {list(state[k].shape)}, want {list(v.shape)}"
        for k, v in target.items()
        if k in state and state[k].shape != v.shape
    ]
    if len(problems) == 1 and "class_embed.weight" in problems[0]:
        theirs, ours = (len(s["class_embed.weight"]) - 1 if "class_embed.weight" in s else 0 for s in (state, target))
        raise ValueError(
            f"{source} has {theirs} classes, the model {ours}; pass --model.num_classes {theirs}, or start from a "
            "pre-trained encoder, which has none"
        )
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems[:4])}{more}")
    model.load_state_dict(state, strict=not encoder_only)


def interpolate_pos_embed(pos_embed: torch.Tensor, target: torch.Tensor, extras: int) -> torch.Tensor:
    """Bicubic interpolation of the patch part: pos_embed [1, extras+n*n, E] -> shape of `target` [1, extras+m*m, E].

    Returned unchanged when it cannot fit (another width or number of extra tokens).
    """
    old, new = ((t.shape[1] - extras) ** 0.5 for t in (pos_embed, target))
    if pos_embed.shape[2] != target.shape[2] or old != int(old) or new != int(new) or old == 0:
        return pos_embed
    grid = pos_embed[:, extras:].reshape(1, int(old), int(old), -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.double(), size=(int(new), int(new)), mode="bicubic", align_corners=False, antialias=True)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :extras], grid], dim=1)


def _infer_config(state: dict[str, torch.Tensor], overrides: dict) -> dict:
    try:
        embed_dim, in_channels, patch_size, _ = state["patch_embed.proj.weight"].shape
        tokens = state["cls_token"].shape[1]
        grid = (state["pos_embed"].shape[1] - tokens - 1) ** 0.5
        config = {
            "image_size": int(round(grid)) * patch_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "embed_dim": embed_dim,
            "tokens": tokens,
            "depth": _count(state, "blocks"),
            "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        }
        if is_generator(state):
            classes = state.get("class_embed.weight")
            config |= {
                "decoder_depth": _count(state, "decoder_blocks"),
                "decoder_embed_dim": state["out.weight"].shape[1],
                "num_classes": 0 if classes is None else classes.shape[0] - 1,
                "skip_post_norm": "decoder_blocks.0.skip_norm.weight" in state,
            }
        else:
            head = sorted(
                (k for k in state if re.fullmatch(r"projection_head\.\d+\.weight", k) and state[k].ndim == 2),
                key=lambda k: int(k.split(".")[1]),
            )
            config["proj_layers"] = len(head)
            if head:
                config |= {"output_dim": state[head[-1]].shape[0], "hidden_dim": state[head[0]].shape[0]}
    except KeyError as error:
        raise ValueError(f"these are not the weights of an EPG network: {error.args[0]} is missing") from None
    except (IndexError, ValueError) as error:
        raise ValueError(f"these are not the weights of an EPG network: a tensor has an odd shape ({error})") from None
    return config | _heads(config, overrides)


def _count(state: dict[str, torch.Tensor], prefix: str) -> int:
    return len({k.split(".")[1] for k in state if k.startswith(prefix + ".")})


def _heads(config: dict, overrides: dict) -> dict:
    """Numbers of heads, which no tensor shows: from a preset of the same widths and depths, or from the overrides."""
    wanted = ["num_heads"] + (["decoder_num_heads"] if "decoder_depth" in config else [])
    if all(overrides.get(k) for k in wanted):
        return {}
    keys = [k for k in ("embed_dim", "depth", "decoder_embed_dim", "decoder_depth") if k in config]
    for name in list_presets():
        preset = preset_config(name)
        if all(preset[k] == config[k] for k in keys):
            return {k: preset[k] for k in wanted}
    shape = ", ".join(f"{k}={config[k]}" for k in keys)
    raise ValueError(f"no preset has {shape}; pass {' and '.join(f'{k}=' for k in wanted)} (no tensor shows them)")
