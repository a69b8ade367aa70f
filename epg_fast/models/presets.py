"""Named model sizes (epg_fast/configs/models/*.yaml) and the functions that build them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

import yaml

from epg_fast.wording import nearest

if TYPE_CHECKING:
    from epg_fast.models.encoder import RCMViT
    from epg_fast.models.generator import EPGViT

NETWORKS: dict[str, type] = {}
"""The networks by their names in config.json: what builds and reads them stands below their classes."""


def register(kind: type) -> type:
    """Enter a network's class in `NETWORKS`."""
    NETWORKS[kind.__name__] = kind
    return kind


@cache
def _presets() -> dict[str, dict]:
    folder = resources.files("epg_fast") / "configs" / "models"
    return {f.name[:-5]: yaml.safe_load(f.read_bytes()) for f in folder.iterdir() if f.name.endswith(".yaml")}


def list_presets() -> list[str]:
    """Names that `create_model` accepts."""
    return sorted(_presets())


def preset_config(name: str, **overrides) -> dict:
    """All fields of a preset with `overrides` applied; None keeps the preset's value.

    Raises ValueError for an unknown preset or field, naming the nearest valid one.
    """
    if name not in _presets():
        raise ValueError(
            f"unknown preset {name!r}{nearest(name, list_presets())}; presets: {', '.join(list_presets())}"
        )
    require_arguments(overrides)
    return {**_presets()[name], **{k: v for k, v in overrides.items() if v is not None}}


def require_arguments(names: Iterable[str]) -> None:
    """Raise ValueError, which names the nearest valid one, for a name that is no constructor argument of a network."""
    valid = {name for network in NETWORKS for name in arguments_of(network)}
    for name in names:
        if name not in valid:
            raise ValueError(f"unknown model argument {name!r}{nearest(name, valid)}")


def arguments_of(network: str) -> set[str]:
    """Names of the constructor arguments of a network of `NETWORKS`."""
    return {*inspect.signature(NETWORKS[network]).parameters} - {"official"}


def build(network: str, config: dict):
    """A network of `NETWORKS` from the fields of `preset_config` that concern it."""
    return NETWORKS[network](**{name: config[name] for name in arguments_of(network) & config.keys()})


def generator_from_config(config: dict) -> EPGViT:
    """EPGViT from the fields of `preset_config` that concern it."""
    return build("EPGViT", config)


def encoder_from_config(config: dict) -> RCMViT:
    """RCMViT from the fields of `preset_config` that concern it."""
    return build("RCMViT", config)


def create_model(name: str, **overrides) -> EPGViT:
    """Generator of a preset, freshly initialised, e.g. `create_model("epg_xl_16_256", num_classes=10)`."""
    return build("EPGViT", preset_config(name, **overrides))


def create_encoder(name: str, **overrides) -> RCMViT:
    """Encoder of a preset with its projection head, freshly initialised."""
    return build("RCMViT", preset_config(name, **overrides))
