"""A pipeline of diffusers around the sampling engine. Needs `pip install diffusers`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from epg_fast.config import GUIDANCE_INTERVAL
from epg_fast.models import EPGViT
from epg_fast.models.pretrained import save_pipeline
from epg_fast.sampling import SamplingEngine
from epg_fast.sampling.labels import class_indices

_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class EPGPipeline(DiffusionPipeline):
    """`EPGPipeline.from_pretrained(source)` draws images by class: `pipe(class_labels=[207, 360]).images`.

    source: the folder that `epg-fast export --format diffusers` writes, or anything else that
    `epg_fast.from_pretrained` takes. diffusers' own `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`
    makes the same of such a folder, or of a repository that holds one. `transformer` is an EPGViT;
    `to(torch.bfloat16)`, or `dtype` when loading, is the precision of its weights and products.
    """

    def __init__(self, transformer: EPGViT):
        super().__init__()
        self.register_modules(transformer=transformer)
        self._last: tuple[object, SamplingEngine] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options) -> EPGPipeline:
        """Pipeline of a folder, file or hub id; `options` are those of `epg_fast.from_pretrained`."""
        return cls(EPGViT.from_pretrained(pretrained_model_name_or_path, **options))

    def save_pretrained(self, save_directory: str | os.PathLike, **ignored) -> None:
        """Write the folder that `export --format diffusers` writes, in the place of an earlier one."""
        save_pipeline(self.transformer, save_directory)

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Upload that folder, with a model card; `options` are those of `EPGViT.push_to_hub`."""
        return self.transformer.push_to_hub(repo_id, pipeline=True, **options)

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        num_inference_steps: int = 32,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = GUIDANCE_INTERVAL,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **options,
    ) -> ImagePipelineOutput | tuple:
        """Images, as `epg_fast.sample(pipe.transformer, class_labels, ...)` draws them.

        class_labels: indices [N], or names where the checkpoint knows them; of an unconditional model, the number of
        images. num_inference_steps: noise levels (`steps`); heun makes two evaluations of each but the last.
        guidance_scale, guidance_interval: `guidance` and `interval`, in unshifted sigmas; a scale of 1 is unguided.
        generator: draws the starting noise as `randn_tensor` of diffusers does, float32 [N, 3, H, W] on its device;
        one per image in a list. seed: noise of image i as in `epg-fast sample --seed`, whatever N is. Without either
        the seed is drawn from PyTorch's own generator. output_type: "pil", "np" (float32 [N, H, W, 3]) or "pt"
        (float32 [N, 3, H, W]), in [0, 1] on the CPU. options: further ones of `SamplingEngine`, such as `sampler`,
        `precision`, `batch_size`, `compile="auto"` (which pays off after a few calls).
        Raises ValueError in one line for prompts, unknown classes and unknown options.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type {output_type!r}: want pil, np or pt")
        if generator is not None and seed is not None:
            raise ValueError("got a generator and a seed, want one of them")
        network, prompt = self.transformer, options.pop("prompt", None)
        labels = class_indices(network, class_labels if prompt is None else prompt)
        own = {"steps": num_inference_steps, "guidance": guidance_scale, "interval": tuple(guidance_interval)}
        engine = self._engine_of({"precision": _PRECISIONS.get(network.dtype, "fp32"), **options, **own})
        noise = None
        if generator is not None:
            number = labels if isinstance(labels, int) else len(labels)
            shape = (number, network.in_chans, network.image_size, network.image_size)
            first = generator[0] if isinstance(generator, list) else generator
            noise = randn_tensor(shape, generator=generator, device=first.device, dtype=torch.float32)
            seed = first.initial_seed() % 2**63  # of what some samplers add on the way
        elif seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        batches = engine.stream(labels, seed=seed, noise=noise, as_uint8=output_type == "pil")
        parts = [images for _, images in batches]
        if output_type == "pil":
            images = [Image.fromarray(image) for part in parts for image in part]
        else:
            images = torch.cat(parts)
            images = images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _engine_of(self, options: dict) -> SamplingEngine:
        """The engine of the last call, if it had these options and weights."""
        network = self.transformer
        weights = [(p.data_ptr(), p.dtype, p.is_inference() or p._version) for p in network.parameters()]
        key = (network, weights, dict(network.ops), options)
        if self._last is None or self._last[0] != key:
            self._last = None  # before another has memory
            options = {"compile": "off", "cuda_graphs": False} | options  # as `sample`: calls may be few
            self._last = key, SamplingEngine(network, **options)
        return self._last[1]
