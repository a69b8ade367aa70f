"""`--dry_run`: size, work, memory and time of a training job, from its configuration alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from epg_fast import distributed
from epg_fast.config import DryRunConfig, RunConfig
from epg_fast.distributed import Ranks
from epg_fast.models.blocks import is_recomputed
from epg_fast.plans import parse_ops
from epg_fast.runtime import autocast
from epg_fast.training.draws import Draws
from epg_fast.training.flops import GPUS, Gpu, StepFlops, gpu_named, gpu_of, step_flops
from epg_fast.training.gradients import check_batch_size, check_compilation
from epg_fast.training.stages import Stage, stage_without_files

_GIB = 2**30


class _AbsentRanks(Ranks):
    """A rank among others that are not there."""

    def gather(self, value):
        return [value] * self.world_size

    def gather_tensors(self, tensor):
        return lambda: tensor.detach().repeat(self.world_size, *[1] * (tensor.dim() - 1))


def planned_stage(config: RunConfig, stage_class: type[Stage], gpus: int) -> Stage:
    """The stage on the meta device, without the files it would load."""
    with torch.device("meta"):
        plain = dataclasses.replace(config, ops="plain", offload_ema=False)
        stage = stage_without_files(stage_class, plain, _AbsentRanks(0, gpus, torch.device("meta")))
    stage.config.offload_ema = config.offload_ema
    return stage


def total_flops(stage: Stage) -> int:
    """Operations of the whole run, those that activation checkpointing repeats included."""
    config = stage.config
    first, last = (step_flops(stage, step) for step in (0, config.steps - 1))
    early = min(config.steps, config.first_stage) if first != last else 0
    per_image = early * (first.total + first.recomputed) + (config.steps - early) * (last.total + last.recomputed)
    return per_image * config.batch_size


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Inside `with`: `bytes` of the distinct storages that autograd saves, without the `networks`' own tensors."""

    def __init__(self, *networks: torch.nn.Module):
        super().__init__(self._pack, lambda tensor: tensor)
        self.bytes = 0
        tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
        # Held, so that no address is used twice.
        self._seen = {t.untyped_storage()._cdata: t for t in tensors}

    def __enter__(self) -> SavedTensors:
        super().__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor
            self.bytes += storage.nbytes()
        return tensor


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank, autocast's 16-bit copies of the weights included."""

    plain: int
    """Saved for the backward pass without checkpointing."""
    checkpointed: int
    """Saved with it in all blocks, and what the largest block saves when it is computed again."""
    chosen: int
    """Saved with it in as many blocks as the run's configuration says."""


def activation_bytes(stage: Stage, images: int, step: int) -> Activations:
    """What the update at `step` keeps for `images` on one rank, by running its forward pass on shapes alone.

    stage: its networks are on the meta device, and are left as fake CPU tensors. Counted is plain PyTorch in the
    run's precision; what torch.compile and fused kernels save differs.
    """
    networks = [n for n in (stage.network, stage.ema, stage.perceptual) if n is not None]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in networks:
            network.to_empty(device="cpu")
        plain, blocks = _saved(stage, networks, images, step, share=0)
        kept = {0: plain}
        for share in {1, stage.network.use_checkpoint} - {0}:
            again = [size for i, size in blocks if is_recomputed(i, share)]
            kept[share] = _saved(stage, networks, images, step, share)[0] + max(again, default=0)
    return Activations(plain, kept[1], kept[stage.network.use_checkpoint])


def _saved(stage: Stage, networks: list, images: int, step: int, share: float) -> tuple[int, list[tuple[int, int]]]:
    """Bytes saved by a forward pass that computes a `share` of the blocks again, and (index, bytes) of each block."""
    network, size = stage.network, stage.network.image_size
    saved, before, found, hooks = SavedTensors(*networks), [], [], []
    for i, block in enumerate(network.all_blocks):
        hooks.append(block.register_forward_pre_hook(lambda *_: before.append(saved.bytes)))
        hooks.append(block.register_forward_hook(lambda *_, i=i: found.append((i, saved.bytes - before.pop()))))
    batch = {name: torch.empty(images, 3, size, size) for name in ("x", "view1", "view2")}
    batch["label"] = torch.empty(images, dtype=torch.int64)
    wanted, network.use_checkpoint = network.use_checkpoint, share
    with saved, autocast(torch.device("cpu"), stage.config.precision):
        stage.loss(batch, Draws(0, step, 0, images, torch.device("cpu")), step)
    network.use_checkpoint = wanted
    for hook in hooks:
        hook.remove()
    return saved.bytes, found


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    """Of the trained network and of a frozen one, with their buffers."""
    gradients: int
    """On several GPUs DistributedDataParallel sums them where they are."""
    moments: int
    """AdamW's two."""
    ema: int
    gathered: int
    """With sharding, what is whole for a time: see `_gathered`."""
    in_host_memory: int
    """Not on the GPU: the EMA of `offload_ema` and the pinned copy of the weights that they are updated from."""
    activations: Activations

    def total(self, kept: int) -> int:
        """All that is on the GPU, with one of the `activations`."""
        return self.weights + self.gradients + self.moments + self.ema + self.gathered + kept


def memory_per_gpu(stage: Stage, gpus: int) -> Memory:
    """What one GPU holds, the first if the shards are uneven.

    With `ddp` only the activations depend on how many GPUs there are.
    """
    config, network, perceptual = stage.config, stage.network, stage.perceptual
    sharded = config.parallelism == "fsdp"
    shards = gpus if sharded else 1
    trained = sum(_bytes(p, shards) for p in network.parameters() if p.requires_grad)
    emas = 1 + len(config.posthoc_ema.sigma_rel or ())
    offloaded = emas - stage.calls_ema if config.offload_ema else 0
    # torch's allocator of pinned memory rounds up to powers of two
    pinned = sum(1 << (_bytes(p) - 1).bit_length() for p in network.parameters())
    micro_batch = config.batch_size // gpus // config.gradient_accumulation
    return Memory(
        weights=_size(network, shards) + (0 if perceptual is None else _size(perceptual)),
        gradients=trained,
        moments=2 * trained,
        ema=_size(stage.ema, shards) * (emas - offloaded),
        gathered=_gathered(network) if sharded else 0,
        in_host_memory=_size(stage.ema) * offloaded + (pinned if offloaded else 0),
        activations=activation_bytes(stage, micro_batch, config.steps - 1),
    )


def _gathered(network: torch.nn.Module) -> int:
    """Weights and gradients outside the blocks, and of two blocks: one that is computed and one that comes or goes."""
    sizes = [sum(map(_bytes, block.parameters())) for block in network.all_blocks]
    outside = sum(map(_bytes, network.parameters())) - sum(sizes)
    return 2 * (outside + 2 * max(sizes))


def _bytes(tensor: torch.Tensor, shards: int = 1) -> int:
    """Bytes of the first of `shards` along the first axis."""
    if shards == 1:
        return tensor.numel() * tensor.element_size()
    return -(-tensor.shape[0] // shards) * tensor[0].numel() * tensor.element_size()


def _size(network: torch.nn.Module, shards: int = 1) -> int:
    return sum(_bytes(p, shards) for p in network.parameters()) + sum(map(_bytes, network.buffers()))


def describe(config: RunConfig, stage_class: type[Stage], options: DryRunConfig) -> str:
    """A summary of the job, for people. Networks are made without memory; no data and no run folder is touched.

    Raises ValueError for a model that cannot be, for a batch that does not divide over the GPUs, for CUDA graphs where
    they cannot be, for an unknown GPU and for ops that do not exist.
    """
    world_size = distributed.number("WORLD_SIZE", 0)
    gpus, origin = (world_size, "torchrun's") if world_size else (8, "assumed; --gpus says how many")
    if options.gpus is not None:
        gpus, origin = options.gpus, "--gpus"
    check_batch_size(config, gpus)
    check_compilation(config, Ranks(0, gpus, torch.device("cuda")))
    parse_ops(config.ops)
    here = gpu_of(torch.device("cuda")) if torch.cuda.is_available() and not options.gpu else None
    gpu, why = here or gpu_named(options.gpu or "H200"), "the GPU of this machine; " if here else ""
    stage = planned_stage(config, stage_class, gpus)
    network, first, last = stage.network, *(step_flops(stage, step) for step in (0, config.steps - 1))
    shape = f"{network.image_size} x {network.image_size} pixels in patches of {network.patch_size}"
    micro_batches = config.gradient_accumulation
    several = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
    share = f"{gpus} GPU{'s' * (gpus > 1)} x {config.batch_size // gpus}{several}"
    later = "" if first == last else f" from step {config.first_stage:,} on, less before"
    rows = [
        ("model", f"{config.model.preset}, {shape}: {network.extras + network.num_patches} tokens"),
        ("parameters", _parameters(stage)),
        ("batch", f"{config.batch_size} images = {share} ({origin})"),
        ("steps", f"{config.steps:,} = {config.steps * config.batch_size:,} images"),
        ("FLOPs per image", _per_image(last)),
        ("FLOPs per step", f"{_si(last.total * config.batch_size)}FLOP{later}"),
        ("memory per GPU", "an estimate, in GiB"),
        *_memory_rows(memory_per_gpu(stage, gpus), config),
        ("duration", _duration(stage, gpus, gpu, options.utilization)),
        ("", f"{why}--gpu takes {', '.join(gpu.name for gpu in GPUS)}"),
        *([("", "FP8 is left out of the reckoning: time and memory are those of 16 bits")] if config.fp8 else []),
        *_inputs(config),
    ]
    lines = [f"{name:<19}{text}" for name, text in rows]
    return "\n".join([f"epg-fast {stage.name}: dry run; no data, GPU or run folder is touched", "", *lines])


def _parameters(stage: Stage) -> str:
    encoder = ("patch_embed.", "pos_embed", "cls_token", "blocks.", "norm.")
    sizes = {name: p.numel() for name, p in stage.network.named_parameters()}
    total, trunk = sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith(encoder))
    rest = "projection head" if stage.name == "pretrain" else "decoder and class embedding"
    return f"{total / 1e6:.1f} M (encoder {trunk / 1e6:.1f} M, {rest} {(total - trunk) / 1e6:.1f} M)"


def _per_image(flops: StepFlops) -> str:
    items = [f"forward {_si(flops.forward)}", f"backward {_si(flops.backward)}"]
    if flops.without_gradient:
        items.append(f"without gradient {_si(flops.without_gradient)}")
    if flops.recomputed:
        items.append(f"and {_si(flops.recomputed)} again for less memory")
    return f"{_si(flops.total)}FLOP ({', '.join(item.strip() for item in items)})"


def _memory_rows(memory: Memory, config: RunConfig) -> list[tuple[str, str]]:
    saved, on = memory.activations, config.activation_checkpointing
    kept, otherwise = saved.chosen, saved.plain if on else saved.checkpointed
    switch = f"with --activation_checkpointing {'false' if on else 'true'}"
    float32 = "float32" + ", this GPU's shard" * (config.parallelism == "fsdp")
    items = [
        ("weights", memory.weights, float32),
        ("gradients", memory.gradients, float32),
        ("AdamW moments", memory.moments, float32),
        ("EMA", memory.ema, float32),
        ("whole for a time", memory.gathered, "weights and gradients outside the blocks and of two blocks"),
        ("activations", kept, f"{otherwise / _GIB:.1f} {switch}"),
        ("sum", memory.total(kept), f"{memory.total(otherwise) / _GIB:.1f} {switch}"),
        ("in host memory", memory.in_host_memory, "EMA and a pinned copy of the weights, of rank 0"),
    ]
    rows = [(f"  {name}", f"{size / _GIB:6.1f}   {text}") for name, size, text in items if size]
    notes = (
        "Activations: what autograd keeps of plain PyTorch, 16-bit copies of weights included,",
        "counted on shapes; torch.compile and fused kernels keep other tensors. Not counted:",
        "workspaces, fragmentation, batches in flight, NCCL, the CUDA context.",
    )
    return [*rows, *(("", note) for note in notes)]


def _duration(stage: Stage, gpus: int, gpu: Gpu, utilization: float) -> str:
    peak, dtype = gpu.peak(stage.config.precision)
    hours = total_flops(stage) / (gpus * peak * utilization) / 3600
    time = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.2g} minutes"
    time = f"{hours / 24:.1f} days" if hours >= 48 else time
    return (
        f"{time} on {gpus} x {gpu.name} at an assumed {utilization:.0%} of the nominal {dtype} peak "
        f"of {peak / 1e12:.4g} TFLOP/s; nothing measured"
    )


def _inputs(config: RunConfig) -> list[tuple[str, str]]:
    """What a run would lack."""
    rows = []
    for name, value, remedy in (
        ("data.path", config.data.path, "epg-fast prepare-data"),
        ("init_from", getattr(config, "init_from", ""), "the run folder of the stage before"),
        ("perceptual", getattr(config, "perceptual", ""), "the run folder of stage 1"),
    ):
        if value and not any(Path(value).parent.glob(Path(value).name)):  # which may be a pattern
            rows.append(("missing", f"{name} {value}: {remedy} makes it"))
        elif not value and name == "data.path":
            rows.append(("missing", "data.path: say with --data.path where the images are"))
        elif value is None:
            without = "weights start fresh" if name == "init_from" else "no auxiliary loss"
            rows.append(("not given", f"{name}: {without}"))
    if not config.outdir:
        rows.append(("missing", "outdir: name a run folder with --outdir"))
    return rows


def _si(number: float) -> str:
    for exponent, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if number >= 10**exponent:
            return f"{number / 10**exponent:.3g} {prefix}"
    return f"{number:.3g} "
