"""The command line: `epg-fast <job>` or `python -m epg_fast <job>`, one sub-command per job.

Values come from the defaults of `epg_fast.config`, then from the `--config` files (paths, or names of shipped recipes)
from left to right, then from flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import sys
import typing
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from epg_fast import config as configs

_UNKNOWN_KEY = r"Option '([\w.]+)' is not accepted"
_RECIPES = resources.files("epg_fast") / "configs" / "recipes"


def main(argv: list[str] | None = None) -> int:
    """Run one job. Returns the exit code: 0, 1 for a failure on the way, 2 for what the user has to mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _set_up_logging()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    name, *rest = argv
    if name not in _JOBS:
        return _fail(2, f"unknown job {name!r}{_nearest(name, _JOBS)}; jobs: {', '.join(_JOBS)}")
    job, config_class = _JOBS[name]
    try:
        config, options = _parse(name, config_class, rest)
        return _dry_run(name, config, options) if options and options.dry_run else job(config) or 0
    except (ValueError, ImportError) as error:
        if os.environ.get("EPG_DEBUG"):
            raise
        remedy = f"; pip install {error.name}" if str(error).startswith("No module named") else ""
        return _fail(2, f"{error}{remedy}")
    except (OSError, RuntimeError) as error:
        if os.environ.get("EPG_DEBUG"):
            raise
        return _fail(1, f"{error} (EPG_DEBUG=1 shows where)" if isinstance(error, RuntimeError) else str(error))
    except KeyboardInterrupt:
        training = config_class is not None and issubclass(config_class, configs.RunConfig)
        return _fail(
            130, "interrupted; the same command resumes from the last checkpoint" if training else "interrupted"
        )


def _dry_run(name: str, config: configs.RunConfig, options: configs.DryRunConfig) -> int:
    from epg_fast import training
    from epg_fast.training.dry_run import describe

    stages = {
        stage.name: stage for stage in (training.PretrainStage, training.DiffusionStage, training.ConsistencyStage)
    }
    text = describe(config, stages[name], options)
    if os.environ.get("RANK", "0") == "0":
        print(text)
    return 0


def _pretrain(config: configs.PretrainConfig) -> None:
    from epg_fast.training import PretrainStage, train

    train(config, PretrainStage)


def _finetune_diffusion(config: configs.DiffusionConfig) -> None:
    from epg_fast.training import DiffusionStage, train

    train(config, DiffusionStage)


def _finetune_consistency(config: configs.ConsistencyConfig) -> None:
    from epg_fast.training import ConsistencyStage, train

    train(config, ConsistencyStage)


def _prepare_data(config: configs.PrepareDataConfig) -> None:
    from epg_fast.data import prepare_digits, prepare_folder, prepare_shards, verify_shards

    if not config.outdir:
        raise ValueError("outdir is missing; say where to write with --outdir")
    if config.verify:
        print(f"{verify_shards(config.outdir)} shards in {config.outdir} are as they were written")
    elif config.source == "digits":
        prepare_digits(config.outdir)
    elif config.layout == "folder":
        prepare_folder(config.source, config.outdir, config.image_size, config.workers, config.max_bad_fraction)
    else:
        names = ("workers", "images_per_shard", "format", "quality", "seed", "max_bad_fraction")
        prepare_shards(
            config.source, config.outdir, config.image_size, **{name: getattr(config, name) for name in names}
        )


def _sample(config: configs.SampleConfig) -> int | None:
    from epg_fast.sampling.interruption import Interrupted
    from epg_fast.sampling.job import run

    try:
        run(config)
    except Interrupted as stop:
        return _fail(stop.code, str(stop))


def _evaluate(config: configs.EvaluateConfig) -> None:
    from epg_fast.evaluation.job import run

    run(config)


def _export(config: configs.ExportConfig) -> None:
    from epg_fast.models import export

    if not config.checkpoint or not config.output:
        raise ValueError("export: --checkpoint and --output are needed")
    for path in export(config.checkpoint, config.output, config.format):
        print(path)


def _reconstruct_ema(config: configs.ReconstructEmaConfig) -> None:
    from epg_fast.training.reconstruct import reconstruct_file

    if not config.run or not config.output or config.sigma_rel is None:
        raise ValueError("reconstruct-ema: --run, --sigma_rel and --output are needed")
    print(reconstruct_file(config.run, config.output, config.sigma_rel, config.step, config.max_residual))


def _env(config: None) -> None:
    from epg_fast.environment import report

    print(report())


_JOBS: dict[str, tuple[Callable, type | None]] = {
    "prepare-data": (_prepare_data, configs.PrepareDataConfig),
    "pretrain": (_pretrain, configs.PretrainConfig),
    "finetune-diffusion": (_finetune_diffusion, configs.DiffusionConfig),
    "finetune-consistency": (_finetune_consistency, configs.ConsistencyConfig),
    "sample": (_sample, configs.SampleConfig),
    "evaluate": (_evaluate, configs.EvaluateConfig),
    "export": (_export, configs.ExportConfig),
    "reconstruct-ema": (_reconstruct_ema, configs.ReconstructEmaConfig),
    "env": (_env, None),
}
_SUMMARIES = {
    "prepare-data": "write centre crops of your images as tar shards or class folders, or the embedded digits",
    "pretrain": "stage 1: self-supervised pre-training of the encoder",
    "finetune-diffusion": "stage 2a: diffusion fine-tuning of encoder and decoder",
    "finetune-consistency": "stage 2b: consistency fine-tuning for one-step generation",
    "sample": "draw images from a trained model",
    "evaluate": "judge samples against real images, or probe an encoder",
    "export": "write weights as safetensors or as official .pth files",
    "reconstruct-ema": "write the weights averaged over any length, from a run's snapshots of tracked averages",
    "env": "versions, devices, extension: paste this into bug reports",
}


def _parse(name: str, config_class: type | None, argv: list[str]):
    """(the job's configuration, DryRunConfig of a training job), None for what the job does not have.

    Raises ValueError with one line for whatever is wrong with the flags or files.
    """
    if config_class is None:
        if argv:
            raise ValueError(f"{name} takes no arguments, got {' '.join(argv)}")
        return None, None

    from argparse import ArgumentError

    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"epg-fast {name}", description=_SUMMARIES[name] + ".", exit_on_error=False)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file, or name of a shipped recipe; may be repeated, later ones win, flags win over all.",
    )
    parts = [config_class, *([configs.DryRunConfig] if issubclass(config_class, configs.RunConfig) else [])]
    for part in parts:
        parser.add_class_arguments(part, nested_key=None, as_group=False)
    try:
        values = parser.instantiate(parser.parse_args(_configs_first(_switched_on(argv), config_class)))
    except ArgumentError as error:
        raise ValueError(_one_line(str(error), [name for part in parts for name in _field_names(part)])) from None
    made = [part(**{field.name: values[field.name] for field in dataclasses.fields(part)}) for part in parts]
    return made[0], made[1] if len(made) > 1 else None


def _switched_on(argv: list[str]) -> list[str]:
    """`--dry_run` and `--dry-run` may stand without `true`."""
    words = []
    for i, word in enumerate(argv):
        alone = word in ("--dry_run", "--dry-run") and argv[i + 1 : i + 2] not in (["true"], ["false"])
        words += ["--dry_run", "true"] if alone else [word.replace("--dry-run", "--dry_run")]
    return words


def _configs_first(argv: list[str], config_class: type) -> list[str]:
    """Move `--config X` to the front, so that flags win wherever they stand; names become paths of shipped recipes."""
    files, flags, rest = [], [], iter(argv)
    for argument in rest:
        if argument == "--config":
            files.append(next(rest, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            flags.append(argument)
    return [a for f in files for a in ("--config", _recipe(f, config_class))] + flags


def _recipe(name: str, config_class: type) -> str:
    if Path(name).is_file():
        _check_yaml(name, config_class)
        return name
    shipped = sorted(f.name.removesuffix(".yaml") for f in _RECIPES.iterdir() if f.name.endswith(".yaml"))
    if name in shipped:
        return str(_RECIPES / f"{name}.yaml")
    raise ValueError(f"config {name!r}: no such file{_nearest(name, shipped)}; shipped recipes: {', '.join(shipped)}")


def _check_yaml(path: str, config_class: type) -> None:
    """What jsonargparse lets pass or reports without the name of the file."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"config {path}: want a mapping of names to values, got {type(content).__name__}")
    for key, value in content.items():
        group = typing.get_type_hints(config_class).get(key)
        if dataclasses.is_dataclass(group) and not isinstance(value, dict):
            raise ValueError(f"config {path}: {key} is a group, got {value!r}; write its fields indented under it")


def _one_line(message: str, names: list[str]) -> str:
    """jsonargparse's message in one line, with the nearest valid name behind a key that does not exist."""
    message = " ".join(message.split())
    for pattern in (
        r"unrecognized arguments: --([\w.]+)",
        r"Group '([\w.]+)' does not accept option '([\w.]+)'",
        _UNKNOWN_KEY,
    ):
        match = re.search(pattern, message)
        if match:
            return message + _nearest(".".join(match.groups()), names)
    if re.search(r'key "compile".*Got value: (on|True)$', message):
        message += "; on is called blocks now"
    return message


def _field_names(config_class: type, prefix: str = "") -> list[str]:
    hints, names = typing.get_type_hints(config_class), []
    for field in dataclasses.fields(config_class):
        names.append(prefix + field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            names += _field_names(hints[field.name], f"{prefix}{field.name}.")
    return names


def _nearest(name: str, valid) -> str:
    match = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _usage() -> str:
    width = max(map(len, _JOBS))
    jobs = "\n".join(f"  {name:<{width}}  {_SUMMARIES[name]}" for name in _JOBS)
    usage = "usage: epg-fast JOB [--config FILE_OR_RECIPE ...] [flags]"
    return f"{usage}\n\njobs:\n{jobs}\n\n`epg-fast JOB --help` lists the flags."


def _set_up_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("epg-fast: %(message)s"))
    logger = logging.getLogger("epg_fast")
    logger.handlers, logger.propagate = [handler], False
    # Under torchrun one rank talks to the user.
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def _fail(code: int, message: str) -> int:
    print(f"epg-fast: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def console() -> None:
    """Entry point of `epg-fast` and `python -m epg_fast`."""
    code = main()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A failed rank must not wait for the others on its way out: torchrun stops them once it is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    console()
