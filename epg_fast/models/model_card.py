"""The model card of a network on the hub: what it is, how it was made, how to sample, how good its images are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch.nn as nn

from epg_fast.models.presets import NETWORKS

PAPER = "arXiv:2510.12586"
_RECIPE = ("stage", "preset", "step", "ema_decay", "posthoc_ema", "parameterization", "normalization", "noise")
_IN_PIPELINE = {"steps": "num_inference_steps", "guidance": "guidance_scale", "interval": "guidance_interval"}
_MOST_CLASSES = 20
_SAMPLING = ("sampler", "steps", "guidance", "interval", "precision", "labels")


def model_card(
    model: nn.Module,
    repo_id: str = "owner/name",
    *,
    evaluation: str | os.PathLike | Mapping | None = None,
    license: str | None = None,
    pipeline: bool = False,
):
    """The card that `push_to_hub` writes, huggingface_hub's ModelCard.

    evaluation: a result of `epg-fast evaluate --samples`. pipeline: whether diffusers loads the repository.
    Raises ValueError for an evaluation that is none.
    """
    from huggingface_hub import ModelCard, ModelCardData

    result = {} if evaluation is None else _result(evaluation)
    generator = isinstance(model, NETWORKS["EPGViT"])
    name = repo_id.rpartition("/")[2]
    data = ModelCardData(**model._hub_mixin_info.model_card_data.to_dict())  # as the class says
    data.pipeline_tag = "unconditional-image-generation" if generator else "image-feature-extraction"
    data.license = license = license or data.license
    if pipeline:
        data.library_name = "diffusers"
    if result:
        data.model_name, data.eval_results = name, _eval_results(result)
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {name}",
        _what(model),
        f"## Recipe\n\n{_recipe(model)}",
        *([f"## Sampling\n\n{_usage(model, repo_id, result, pipeline)}"] if generator else []),
        *([f"## Evaluation\n\n{_figures(result)}"] if result else []),
        f"## Licence\n\n{f'Weights: {license}.' if license else 'The publisher states none for the weights.'} "
        "The code of `epg_fast` has the licence Apache-2.0.",
        f"## Paper\n\n[{PAPER}](https://arxiv.org/abs/{PAPER.removeprefix('arXiv:')})",
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def _what(model: nn.Module) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    size = f"{model.image_size} x {model.image_size}"
    if not isinstance(model, NETWORKS["EPGViT"]):
        return f"Pre-trained encoder of EPG for images of {size} pixels: {millions:.1f} M parameters."
    classes = f"of {model.num_classes} classes" if model.num_classes else "without classes"
    names = model.metadata.get("class_names") or []
    listed = ", ".join([f"{i} {name}" for i, name in enumerate(names[:_MOST_CLASSES])])
    more = f" and {len(names) - _MOST_CLASSES} more" if len(names) > _MOST_CLASSES else ""
    return (
        f"EPG draws images of {size} pixels {classes}, in the space of pixels: a vision transformer of "
        f"{millions:.1f} M parameters, without an autoencoder." + (f" Classes: {listed}{more}." if names else "")
    )


def _recipe(model: nn.Module) -> str:
    known = {name: model.metadata[name] for name in _RECIPE if model.metadata.get(name) is not None}
    if not known:
        return "The checkpoint does not say how it was trained."
    return _table(("", ""), [(name, _plain(value)) for name, value in known.items()])


def _usage(model: nn.Module, repo: str, result: Mapping, pipeline: bool) -> str:
    settings = _settings(model, result)
    flags = "".join(f" --{name} {_plain(value)}" for name, value in settings.items())
    if result:
        flags = f" --num {result['num_samples']}{flags}"
    labels = "[0, 0, 0, 0]" if model.num_classes else "4"
    how = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items() if name != "labels"}
    in_pipeline = {_IN_PIPELINE.get(name, name): value for name, value in how.items()}
    text = f"""```python
from epg_fast import from_pretrained, sample

model = from_pretrained("{repo}")
images = sample(model, {labels}, seed=0{_arguments(how)})
```

```sh
epg-fast sample --checkpoint {repo} --outdir samples{flags}
```"""
    if pipeline:
        text += f"""

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo}", trust_remote_code=True)  # needs epg_fast
images = pipe(class_labels={labels}, seed=0{_arguments(in_pipeline)}).images
```"""
    return text + ("\n\nThe figures below are of images drawn so." if result else "")


def _arguments(values: Mapping) -> str:
    return "".join(f", {name}={value!r}" for name, value in values.items())


def _settings(model: nn.Module, result: Mapping) -> dict:
    """Flags of `sample`: those that the evaluated images were drawn with, else what the kind of training asks for."""
    drawn = result["protocol"]["sampling"] if result else {}
    found = {name: drawn[name] for name in _SAMPLING if drawn.get(name) is not None}
    if found.get("guidance", 1) == 1:
        found.pop("interval", None)
    if found.get("sampler") == "onestep" or (not found and model.metadata.get("stage") == "finetune-consistency"):
        found = {"sampler": "onestep"} | {name: found[name] for name in ("precision", "labels") if name in found}
    return found


def _figures(result: Mapping) -> str:
    spread = result["spread"]
    rows = [(k, f"{result[k]:.5g}", "" if spread[k] is None else f"{spread[k]:.2g}") for k in _measured(result)]
    table, protocol = _table(("figure", "value", "spread"), rows), result["protocol"]
    return f"{table}\n\n{protocol['text']} {protocol['judging']['spread']}"


def _measured(result: Mapping) -> list[str]:
    return [name for name in result["spread"] if result.get(name) is not None]


def _eval_results(result: Mapping) -> list:
    from huggingface_hub import EvalResult

    settings = result["protocol"]["judging"]["settings"]
    name = Path(settings["reference"] or settings["test"]).stem
    about = {"task_type": "unconditional-image-generation", "dataset_type": name, "dataset_name": name}
    return [EvalResult(**about, metric_type=figure, metric_value=result[figure]) for figure in _measured(result)]


def _result(evaluation: str | os.PathLike | Mapping) -> Mapping:
    wanted = "want a result of `epg-fast evaluate --samples --output`"
    found = evaluation
    if not isinstance(evaluation, Mapping):
        try:
            found = json.loads(Path(evaluation).read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"evaluation {evaluation}: {error}; {wanted}") from None
    if not isinstance(found, Mapping) or found.get("kind") != "images" or "protocol" not in found:
        what = "what was given" if found is evaluation else evaluation
        raise ValueError(f"evaluation: {what} holds no figures of images with their protocol; {wanted}")
    return found


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def _plain(value) -> str:
    """A value as a flag takes it and a table shows it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
