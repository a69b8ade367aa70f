"""Networks with weights: from files and into them, with the configuration that belongs to the weights."""

from __future__ import annotations

import json
import logging
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from epg_fast.files import open_atomically
from epg_fast.models.encoder import RCMViT, ViTEncoder
from epg_fast.models.generator import EPGViT
from epg_fast.models.presets import arguments_of, list_presets, preset_config, require_arguments
from epg_fast.models.weight_files import read_network

log = logging.getLogger("epg_fast")


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
    state, metadata = load_weights(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
    )
    found = EPGViT if is_generator(state) else RCMViT
    kind = kind or found
    if not issubclass(kind, found):
        remedy = "it is a generator" if found is EPGViT else "it is a pre-trained encoder, to be fine-tuned first"
        raise ValueError(f"{source} holds an {found.__name__}, want an {kind.__name__}: {remedy}")
    config = model_config(state, metadata, **overrides)
    model = kind(**{name: config[name] for name in arguments_of(found) & config.keys()})
    load_into(model, state, source)
    model.metadata = metadata
    return model.to(device, dtype or torch_dtype).eval()


def load_weights(source: str | os.PathLike, **options) -> tuple[dict[str, torch.Tensor], dict]:
    """(state dict under the official names, metadata of our own files or {}) of a file, folder or hub id.

    options: those of `hf_hub_download`.
    """
    path, state, metadata = read_network(source, **options)
    if bad := next((name for name, tensor in state.items() if not _is_finite(tensor)), None):
        log.warning("%s: %s holds NaN or infinity, and so will what is computed with it", path, bad)
    return state, metadata


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.sum(dtype=torch.float64).isfinite())


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
