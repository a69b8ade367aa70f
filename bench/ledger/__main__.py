"""Which kernels a Hopper GPU would be given, and the least time they take, counted on any machine.

    python -m bench.ledger --output FOLDER                            # everything: README.md, ledger.json, ledger.png
    python -m bench.ledger --job sample_xl --variant ours-blocks      # one job, one way
    python -m bench.ledger --job sample_xl --variant ours-blocks --kernels

Wants a CUDA build of PyTorch, Triton and a C compiler, and no GPU: `make ledger` makes such an environment. With the
same folder the same command goes on with what is missing; what is there is not counted again.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from bench.ledger import device


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        device.preload(arguments)
        device.prepare()
        return _count(options)
    except ValueError as error:
        print(f"bench.ledger: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=__doc__.splitlines()[0])
    parser.add_argument("--job", nargs="+", help="some of the jobs (default: all); a wrong name lists them")
    parser.add_argument("--variant", nargs="+", help="some of the ways to do them (default: all); likewise")
    parser.add_argument("--kernels", action="store_true", help="list every kernel of each count")
    parser.add_argument("--resources", action="store_true", help="compile the package's Triton kernels for sm_90")
    parser.add_argument("--output", type=Path, help="folder for README.md, ledger.json and ledger.png")
    return parser


def _count(options: argparse.Namespace) -> int:
    # only here, where the GPU is there to be seen
    from bench.ledger import jobs, report

    warnings.filterwarnings("ignore", message=".*force_disable_caches.*")
    chosen = _named("job", jobs.JOBS, options.job)
    variants = _named("variant", jobs.VARIANTS, options.variant)
    return report.run(chosen, variants, options.output, kernels=options.kernels, resources=options.resources)


def _named(what: str, known: dict, names: list[str] | None) -> list:
    for name in names or ():
        if name not in known:
            raise ValueError(f"{what} {name!r}: want some of {', '.join(known)}")
    return [value for name, value in known.items() if names is None or name in names]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
