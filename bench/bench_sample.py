"""The ladder of sampling: plain PyTorch, 16 bits, torch.compile, the package's engine, CUDA graphs, kernels, FP8.

    python -m bench.bench_sample --output FOLDER                                      # EPG-XL/16, Heun, batch 64
    python -m bench.bench_sample --preset epg_l_16_256 --job onestep --batch 1 --output FOLDER

Every rung has the same weights (random ones that leave images inside the range of colours, or a checkpoint's), noise
and labels, and is timed from labels to images in host memory. Its error is that of the first images against the plain
rung in float32. Peak memory is that of the rung with the float32 weights that it is made from. The same command with
the same folder goes on with what is missing in its sampling.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import torch

from bench import measure, parts, plain
from bench.kernel_classes import split
from bench.ladder import Ladder, NotHere, Rung, chosen, climb, default_device, open_results
from bench.plain.sampling import Sampler
from bench.results import Row, header
from bench.tables import in_order, ladder_table
from epg_fast import SamplingEngine, from_pretrained
from epg_fast.models import EPGViT, create_model, preset_config
from epg_fast.sampling import image_error

GUIDANCE, INTERVAL = 2.5, (0.19, 1.61)

_GRAPHS = {"compile": "blocks", "cuda_graphs": True}
RUNGS = (
    Rung("plain", "fp32", {"plain": True}),
    Rung("plain, 16 bits", "bf16", {"plain": True}, profiled=True),
    Rung("plain, torch.compile", "bf16", {"plain": True, "compile": "network"}),
    Rung("ours", "bf16", {"compile": "off", "cuda_graphs": False}),
    Rung("ours, compiled blocks", "bf16", {"compile": "blocks", "cuda_graphs": False}),
    Rung("ours, blocks, CUDA graphs", "bf16", _GRAPHS, profiled=True),
    Rung("ours, network, CUDA graphs", "bf16", {"compile": "network", "cuda_graphs": True}, later=True),
    Rung("ours, Triton kernels, CUDA graphs", "bf16", _GRAPHS | {"ops": "triton"}),
    Rung("ours, extension's steps, CUDA graphs", "bf16", _GRAPHS | {"ops": "plain,steps=extension"}, later=True),
    Rung("ours, planned", "bf16", {"compile": "auto", "cuda_graphs": None, "ops": "auto"}, profiled=True),
    Rung("ours, FP8, CUDA graphs", "fp8", _GRAPHS, profiled=True),
    Rung("ours, FP8, Triton kernels, CUDA graphs", "fp8", _GRAPHS | {"ops": "triton"}),
)


@torch.no_grad()
def lively(network: EPGViT) -> EPGViT:
    """Give a fresh network an output, a condition that matters and gates that are open, in place.

    Fresh ones are zero (SPEC 3), and nothing of a network's error would reach the image. Pixels end up with a standard
    deviation of about 0.5 in the network's range.
    """
    width = network.out.in_features
    torch.nn.init.normal_(network.out.weight, std=0.5 / math.sqrt(width))
    torch.nn.init.normal_(network.class_embed.weight, std=0.5)
    for block in network.decoder_blocks:
        projection = block.adaLN_modulation[-1]
        torch.nn.init.normal_(projection.weight, std=0.5 / math.sqrt(projection.in_features))
    return network


class Sampling(Ladder):
    """kind: "heun" (with interval guidance) or "onestep"; seconds: of a rung's repetitions; compared: images."""

    def __init__(
        self,
        preset: str = "epg_xl_16_256",
        kind: str = "heun",
        batch: int = 64,
        *,
        steps: int = 32,
        checkpoint: str | None = None,
        seconds: float = 6.0,
        compared: int = 4,
        device: str | None = None,
        threads: int = 1,
        rungs: list[str] | None = None,
    ):
        self.preset, self.kind, self.images, self.checkpoint = preset, kind, batch, checkpoint
        self.steps = 1 if kind == "onestep" else steps
        self.seconds, self.compared, self.threads = seconds, min(compared, batch), threads
        self.device = torch.device(device or default_device())
        self.job, self.shape = f"sample-{kind}", f"{preset}, batch {batch}" + f", {steps} levels" * (kind == "heun")
        self.unit = "ms" if batch == 1 else "images/s"
        self.rungs = chosen(RUNGS, rungs)

    @cached_property
    def plan(self) -> parts.Job:
        with torch.device("meta"):
            network = create_model(self.preset)
        if self.kind == "onestep":
            return parts.onestep(network, self.images)
        return parts.heun(network, self.images, self.steps, INTERVAL)

    @cached_property
    def model(self) -> EPGViT:
        """The weights of all rungs, in float32 on the device."""
        if self.checkpoint:
            return from_pretrained(self.checkpoint, device=str(self.device))
        torch.manual_seed(0)
        with self.device:
            return lively(create_model(self.preset)).eval()

    @cached_property
    def start(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise of unit variance [B, C, H, W] on the device, and labels [B] in host memory."""
        generator, model = torch.Generator().manual_seed(1), self.model
        shape = (self.images, model.in_chans, model.image_size, model.image_size)
        noise = torch.randn(shape, generator=generator)
        return noise.to(self.device), torch.randint(model.num_classes, shape[:1], generator=generator)

    @cached_property
    def reference(self) -> torch.Tensor:
        """The first images by the plain rung in float32."""
        return self.plain_sampler(None)(*(x[: self.compared] for x in self.start))

    def measure(self, rung: Rung) -> Row:
        _ = self.reference, self.ceilings  # neither in the peak nor in the time
        left = measure.start_afresh(self.device)
        draw = self._plain(rung) if "plain" in rung.options else self._ours(rung)
        error, details, notes = 0.0, {}, []
        if rung.dtype == "fp32":
            notes.append("what errors are measured against")
        else:
            images = draw(*self.start)[: self.compared]  # compiles, and warms up
            errors = image_error(images, self.reference)
            error = errors["relative_l2"]
            details["psnr_db"] = errors["psnr_db"] if math.isfinite(errors["psnr_db"]) else None
        if isinstance(draw, Sampler):
            timed, profiled, part = self._timed_in_part(draw)
            notes += part
        else:
            profiled = partial(draw, *self.start)
            timed = measure.rounds(profiled, self.device, self.seconds)
        row = self.row(rung, timed, error, "; ".join(notes), allocated_before=left, compared=self.compared, **details)
        if rung.profiled:
            typical = measure.percentiles(measure.rounds(profiled, self.device, 0.0))[1]
            what = "one interval" if isinstance(draw, Sampler) and self.steps > 1 else "a batch"
            row.details["split"] = {"of": what} | split(profiled, self.device, typical).as_json()
        return row

    def plain_sampler(self, dtype: torch.dtype | None) -> Sampler:
        """The plain code with the model's weights. dtype: of autocast, None for float32."""
        network = plain.from_config(plain.PlainGenerator, preset_config(self.preset)).to(self.device).eval()
        network.load_state_dict(self.model.state_dict(), strict=True)
        return Sampler(network, self.steps, dtype, GUIDANCE, INTERVAL)

    def _plain(self, rung: Rung) -> Sampler:
        sampler = self.plain_sampler(None if rung.dtype == "fp32" else torch.bfloat16)
        if "compile" in rung.options:
            sampler.network.compile(dynamic=False)
        return sampler

    def _timed_in_part(self, sampler: Sampler) -> tuple[list[float], Callable, list[str]]:
        """(seconds of whole trajectories, a call of one interval, notes); some intervals only where all take too long.

        A trajectory's time is then reckoned by its calls of the network, which is nearly all of it.
        """
        if self.steps == 1:
            whole = partial(sampler, *self.start)
            whole()
            return measure.rounds(whole, self.device, self.seconds), whole, []
        one = partial(sampler, *self.start, sampler.part(1))
        one()
        intervals = self.steps - 1
        affordable = int(self.seconds / 3 / measure.rounds(one, self.device, 0.0, least=1)[0])
        if affordable >= intervals:
            return measure.rounds(partial(sampler, *self.start), self.device, self.seconds), one, []
        some = sampler.part(max(affordable, 1))
        calls, all_calls = sampler.network_calls(some), sampler.network_calls(sampler.levels)
        timed = measure.rounds(partial(sampler, *self.start, some), self.device, self.seconds)
        note = f"timed {len(some) - 1} of {intervals} intervals, {calls} of {all_calls} network calls"
        return [seconds * all_calls / calls for seconds in timed], one, [note]

    def _ours(self, rung: Rung) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        options = {"compile": rung.options["compile"], "cuda_graphs": rung.options["cuda_graphs"]}
        options["ops"] = rung.options.get("ops", "plain")
        if "steps" in options["ops"] and self.kind == "onestep":
            raise NotHere("one step has no step of a sampler")
        if self.device.type != "cuda" and options["cuda_graphs"]:
            raise NotHere("needs a CUDA device")
        engine = SamplingEngine(
            self.model,
            sampler=self.kind,
            steps=self.steps,
            guidance=GUIDANCE if self.kind == "heun" else 1.0,
            interval=INTERVAL,
            parameterization="x0" if self.kind == "heun" else "edm",
            normalization="imagenet",
            batch_size=self.images,
            precision=rung.dtype,
            **options,
        )
        if options["ops"] == "auto" and engine.chosen.plan is None:
            raise NotHere(engine.chosen.why)
        if engine.precision != rung.dtype:
            raise NotHere(f"this device has no {rung.dtype}; the engine computes in {engine.precision}")

        def draw(noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            images = engine(labels, noise=noise)
            if options["cuda_graphs"] and not engine.cuda_graphs:
                raise RuntimeError("the engine could not record CUDA graphs, and says why in the log")
            return images

        return draw


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_sample", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="epg_xl_16_256")
    parser.add_argument("--job", choices=["heun", "onestep"], default="heun")
    parser.add_argument("--batch", type=int, default=64, help="images per batch; of 1 the latency is reported")
    parser.add_argument("--steps", type=int, default=32, help="levels of Heun's method")
    parser.add_argument("--checkpoint", help="weights of this preset, where random ones will not do")
    parser.add_argument("--rungs", nargs="+", help=f"some of: {'; '.join(rung.name for rung in RUNGS)}")
    parser.add_argument("--seconds", type=float, default=6.0, help="of repetitions per rung (default: 6)")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for all (default: 540)")
    parser.add_argument("--rung_limit", type=float, default=150.0, help="seconds for a rung (default: 150)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's on a CPU (default: 1)")
    parser.add_argument("--output", type=Path, required=True, help="folder of sampling.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        ladder = Sampling(
            options.preset,
            options.job,
            options.batch,
            steps=options.steps,
            checkpoint=options.checkpoint,
            seconds=options.seconds,
            threads=options.threads,
            rungs=options.rungs,
        )
        _ = ladder.plan  # an unknown preset
        found = open_results(options.output / "sampling.json", header())
    except ValueError as error:
        print(f"bench.bench_sample: {error}", file=sys.stderr)
        return 2
    done = climb(ladder, found, limit=options.limit, rung_limit=options.rung_limit)
    rows = [row for row in found.rows if (row.job, row.shape) == (ladder.job, ladder.shape)]
    print(ladder_table(in_order(rows, [rung.name for rung in RUNGS])))
    return 0 if done else 3


if __name__ == "__main__":
    raise SystemExit(main())
