"""The ladder of sampling: plain PyTorch, 16 bits, torch.compile, the package's engine, CUDA graphs, kernels, FP8.

Every variant has the same weights (random ones that leave images inside the range of colours), noise and labels, and is
timed from labels to images in host memory. Its error is that of the first images against the plain code in float32.
Peak memory is that of the variant with the float32 weights that it is made from.
"""

from __future__ import annotations

import math
from functools import cached_property, partial

import torch

from bench import measure, roofline
from bench.ladder import Ladder, NotHere, Ready, Variant, chosen, default_device
from bench.plain import PlainGenerator, Sampler, from_config
from epg_fast import SamplingEngine
from epg_fast.models import EPGViT, create_model, preset_config
from epg_fast.sampling import image_error
from epg_fast.tuning.workloads import lively

GUIDANCE, INTERVAL = 2.5, (0.19, 1.61)

_GRAPHS = {"compile": "blocks", "cuda_graphs": True, "ops": "plain"}
VARIANTS = (
    Variant("plain", "fp32", {"plain": None}),
    Variant("plain, 16 bits", "bf16", {"plain": None}, profiled=True),
    Variant("plain, torch.compile", "bf16", {"plain": "network"}),
    Variant("ours", "bf16", _GRAPHS | {"compile": "off", "cuda_graphs": False}),
    Variant("ours, compiled blocks", "bf16", _GRAPHS | {"cuda_graphs": False}),
    Variant("ours, blocks, CUDA graphs", "bf16", _GRAPHS, profiled=True),
    Variant("ours, Triton kernels, CUDA graphs", "bf16", _GRAPHS | {"ops": "triton"}),
    Variant("ours, planned", "bf16", {"ops": "auto"}, profiled=True),
    Variant("ours, FP8, CUDA graphs", "fp8", _GRAPHS, profiled=True),
    Variant("ours, FP8, Triton kernels, CUDA graphs", "fp8", _GRAPHS | {"ops": "triton"}),
    Variant("ours, extension's steps, CUDA graphs", "bf16", _GRAPHS | {"ops": "plain,steps=extension"}),
    Variant("ours, network, CUDA graphs", "bf16", _GRAPHS | {"compile": "network"}),  # compiles for minutes
)
ONE_STEP = tuple(variant for variant in VARIANTS if "steps" not in variant.options.get("ops", ""))


class Sampling(Ladder):
    """job: "sample-heun" (with interval guidance) or "sample-onestep"; compared: images."""

    def __init__(
        self,
        job: str = "sample-heun",
        preset: str = "epg_xl_16_256",
        batch: int = 64,
        *,
        steps: int = 32,
        seconds: float = 6.0,
        compared: int = 4,
        device: str | None = None,
        variants: list[str] | None = None,
    ):
        self.job, self.preset, self.images, self.heun = job, preset, batch, job == "sample-heun"
        self.steps = steps if self.heun else 1
        self.seconds, self.compared = seconds, min(compared, batch)
        self.device = torch.device(device or default_device())
        self.shape = f"{preset}, batch {batch}" + f", {steps} levels" * self.heun
        self.unit = "ms" if batch == 1 else "images/s"
        self.variants = chosen(VARIANTS if self.heun else ONE_STEP, variants)

    @cached_property
    def work(self) -> roofline.Work:
        return roofline.sampling(self.preset, self.images, self.steps, INTERVAL)

    @cached_property
    def model(self) -> EPGViT:
        """The weights of all variants, in float32 on the device."""
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
        """The first images by the plain code in float32."""
        return self.plain_sampler(None)(*(x[: self.compared] for x in self.start))

    def plain_sampler(self, dtype: torch.dtype | None) -> Sampler:
        """The plain code with the model's weights. dtype: of autocast, None for float32."""
        network = from_config(PlainGenerator, preset_config(self.preset)).to(self.device).eval()
        network.load_state_dict(self.model.state_dict(), strict=True)
        return Sampler(network, self.steps, dtype, GUIDANCE, INTERVAL)

    def prepare(self, variant: Variant) -> Ready:
        if "plain" in variant.options:
            return self._plain(variant)
        draw, notes = self._engine(variant)
        return Ready(partial(draw, *self.start), notes=notes, **self._errors(draw(*self.start)))  # draw compiles

    def _errors(self, images: torch.Tensor) -> dict:
        errors = image_error(images[: self.compared], self.reference)
        psnr = errors["psnr_db"] if math.isfinite(errors["psnr_db"]) else None
        return {"error": errors["relative_l2"], "details": {"psnr_db": psnr}}

    def _plain(self, variant: Variant) -> Ready:
        """A trajectory in part where all of it takes too long: its time is reckoned by its calls of the network."""
        sampler = self.plain_sampler(None if variant.dtype == "fp32" else torch.bfloat16)
        if variant.options["plain"] == "network":
            sampler.network.compile(dynamic=False)
        whole, errors = partial(sampler, *self.start), {"error": 0.0}
        if variant.dtype != "fp32":
            errors = self._errors(whole())
        if not self.heun:
            whole()
            return Ready(whole, **errors)
        one, intervals = partial(sampler, *self.start, sampler.part(1)), self.steps - 1
        one()
        affordable = int(self.seconds / 3 / measure.rounds(one, self.device, 0.0, least=1)[0])
        if affordable >= intervals:
            return Ready(whole, profiled=one, **errors)
        some = sampler.part(max(affordable, 1))
        calls, all_calls = sampler.network_calls(some), sampler.network_calls(sampler.levels)
        note = f"timed {len(some) - 1} of {intervals} intervals, {calls} of {all_calls} network calls"
        return Ready(partial(sampler, *self.start, some), scale=all_calls / calls, profiled=one, notes=[note], **errors)

    def _engine(self, variant: Variant) -> tuple:
        """(a call of noise and labels -> images, notes)."""
        options = variant.options
        if self.device.type != "cuda" and options.get("cuda_graphs"):
            raise NotHere("needs a CUDA device")
        engine = SamplingEngine(
            self.model,
            sampler="heun" if self.heun else "onestep",
            steps=self.steps,
            guidance=GUIDANCE if self.heun else 1.0,
            interval=INTERVAL,
            parameterization="x0" if self.heun else "edm",
            normalization="imagenet",
            batch_size=self.images,
            precision=variant.dtype,
            **options,
        )
        if options.get("ops") == "auto" and engine.chosen.plan is None:
            raise NotHere(engine.chosen.why)
        if engine.precision != variant.dtype:
            raise NotHere(f"this device has no {variant.dtype}; the engine computes in {engine.precision}")

        def draw(noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            images = engine(labels, noise=noise)
            if options.get("cuda_graphs") and not engine.cuda_graphs:
                raise RuntimeError("the engine could not record CUDA graphs, and says why in the log")
            return images

        return draw, ["planned"] if engine.chosen.plan and "ops" not in options else []
