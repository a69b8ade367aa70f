"""The command line: `epg-fast <job>` or `python -m epg_fast <job>`, one sub-command per job.

Values come from the defaults of `epg_fast.config`, then from the `--config` files (paths, or names of shipped recipes)
from left to right, then from flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import json
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from pathlib import Path

from epg_fast import config as configs
from epg_fast import distributed
from epg_fast.files import check_writable

_RECIPES = resources.files("epg_fast") / "configs" / "recipes"


def main(argv: list[str] | None = None) -> int:
    """Run one job. Returns the exit code: 0, 1 for a failure on the way, 2 for what the user has to mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    name, *rest = argv
    if name not in _JOBS:
        return _fail(2, f"unknown job {name!r}{_nearest(name, _JOBS)}; jobs: {', '.join(_JOBS)}")
    job, config_class = _JOBS[name]
    try:
        _set_up_logging()
        if name == "tune":
            job, config_class, rest, own = _tuned_job(rest)
        config, options = _parse(name, config_class, rest)
        if name == "tune":
            return job(config, own) or 0
        return _dry_run(name, config, options) if options and options.dry_run else job(config) or 0
    except (ValueError, ImportError) as error:
        if os.environ.get("EPG_DEBUG"):
            raise
        remedy = f"; pip install {error.name}" if str(error).startswith("No module named") else ""
        if isinstance(error, UnicodeEncodeError):
            remedy = "; set LC_ALL=C.UTF-8 or PYTHONUTF8=1, or rename a file whose name is not UTF-8"
        return _fail(2, f"{error}{remedy}")
    except (OSError, RuntimeError) as error:
        if os.environ.get("EPG_DEBUG"):
            raise
        code = 2 if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG else 1
        return _fail(code, f"{error} (EPG_DEBUG=1 shows where)" if isinstance(error, RuntimeError) else str(error))
    except KeyboardInterrupt:
        message = "interrupted"
        if name == "tune":
            message += "; the same command goes on with what is measured"
        elif config_class is not None and issubclass(config_class, configs.RunConfig):
            message += "; the same command resumes from the last checkpoint"
        return _fail(130, message)


def _dry_run(name: str, config: configs.RunConfig, options: configs.DryRunConfig) -> int:
    from epg_fast import training
    from epg_fast.training.estimate import describe

    stages = {
        stage.name: stage for stage in (training.PretrainStage, training.DiffusionStage, training.ConsistencyStage)
    }
    text = describe(config, stages[name], options)
    if distributed.is_main():
        print(text)
    return 0


def _train(config: configs.RunConfig, stage: str) -> None:
    from epg_fast import training
    from epg_fast.plans import parse_ops

    stage_class = getattr(training, stage)
    if parse_ops(config.ops).base == "tune":  # before anything is on the GPU
        from epg_fast.training.loop import check_command
        from epg_fast.tuning import ensure_plan

        check_command(config)
        ensure_plan(config, stage_class)
    training.train(config, stage_class)


def _prepare_data(config: configs.PrepareDataConfig) -> None:
    from epg_fast.data import prepare_digits, prepare_folder, prepare_shards, verify_shards

    if not config.outdir:
        raise ValueError("outdir is missing; say where to write with --outdir")
    if config.verify:
        print(f"{verify_shards(config.outdir)} shards in {config.outdir} are as they were written")
        return
    if not Path(config.outdir).exists():
        check_writable(Path(config.outdir), "outdir")
    if config.source == "digits":
        prepare_digits(config.outdir)
    elif config.layout == "folder":
        prepare_folder(config.source, config.outdir, config.image_size, config.workers, config.max_bad_fraction)
    else:
        names = ("workers", "images_per_shard", "format", "quality", "seed", "max_bad_fraction")
        prepare_shards(
            config.source, config.outdir, config.image_size, **{name: getattr(config, name) for name in names}
        )


def _sample(config: configs.SampleConfig) -> int | None:
    from epg_fast.distributed import Interrupted
    from epg_fast.plans import parse_ops
    from epg_fast.sampling.command import check_command, run

    if parse_ops(config.ops).base == "tune":
        from epg_fast.tuning import ensure_plan

        check_command(config)
        ensure_plan(config, None)
    try:
        run(config)
    except Interrupted as stop:
        return _fail(stop.code, str(stop))


def _tune(config, options: configs.TuneConfig) -> None:
    from epg_fast import training
    from epg_fast.tuning import tune

    stages = {"pretrain": "Pretrain", "finetune-diffusion": "Diffusion", "finetune-consistency": "Consistency"}
    stage = getattr(training, f"{stages[options.job]}Stage") if options.job in stages else None
    tune(config, stage, options, getattr(config, "model", None))


def _tuned_job(argv: list[str]):
    """Of the words behind `tune`: (what to call, the configuration of the job to tune, its words, TuneConfig)."""
    names, own, rest = {field.name for field in dataclasses.fields(configs.TuneConfig)}, [], []
    words = iter(argv)
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag.removeprefix("--") in names and flag.startswith("--"):
            own += [word] if equals else [word, next(words, "")]
        else:
            rest.append(word)
    if any(word in ("-h", "--help") for word in rest):
        return _tune, configs.TuneConfig, ["--help"], None
    options, _ = _parse("tune", configs.TuneConfig, own)
    config_class = configs.TunedSampleConfig if options.job == "sample" else _JOBS[options.job][1]
    return _tune, config_class, rest, options


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
    "pretrain": (partial(_train, stage="PretrainStage"), configs.PretrainConfig),
    "finetune-diffusion": (partial(_train, stage="DiffusionStage"), configs.DiffusionConfig),
    "finetune-consistency": (partial(_train, stage="ConsistencyStage"), configs.ConsistencyConfig),
    "sample": (_sample, configs.SampleConfig),
    "tune": (_tune, configs.TuneConfig),
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
    "tune": "measure on this device what computes a job fastest, and keep it as a plan that the job then takes",
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
    for part in made:
        _expand_paths(part)
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
    found = [flag for name in files for flag in _recipe(name, config_class)]
    if config_class is configs.TunedSampleConfig:  # of a training recipe, the network is what counts
        known = _field_names(config_class)
        found = [flag for flag in found if flag[2:].partition("=")[0] in known and not flag.startswith("--steps=")]
    return found + flags


def _recipe(name: str, config_class: type) -> list[str]:
    """Flags that say what a YAML file does, or the shipped recipe of that name."""
    path = Path(name).expanduser()
    if path.is_file():
        return _read_yaml(path, config_class)
    shipped = sorted(f.name.removesuffix(".yaml") for f in _RECIPES.iterdir() if f.name.endswith(".yaml"))
    if name in shipped:
        return _read_yaml(_RECIPES / f"{name}.yaml", config_class)
    raise ValueError(f"config {name!r}: no such file{_nearest(name, shipped)}; shipped recipes: {', '.join(shipped)}")


def _read_yaml(path: Path, config_class: type) -> list[str]:
    """A file as flags, with values as they are written: YAML would take `off` for a boolean and 2026 for a number."""
    import yaml

    class Text(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value]
            twice = next((key for i, (key, _) in enumerate(node.value) if key.value in names[:i]), None)
            if twice:
                raise yaml.MarkedYAMLError(problem=f"{twice.value} comes twice", problem_mark=twice.start_mark)
            return super().construct_mapping(node, deep)

    try:
        # As bytes, whose encoding YAML knows, whatever that of the locale is.
        content = yaml.load(path.read_bytes(), Text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path}: not valid YAML ({error})") from None
    if not isinstance(content, dict | None):
        raise ValueError(f"config {path}: want a mapping of names to values, got {type(content).__name__}")
    try:
        return list(_as_flags(content or {}, config_class))
    except ValueError as error:
        raise ValueError(f"config {path}: {error}") from None


def _as_flags(content: dict, kind, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    for key, value in content.items():
        name, kind = f"{prefix}{key}", hints.get(key)
        if isinstance(value, dict):
            yield from _as_flags(value, kind, f"{name}.")
        elif dataclasses.is_dataclass(kind):
            raise ValueError(f"{name} is a group, got {value!r}; write its fields indented under it")
        elif value is None and kind and type(None) not in typing.get_args(kind):
            raise ValueError(f"{name} has no value; write one, or remove the line")
        else:
            flag = f"--{name}={value if isinstance(value, str) else json.dumps(value, default=str)}"
            yield os.fsdecode(flag.encode("utf-8", "surrogateescape"))  # as Python decodes words of the command line


def _expand_paths(config) -> None:
    """Do to a leading `~` or `$NAME` what a shell does, but neither in a file nor, for `~`, behind `--outdir=`."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _expand_paths(value)
        elif isinstance(value, str) and value[:1] in ("~", "$"):
            path = os.path.expanduser(os.path.expandvars(value))
            if path[:1] in ("~", "$"):
                raise ValueError(f"{field.name} is {value!r}: no such user or variable; write it out, or as ./{value}")
            setattr(config, field.name, path)


def _one_line(message: str, names: list[str]) -> str:
    """jsonargparse's message in one line, with the nearest valid name behind a key that does not exist."""
    message = " ".join(message.split())
    match = re.search(r"unrecognized arguments: --([\w.]+)", message)
    if match:
        return message + _nearest(match[1], names)
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
    logger.setLevel(logging.INFO if distributed.is_main() else logging.ERROR)


def _fail(code: int, message: str) -> int:
    print(f"epg-fast: error: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Forgiving:
    """A stream that drops what cannot be written: the work must not end with the terminal or disk of its messages."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def _keep_streams_harmless() -> None:
    """Make sure that no message ends the work: not by a closed stream, nor by a character that the locale lacks."""
    # The number of a closed stream would be given to a file, into which libraries would print their messages.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the end)
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    sys.stderr = _Forgiving(sys.stderr)


def console() -> None:
    """Entry point of `epg-fast` and `python -m epg_fast`."""
    _keep_streams_harmless()
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the help has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if code and os.environ.get("WORLD_SIZE", "").strip() not in ("", "1"):
        # A failed rank must not wait for the others on its way out: torchrun stops them once it is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    console()
