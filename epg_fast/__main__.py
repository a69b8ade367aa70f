"""The command line: `epg-fast <job>` or `python -m epg_fast <job>`, one sub-command per job.

Values come from the defaults of `epg_fast.config`, then from the `--config` files (paths, or names of shipped recipes)
from left to right, then from flags.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from epg_fast import config as configs
from epg_fast import distributed
from epg_fast.files import check_writable
from epg_fast.flags import parse, parse_known
from epg_fast.wording import nearest


def main(argv: list[str] | None = None) -> int:
    """Run one job. Returns the exit code: 0, 1 for a failure on the way, 2 for what the user has to mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        from epg_fast.environment import version

        print(version())
        return 0
    name, *rest = argv
    if name not in _JOBS:
        return _fail(2, f"unknown job {name!r}{nearest(name, _JOBS)}; jobs: {', '.join(_JOBS)}")
    job = _JOBS[name]
    try:
        _set_up_logging()
        job(name, rest)
        return 0
    except distributed.Interrupted as stop:
        return _fail(stop.code, str(stop))
    except (ValueError, ImportError) as error:
        if os.environ.get("EPG_DEBUG"):
            raise
        remedy = f"; pip install {error.name}" if str(error).startswith("No module named") else ""
        if isinstance(error, UnicodeEncodeError):
            remedy = "; set LC_ALL=C.UTF-8 or PYTHONUTF8=1, or rename a file whose name is not UTF-8"
        return _fail(2, f"{error}{remedy}")
    except (OSError, RuntimeError) as error:
        read_enough = isinstance(error, BrokenPipeError) and {"-h", "--help"} & {*rest}
        if read_enough or os.environ.get("EPG_DEBUG"):
            raise
        code = 2 if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG else 1
        return _fail(code, f"{error} (EPG_DEBUG=1 shows where)" if isinstance(error, RuntimeError) else str(error))
    except KeyboardInterrupt:
        return _fail(130, f"interrupted{job.after_interruption}")


def _train(config: configs.RunConfig, options: configs.DryRunConfig, stage: str) -> None:
    from epg_fast import training
    from epg_fast.training.loop import check_command

    stage_class = getattr(training, stage)
    if options.dry_run:
        from epg_fast.training.estimate import describe

        text = describe(config, stage_class, options)
        if distributed.is_main():
            print(text)
        return
    _tune_if_asked(config, stage_class, check_command)
    training.train(config, stage_class)


def _sample(config: configs.SampleConfig) -> None:
    from epg_fast.sampling.command import check_command, run

    _tune_if_asked(config, None, check_command)
    run(config)


def _tune_if_asked(config: configs.RunConfig | configs.SampleConfig, stage: type | None, check: Callable) -> None:
    """Make the plan of `--ops tune`, before anything is on the GPU, for a command that `check` does not refuse."""
    from epg_fast.plans import parse_ops

    if parse_ops(config.ops).base == "tune":
        from epg_fast.tuning import ensure_plan

        check(config)
        ensure_plan(config, stage)


def _app(config: configs.AppConfig) -> None:
    from epg_fast.app import run

    run(config)


def _sweep(config: configs.SweepConfig) -> None:
    from epg_fast.sweep import run

    run(config)


def _prepare_data(config: configs.PrepareDataConfig) -> None:
    from epg_fast.data import prepare_digits, prepare_folder, prepare_shards, verify_shards

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
        options = {name: getattr(config, name) for name in names}
        prepare_shards(config.source, config.outdir, config.image_size, **options)


def _tune(argv: list[str]) -> None:
    """Measure on this device what computes a job fastest, and keep it as a plan that the job then takes.

    argv: the flags of TuneConfig among those of the job to tune.
    """
    if {"-h", "--help"} & {*argv}:
        parse([configs.TuneConfig], ["--help"], "tune")
    options, rest = parse_known(configs.TuneConfig, argv)
    if options.job == "sample":
        stage, kind = None, configs.TunedSampleConfig
    else:
        from epg_fast import training

        job = _JOBS[options.job]
        stage, kind = getattr(training, job.run.keywords["stage"]), job.configs[0]
    (config,) = parse([kind], rest, f"tune --job {options.job}", network_only=stage is None)
    from epg_fast.tuning import tune

    tune(config, stage, options, getattr(config, "model", None))


def _evaluate(config: configs.EvaluateConfig) -> None:
    if config.protocol:
        from epg_fast.repeat import run
    else:
        from epg_fast.evaluation.command import run
    run(config)


def _export(config: configs.ExportConfig) -> None:
    from epg_fast.models import export

    for path in export(config.checkpoint, config.output, config.format):
        print(path)


def _reconstruct_ema(config: configs.ReconstructEmaConfig) -> None:
    from epg_fast.training.reconstruct import reconstruct_file

    print(reconstruct_file(config.run, config.output, config.sigma_rel, config.step, config.max_residual))


def _env() -> None:
    """Versions, devices, extension: paste this into bug reports."""
    from epg_fast.environment import report

    print(report())


class _Job(NamedTuple):
    run: Callable
    configs: tuple[type, ...] | None
    """What `run` takes; None: the words of the command line."""
    required: tuple[str, ...] = ()
    """Flags without which nothing can be done."""
    after_interruption: str = ""

    @property
    def summary(self) -> str:
        """The first sentence on what it does."""
        return (self.configs[0] if self.configs else self.run).__doc__.splitlines()[0].rstrip(".")

    def __call__(self, name: str, words: list[str]) -> None:
        """Do it. Raises ValueError for words that are not understood."""
        if self.configs is None:
            return self.run(words)
        found = parse(self.configs, words, name, about="" if self.configs else self.run.__doc__)
        for flag in self.required:
            if getattr(found[0], flag) in ("", None):
                raise ValueError(f"{flag} is missing; say it with --{flag}")
        return self.run(*found)


def _training(stage: str, config: type) -> _Job:
    again = "; the same command resumes from the last checkpoint"
    return _Job(partial(_train, stage=stage), (config, configs.DryRunConfig), after_interruption=again)


_JOBS = {
    "prepare-data": _Job(_prepare_data, (configs.PrepareDataConfig,), ("outdir",)),
    "pretrain": _training("PretrainStage", configs.PretrainConfig),
    "finetune-diffusion": _training("DiffusionStage", configs.DiffusionConfig),
    "finetune-consistency": _training("ConsistencyStage", configs.ConsistencyConfig),
    "sample": _Job(_sample, (configs.SampleConfig,)),
    "app": _Job(_app, (configs.AppConfig,), ("checkpoint",)),
    "sweep": _Job(_sweep, (configs.SweepConfig,)),
    "tune": _Job(_tune, None, after_interruption="; the same command goes on with what is measured"),
    "evaluate": _Job(_evaluate, (configs.EvaluateConfig,)),
    "export": _Job(_export, (configs.ExportConfig,), ("checkpoint", "output")),
    "reconstruct-ema": _Job(_reconstruct_ema, (configs.ReconstructEmaConfig,), ("run", "sigma_rel", "output")),
    "env": _Job(_env, ()),
}


def _usage() -> str:
    width = max(map(len, _JOBS))
    jobs = "\n".join(f"  {name:<{width}}  {job.summary}" for name, job in _JOBS.items())
    usage = "usage: epg-fast JOB [--config FILE_OR_RECIPE ...] [--flag value ...] | --version"
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
