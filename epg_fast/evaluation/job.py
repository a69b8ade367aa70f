"""The `evaluate` command: what is judged by what, and where the result goes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch

from epg_fast.config import EvaluateConfig
from epg_fast.distributed import resolve_device
from epg_fast.evaluation import evaluate_images, evaluate_probe
from epg_fast.evaluation.page import MARK, result_page
from epg_fast.files import as_json, check_writable, differences, write_atomically
from epg_fast.models import create_encoder, from_pretrained, list_presets


def run(config: EvaluateConfig, evaluate: Callable[[EvaluateConfig], dict] | None = None) -> dict:
    """Judge samples or an encoder, print the result as JSON and write it to `config.output`; returns it.

    evaluate: what makes the result, if not what `config` asks for. `config.page` is written as well.

    The result holds its `settings`, so that the same command may replace its own result; any other file is left alone.
    Raises ValueError for settings that do not go together and for such a file, before anything is computed.
    """
    evaluate = evaluate or _chosen(config)
    settings = _settings(config)
    if config.output:
        _check_output(Path(config.output), settings)
    if config.page:
        _check_page(Path(config.page))
        if config.output and Path(config.page).resolve() == Path(config.output).resolve():
            raise ValueError(f"page: {config.page} is the --output, too; choose another --page")
    result = evaluate(config) | {"settings": settings}
    text = json.dumps(result, indent=2, allow_nan=False)
    if config.output:
        write_atomically(config.output, text + "\n")
    if config.page:
        write_atomically(config.page, result_page(result, config.output))
    print(text)
    return result


def load_encoder(config: EvaluateConfig) -> tuple[torch.nn.Module, str | None]:
    """(network to probe, its pixel normalisation or None for the checkpoint's own).

    The name of a preset gives a freshly initialised encoder.
    """
    device = resolve_device(config.device)
    if config.probe in list_presets():
        torch.manual_seed(config.seed)
        encoder = create_encoder(config.probe).to(device).eval()
    else:
        encoder = from_pretrained(config.probe, device=device)
    return encoder, None if config.normalization == "auto" else config.normalization


def _chosen(config: EvaluateConfig):
    for name in ("checkpoint", "outdir"):
        if getattr(config, name):
            raise ValueError(f"evaluate: got --{name} without --protocol, which it goes with")
    if bool(config.samples) == bool(config.probe):
        raise ValueError("evaluate: pass either --samples (images to judge) or --probe (an encoder to judge)")
    if config.probe:
        others = [n for n in ("reference", "inception", "dinov2", "compare", "page") if getattr(config, n)]
        others += [n for n in ("repeats", "bootstrap", "splits") if getattr(config, n) != getattr(EvaluateConfig, n)]
        if others:
            raise ValueError(f"evaluate: got --{others[0]} with --probe; it goes with --samples")
        return lambda config: evaluate_probe(config, *load_encoder(config))
    return evaluate_images


def _check_page(path: Path) -> None:
    """Raise ValueError unless the file is new or a page of ours; nothing is written."""
    check_writable(path, "page")
    if path.is_dir():
        raise ValueError(f"page: {path} is a folder; name a file, such as {path / 'page.html'}")
    if path.exists():
        with open(path, "rb") as file:
            if MARK.encode() not in file.read(500):
                raise ValueError(
                    f"page: {path} exists and is no page of `evaluate`; choose another --page or delete it"
                )


def _settings(config: EvaluateConfig) -> dict:
    """What the result depends on, as JSON reads it back."""
    unrelated = ("output", "page", "device", "batch_size")
    return as_json({k: v for k, v in dataclasses.asdict(config).items() if k not in unrelated})


def _check_output(path: Path, settings: dict) -> None:
    """Raise ValueError unless the file is new or holds a result of these settings; nothing is written."""
    check_writable(path, "output")
    if not path.exists():
        return
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, OSError):
        found = None
    before = found.get("settings") if isinstance(found, dict) else None
    if not isinstance(before, dict):
        raise ValueError(f"output: {path} exists and is no result of `evaluate`; choose another --output or delete it")
    if changed := differences(before, settings):
        raise ValueError(
            f"output: {path} holds the result of other settings ({changed}); choose another --output or delete it"
        )
