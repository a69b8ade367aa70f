"""The least time that the networks and their jobs can take, operation by operation.

    python -m bench.roofline                                              # EPG-XL/16, batch 64, a nominal H200
    python -m bench.roofline --preset epg_l_16_256 --batch 128 --gpu H100

A job is a list of the operations that `epg_fast.models.work` finds in its networks and `epg_fast.training.flops` in an
update, and of the steps of samplers and optimisers. A floor is the longer of an operation's products and bytes at the
ceilings. Mixing in guidance and the host are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from bench.ledger.cost import ELEMENTWISE, OPTIMISER
from bench.measure import Ceilings
from bench.results import markdown_table, significant
from epg_fast import config as configs
from epg_fast import training
from epg_fast.diffusion import NoiseSchedule
from epg_fast.models import EPGViT, create_model
from epg_fast.models.work import Operation, generator, spec
from epg_fast.training.estimate import planned_stage
from epg_fast.training.flops import GPUS, gpu_named
from epg_fast.training.flops import update as operations_of
from epg_fast.training.stages import Stage

STAGES = {"pretrain": "Pretrain", "finetune-diffusion": "Diffusion", "finetune-consistency": "Consistency"}
"""Training jobs, and what the names of their classes begin with."""


@dataclass(frozen=True)
class Op:
    """`times` calls of one operation; flops (of matrix products) and bytes are those of one call."""

    name: str
    kind: str
    """One of the ledger's."""
    shape: tuple[int, ...]
    flops: int
    bytes: int
    direction: str = "forward"
    times: int = 1

    def floor(self, ceilings: Ceilings) -> float:
        """Least seconds of all calls."""
        return self.times * ceilings.floor(self.flops, self.bytes)


@dataclass(frozen=True)
class Work:
    """The operations of a job, which makes or learns from `images` images."""

    images: int
    ops: tuple[Op, ...]

    @property
    def flops(self) -> int:
        return sum(op.times * op.flops for op in self.ops)

    @property
    def bytes(self) -> int:
        return sum(op.times * op.bytes for op in self.ops)

    def floor(self, ceilings: Ceilings) -> float:
        """Least seconds: the operations' after one another."""
        return sum(op.floor(ceilings) for op in self.ops)


def _forward(operations: list[Operation], times: int = 1) -> list[Op]:
    return [Op(o.name, o.kind, o.shape, o.flops, o.moved, times=times) for o in operations]


def _work(images: int, ops: Iterable[Op]) -> Work:
    """Equal operations are one, called more often."""
    times: Counter[Op] = Counter()
    for op in ops:
        times[replace(op, times=1)] += op.times
    return Work(images, tuple(replace(op, times=n) for op, n in times.items()))


def forward(network: EPGViT, batch: int) -> Work:
    """One call of the generator."""
    return _work(batch, _forward(generator(network, batch)))


def heun(network: EPGViT, batch: int, steps: int = 32, interval: tuple[float, float] = (0.19, 1.61)) -> Work:
    """Heun's method at `steps` levels; in the unshifted interval both calls of guidance are one of twice the batch."""
    levels = NoiseSchedule(steps).sigmas().tolist()
    evaluations = [sigma for pair in zip(levels, levels[1:], strict=False) for sigma in pair]
    guided = sum(interval[0] < sigma <= interval[1] for sigma in evaluations)
    ops = []
    for images, times in ((batch, len(evaluations) - guided), (2 * batch, guided)):
        ops += _forward(generator(network, images), times)
    pixels = (batch, network.in_chans, network.image_size, network.image_size)
    for name in ("euler_step", "heun_step"):
        ops.append(Op(name, ELEMENTWISE, pixels, 0, spec(name).bytes(pixels, 4), times=steps - 1))
    return _work(batch, ops)


def sampling(preset: str, batch: int, steps: int = 1, interval: tuple[float, float] = (0.19, 1.61)) -> Work:
    """A batch of images: one call of the generator, or Heun's method at `steps` levels."""
    with torch.device("meta"):
        network = create_model(preset)
    return forward(network, batch) if steps == 1 else heun(network, batch, steps, interval)


def update_of(stage: Stage) -> Work:
    """The last of a stage's updates on one GPU, without accumulation or checkpointing; consistency's at its end."""
    found = operations_of(stage, stage.config.steps - 1)
    ops = _forward(found.trained + found.without_gradient + found.frozen)
    ops += [Op(o.name, o.kind, o.shape, o.weights + o.inputs, o.moved_back, "backward") for o in found.trained]
    for o in found.frozen:  # without gradients of parameters a product moves what its forward pass moved
        ops.append(Op(o.name, o.kind, o.shape, o.inputs, o.moved if o.weights else o.moved_back, "backward"))
    parameters = (1, sum(p.numel() for p in stage.network.parameters()))
    for name in ("global_norm", "fused_adamw_ema"):  # the norm of the gradients, AdamW and one EMA in float32
        ops.append(Op(name, OPTIMISER, parameters, 0, spec(name).bytes(parameters, 4), "update"))
    return _work(stage.config.batch_size, ops)


def update(job: str, preset: str, batch: int) -> Work:
    """An update of the training job by fused blocks, consistency training with its frozen encoder."""
    options = {"perceptual": "the preset's own"} if job == "finetune-consistency" else {}
    name = STAGES[job]
    model = configs.ModelConfig(preset)
    config = getattr(configs, f"{name}Config")(model=model, batch_size=batch, **options)
    stage = planned_stage(config, getattr(training, f"{name}Stage"), 1)
    for network in filter(None, (stage.network, stage.ema, getattr(stage, "perceptual", None))):
        network.use_ops("triton")
    return update_of(stage)


def jobs_of(preset: str, batch: int) -> dict[str, Work]:
    """All of a preset's jobs. Raises ValueError for an unknown preset."""
    jobs = {"forward (sample-onestep)": sampling(preset, batch), "sample-heun": sampling(preset, batch, 32)}
    return jobs | {job: update(job, preset, batch) for job in STAGES}


def nominal(name: str) -> Ceilings:
    """Of a datasheet. Raises ValueError for a GPU whose figures are not known."""
    gpu = gpu_named(name)
    if gpu.bandwidth is None:
        known = ", ".join(gpu.name for gpu in GPUS if gpu.bandwidth)
        raise ValueError(f"gpu {gpu.name}: its nominal memory bandwidth is not known; known: {known}")
    return Ceilings(gpu.bf16 * 1e12, gpu.bandwidth * 1e12)


def summary(jobs: dict[str, Work], ceilings: Ceilings) -> str:
    """A row per job."""
    rows = []
    for name, work in jobs.items():
        floor, products = work.floor(ceilings), work.flops / ceilings.products
        per_image = work.flops / work.images / 1e12, work.bytes / work.images / 1e9
        numbers = (*per_image, 1e3 * floor, work.images / floor, work.images / products)
        rows.append((name, *map(significant, numbers), f"{100 * products / floor:.0f}%"))
    columns = ("job", "TFLOP/image", "GB/image", "floor, ms", "images/s at most", "products alone, images/s")
    return markdown_table((*columns, "products' share"), rows)


def breakdown(work: Work, ceilings: Ceilings) -> str:
    """A row per operation, the largest first."""
    total, rows = work.floor(ceilings), []
    for op in sorted(work.ops, key=lambda op: -op.floor(ceilings)):
        floor = op.floor(ceilings)
        by_products = op.flops / ceilings.products > op.bytes / ceilings.memory
        gflop = significant(op.flops / 1e9) if op.flops else ""
        numbers = op.times, gflop, significant(op.bytes / 1e6), "products" if by_products else "memory"
        times = significant(1e6 * floor / op.times), significant(1e3 * floor), f"{100 * floor / total:.1f}%"
        rows.append((op.name, op.direction, " x ".join(map(str, op.shape)), *numbers, *times))
    columns = ("operation", "direction", "shape", "calls", "GFLOP", "MB", "bound by", "floor, us")
    return markdown_table((*columns, "all calls, ms", "share"), rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="epg_xl_16_256")
    parser.add_argument("--batch", type=int, default=64, help="images per call and per update (default: 64)")
    parser.add_argument("--gpu", default="H200", help=f"of {', '.join(g.name for g in GPUS)} (default: H200)")
    options = parser.parse_args(arguments)
    try:
        if options.batch < 1:
            raise ValueError(f"batch {options.batch}: wanted 1 or more images")
        ceilings, jobs = nominal(options.gpu), jobs_of(options.preset, options.batch)
    except ValueError as error:
        print(f"bench.roofline: {error}", file=sys.stderr)
        return 2
    print(
        f"# Roofline of {options.preset}, batch {options.batch}\n\n"
        f"Derived, nothing measured: ceilings are those of the {options.gpu}'s datasheet, "
        f"{significant(ceilings.products / 1e12)} TFLOP/s and {significant(ceilings.memory / 1e12)} TB/s.\n\n"
        f"{summary(jobs, ceilings)}"
    )
    for name, work in jobs.items():
        print(f"## {name}\n\n{breakdown(work, ceilings)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
