"""Typed configuration of every job. The defaults are the released settings for ImageNet-256.

The command line (`epg_fast.__main__`) builds its flags from these dataclasses; the text under each field is its help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Literal, get_args

Sampler = Literal["heun", "euler", "onestep", "euler_sde", "euler_ancestral", "edm_sde"]
"""The samplers of `epg_fast.diffusion`."""
CHURN = ("s_churn", "s_min", "s_max", "s_noise")
"""Options of the sampler edm_sde; no other sampler has any."""


def _check(config, low: float, high: float, *names: str) -> None:
    """Raise ValueError unless low <= value <= high (and the value is finite) for every named field that is not None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            limits = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"{name} is {value}, want {limits}")


def _check_positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}, want a positive number")


def _check_finite(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not all(map(math.isfinite, value if isinstance(value, (list, tuple)) else [value])):
            raise ValueError(f"{name} is {value}, want a finite number")


def _check_interval(config, name: str) -> None:
    low, high = getattr(config, name)
    if not low <= high:
        raise ValueError(f"{name} is ({low}, {high}), want low <= high")


def check_sampler(sampler: str, steps: int, **options: float) -> None:
    """Raise ValueError unless there is such a sampler, with so many noise levels and with these options."""
    if sampler not in get_args(Sampler):
        raise ValueError(f"sampler {sampler!r}: want one of {', '.join(get_args(Sampler))}")
    least = 1 if sampler == "onestep" else 2
    if not isinstance(steps, Integral) or steps < least:
        raise ValueError(f"steps is {steps!r}, want an integer: {sampler} needs at least {least} noise levels")
    for name, value in options.items():
        if sampler != "edm_sde" or name not in CHURN:
            raise ValueError(f"{name} is {value}: no option of {sampler}; edm_sde has {', '.join(CHURN)}")
        if not 0 <= value <= math.inf or (value == math.inf and name != "s_max"):
            raise ValueError(f"{name} is {value}, want at least 0")
    low, high = options.get("s_min", 0.0), options.get("s_max", math.inf)
    if low > high:
        raise ValueError(f"s_max is {high}, want at least s_min ({low})")


def check_sigma_rel(value: float) -> None:
    """Raise ValueError for a relative width that no power-function average has."""
    # 12^-1/2 is the width of the uniform average (gamma = 0).
    if not 0 < value < 12**-0.5:
        raise ValueError(f"sigma_rel is {value}, want more than 0 and less than {12**-0.5:.4f} (all steps alike)")


@dataclass
class ModelConfig:
    """A preset of `epg_fast/configs/models` and what to change in it; `null` keeps the preset's value."""

    preset: str = "epg_xl_16_256"
    """Name of a preset (`epg_fast.list_presets()`)."""
    image_size: int | None = None
    """Image height and width in pixels; a multiple of the patch size."""
    patch_size: int | None = None
    """Patch height and width in pixels."""
    embed_dim: int | None = None
    """Encoder width E."""
    depth: int | None = None
    """Encoder blocks."""
    num_heads: int | None = None
    """Encoder attention heads."""
    decoder_embed_dim: int | None = None
    """Decoder width D."""
    decoder_depth: int | None = None
    """Decoder blocks."""
    decoder_num_heads: int | None = None
    """Decoder attention heads."""
    mlp_ratio: float | None = None
    """Hidden width of the MLPs over the width of the block."""
    num_classes: int | None = None
    """Number of classes, without the unconditional label."""
    hidden_dim: int | None = None
    """Width of the projection head (pre-training)."""
    output_dim: int | None = None
    """Output width of the projection head (pre-training)."""

    def __post_init__(self):
        _check(self, 1, math.inf, "image_size", "patch_size", "embed_dim", "depth", "num_heads", "decoder_embed_dim")
        _check(self, 1, math.inf, "decoder_depth", "decoder_num_heads", "hidden_dim", "output_dim")
        _check(self, 0, math.inf, "num_classes")
        _check_positive(self, "mlp_ratio")


@dataclass
class ScheduleConfig:
    """Karras noise grid; sigmas here are unshifted (the image sees them times H/64)."""

    sigma_min: float = 0.002
    """Lowest noise level, unshifted."""
    sigma_max: float = 80.0
    """Highest noise level, unshifted."""
    rho: float = 7.0
    """Curvature of the grid."""
    sigma_data: float = 0.5
    """Standard deviation of the normalised pixels."""

    def __post_init__(self):
        _check_positive(self, "sigma_min", "sigma_max", "rho", "sigma_data")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min is {self.sigma_min}, want less than sigma_max ({self.sigma_max})")


@dataclass
class AugmentConfig:
    """The two augmented views of pre-training; pairs are (low, high) or (view 1, view 2)."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    """Random resized crop: range of the area fraction."""
    crop_ratio: tuple[float, float] = (0.75, 4.0 / 3.0)
    """Random resized crop: range of the aspect ratio."""
    jitter_probability: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Colour jitter: factor in 1 +- this."""
    contrast: float = 0.4
    """Colour jitter: factor in 1 +- this."""
    saturation: float = 0.2
    """Colour jitter: factor in 1 +- this."""
    hue: float = 0.1
    """Colour jitter: shift in +- this, in turns of the hue circle."""
    grayscale_probability: float = 0.2
    """Probability of grayscale."""
    blur_probability: tuple[float, float] = (1.0, 0.1)
    """Probability of Gaussian blur in view 1 and in view 2."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Gaussian blur: range of sigma in pixels."""
    solarize_probability: tuple[float, float] = (0.0, 0.2)
    """Probability of solarisation (threshold 128) in view 1 and in view 2."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip."""


@dataclass
class DataConfig:
    """Where images come from and how they become tensors."""

    path: str = ""
    """Folder of class folders with images, folder of tars (`prepare-data`, WebDataset, ImageNet's), or a tar."""
    backend: Literal["auto", "dali", "pillow"] = "auto"
    """Who decodes and augments: `auto` takes DALI when it is installed and says so. Their pixels differ slightly."""
    normalization: Literal["imagenet", "simple"] = "imagenet"
    """Pixel scaling: `imagenet` gives standard deviation 0.5, `simple` maps [0,1] to [-1,1]."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip of the centre crop."""
    workers: int = 4
    """Pillow: decoding processes per rank, 0 decodes in the training process. DALI: CPU threads per rank."""
    readers: int = 1
    """DALI: processes per rank that read files and draw parameters of views; 0 reads in the training process."""
    max_bad_fraction: float = 0.01
    """Training stops when more than this share of the files cannot be decoded."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmented views (pre-training only)."""

    def __post_init__(self):
        _check(self, 0, math.inf, "readers")


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate."""

    backend: Literal["auto", "fused", "torch", "apex"] = "auto"
    """Who computes the update, with equal numbers up to rounding; `fused` is the C++/CUDA extension, in one pass."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    decay_tokens: bool = False
    """Apply weight decay to `pos_embed` and `cls_token` as well."""
    layer_decay: float = 1.0
    """Learning-rate factor per encoder block from the deepest (1) to the first; 1 switches it off."""
    schedule: Literal["warmup-cosine", "warmup-step", "constant"] = "warmup-cosine"
    """Learning-rate factor: warm-up then cosine to `min_scale`, or 1 / 0.3 / 0.08 at `milestones`, or 1."""
    warmup_steps: int = 10_000
    """Steps of linear warm-up; the update at step s uses factor s/warmup_steps."""
    milestones: tuple[int, int] = (400_000, 500_000)
    """Steps after which `warmup-step` falls to 0.3 and to 0.08."""
    min_scale: float = 0.0
    """Lower bound of the cosine."""
    clip_norm: float | None = None
    """Gradient norm limit; `null` means none."""
    clip_after: int = 0
    """Clipping begins after this many steps."""

    def __post_init__(self):
        _check(self, 0, math.inf, "lr", "weight_decay", "warmup_steps", "clip_after")
        _check(self, 0, 1, "min_scale")
        _check_positive(self, "eps", "clip_norm", "layer_decay")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}, want values in [0, 1)")
        if not 0 <= self.milestones[0] <= self.milestones[1]:
            raise ValueError(f"milestones are {self.milestones}, want 0 <= first <= second")


@dataclass
class PosthocEmaConfig:
    """Averages of the weights from which others, of any length, are made after training (`reconstruct-ema`)."""

    sigma_rel: list[float] | None = None
    """Widths of power-function averages to track, relative to the steps made; EDM2 has [0.05,0.10]; `null`: none."""
    every: int = 10_000
    """Steps between their snapshots in posthoc_ema/ (2 bytes per weight and width); the last step has one, too."""

    def __post_init__(self):
        _check(self, 1, math.inf, "every")
        for value in self.sigma_rel or ():
            check_sigma_rel(value)
        if self.sigma_rel is not None and len(set(self.sigma_rel)) < max(len(self.sigma_rel), 1):
            raise ValueError(f"sigma_rel is {self.sigma_rel}, want widths that differ, or null for none")


@dataclass
class PreviewConfig:
    """The grid of samples that training draws from the EMA weights."""

    every: int = 10_000
    """Steps between grids; 0 draws none."""
    num: int = 16
    """Images in a grid."""
    sampler: Sampler = "heun"
    """Sampler of the grid."""
    steps: int = 18
    """Noise levels of the grid's sampler."""
    guidance: float = 1.0
    """Guidance scale; 1 means unguided."""
    interval: tuple[float, float] = (0.19, 1.61)
    """Unshifted sigma interval of the guidance (low excluded, high included)."""

    def __post_init__(self):
        _check(self, 0, math.inf, "every")
        _check(self, 1, math.inf, "num")
        check_sampler(self.sampler, self.steps)
        _check_interval(self, "interval")
        _check_finite(self, "guidance")


@dataclass
class RunConfig:
    """What every training job has."""

    outdir: str = ""
    """Run folder; the same command with the same folder resumes."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network."""
    noise: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Noise grid."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser."""
    posthoc_ema: PosthocEmaConfig = field(default_factory=PosthocEmaConfig)
    """Averages for `reconstruct-ema`."""
    steps: int = 1_000_000
    """Updates to make."""
    batch_size: int = 1024
    """Global batch size, split over the ranks."""
    gradient_accumulation: int = 1
    """Parts in which each rank's batch goes through the networks, for less memory; the gradient is that of the whole
    batch, contrastive negatives and BatchNorm statistics included. Pre-training runs its three views once more."""
    seed: int = 0
    """Every random draw follows from this, the step and the sample."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes a GPU when there is one and says so."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """What several GPUs hold: `ddp` a copy of everything each; `fsdp` a part each of weights, gradients, moments and
    averages, which saves memory and sends each block's weights round for every forward and backward pass."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast dtype; fp16 scales the loss dynamically."""
    ops: str = "auto"
    """What computes: `auto` (the plan that `tune` has made for this job on this device, else plain PyTorch), `tune`
    (makes the plan first if there is none), `plain`, `triton` (every Triton kernel), `cuda` (the extension's products,
    Triton elsewhere), a plan's file; then single sites, such as `auto,attention=triton,mlp=plain`."""
    fp8: Literal["rowwise"] | None = None
    """Experimental: the blocks' large matrix products in FP8 (forward and gradient of the input) with a scale per row,
    on GPUs that have it; needs precision bf16."""
    compile: Literal["auto", "off", "blocks", "network"] = "auto"
    """torch.compile of each transformer block (quick to compile) or of whole networks; `auto`: as the plan says, else
    blocks on a GPU only."""
    cuda_graphs: bool = False
    """Experimental: launch the networks as CUDA graphs; one GPU, compile network."""
    activation_checkpointing: bool | float = False
    """Compute each transformer block again in the backward pass instead of keeping what it needs: less memory. A number
    between 0 and 1 is the share of the blocks, evenly spread."""
    offload_ema: bool = False
    """Keep the averages of the weights in the first rank's host memory: less GPU memory. Pre-training's target network
    stays on the GPU."""
    log_every: int = 100
    """Steps per line of metrics.jsonl."""
    checkpoint_every: int = 5_000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    keep_every: int = 0
    """Checkpoints of multiples of this step stay for good, their weights also as kept/step_<step>.safetensors;
    0: none."""
    tensorboard: bool = True
    """Write TensorBoard events when tensorboard is installed."""
    wandb: str | None = None
    """Weights & Biases project to log to, when wandb is installed."""

    def __post_init__(self):
        _check(self, 1, math.inf, "steps", "batch_size", "gradient_accumulation")
        _check(self, 1, math.inf, "log_every", "checkpoint_every", "keep_checkpoints")
        _check(self, 0, math.inf, "keep_every")
        _check(self, 0, 2**63 - 1, "seed")
        _check(self, 0, 1, "activation_checkpointing")
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every: got {self.keep_every}, wanted a multiple of checkpoint_every, {self.checkpoint_every}"
            )
        self._check_engine()

    def _check_engine(self):
        if self.compile == "on":
            raise ValueError("compile is on, which is now called blocks; want auto, off, blocks or network")
        if self.cuda_graphs and self.compile != "network":
            raise ValueError(f"cuda_graphs: got compile {self.compile}, want network: add --compile network")
        if self.fp8 and self.precision != "bf16":
            raise ValueError(
                f"fp8: got precision {self.precision}, want bf16: PyTorch's FP8 product with a scale per row gives that"
            )
        refused = {"offload_ema": self.offload_ema, "fp8": self.fp8, "compile network": self.compile == "network"}
        for name, wanted in refused.items():
            if wanted and self.parallelism == "fsdp":
                raise ValueError(f"{name}: got parallelism fsdp, want ddp: sharded networks do not take it")


@dataclass
class PretrainConfig(RunConfig):
    """Stage 1: self-supervised pre-training of the encoder."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.03, decay_tokens=True)
    )
    """Optimiser."""
    steps: int = 600_000
    """Updates to make."""
    start_scales: int = 20
    """Curriculum: noise levels at the start (K0)."""
    end_scales: int = 1280
    """Curriculum: noise levels at the end (K1)."""
    contrastive_temperature: float = 0.2
    """Temperature of the symmetric contrastive term."""
    temperature_schedule: Literal["constant", "interpolated"] = "constant"
    """Temperature of the consistency term: constant (released code), or linear in sigma (paper)."""
    temperature: float = 0.1
    """Temperature of the consistency term when constant."""
    temperature_range: tuple[float, float] = (0.1, 0.2)
    """Interpolated temperature at sigma_min and at sigma_max."""
    target_ema: float = 0.99
    """Decay per step of the target network."""

    def __post_init__(self):
        super().__post_init__()
        _check(self, 1, math.inf, "start_scales")
        _check(self, self.start_scales, math.inf, "end_scales")
        _check(self, 0, 1, "target_ema")
        _check_positive(self, "contrastive_temperature", "temperature")
        _check_finite(self, "temperature_range")
        if not min(self.temperature_range) > 0:
            raise ValueError(f"temperature_range is {self.temperature_range}, want positive numbers")
        if self.offload_ema and not self.posthoc_ema.sigma_rel:
            raise ValueError(
                "offload_ema: pre-training calls its average, the target network, in every step, so that it stays on "
                "the device; leave the flag out, or track others with --posthoc_ema.sigma_rel, which are offloaded"
            )


@dataclass
class DiffusionConfig(RunConfig):
    """Stage 2a: diffusion fine-tuning."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(clip_norm=0.5, clip_after=10_000))
    """Optimiser."""
    init_from: str | None = None
    """Pre-trained encoder or generator: a run folder, .safetensors or official .pth; `null` starts from scratch."""
    parameterization: Literal["x0", "edm"] = "x0"
    """What the network's output means."""
    num_scales: int = 1280
    """Noise levels of the grid that sigma is snapped to (K)."""
    p_mean: float = -1.2
    """Mean of ln sigma, unshifted."""
    p_std: float = 1.6
    """Standard deviation of ln sigma."""
    label_dropout: float = 0.1
    """Probability of the unconditional label."""
    ema: float = 0.9999
    """Decay per step of the averaged weights."""
    ema_warmup: bool = False
    """Use min(ema, i/(i+10)) at update i, for short runs."""
    dropout: float = 0.0
    """Dropout on the output projection of decoder attention."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """Sample grids during training."""

    def __post_init__(self):
        super().__post_init__()
        _check(self, 2, math.inf, "num_scales")
        _check_finite(self, "p_mean")
        _check(self, 0, math.inf, "p_std")
        _check(self, 0, 1, "label_dropout", "ema", "dropout")


@dataclass
class ConsistencyConfig(RunConfig):
    """Stage 2b: consistency fine-tuning for one-step generation."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            betas=(0.9, 0.99), weight_decay=0.03, schedule="warmup-step", warmup_steps=0
        )
    )
    """Optimiser."""
    steps: int = 700_000
    """Updates to make."""
    init_from: str | None = None
    """Encoder or diffusion model to start from: a run folder, .safetensors or official .pth; `null`: from scratch."""
    p_mean: float = -0.4
    """Mean of ln t, unshifted."""
    p_std: float = 1.6
    """Standard deviation of ln t."""
    q: float = 2.0
    """Base of the shrinking of t - r over the stages."""
    k: float = 8.0
    """Weight of the sigmoid in r(t)."""
    b: float = 1.0
    """Slope of the sigmoid in r(t)."""
    first_stage: int = 100_000
    """Steps of the first stage (d0)."""
    stage_length: int = 100_000
    """Steps of each later stage (d1)."""
    delta: int = 1
    """Number of the first stage; 0 begins with plain denoising."""
    huber_c: float = 0.06
    """Constant c of the pseudo-Huber distance."""
    perceptual: str | None = None
    """Frozen encoder of the auxiliary contrastive loss: a pretrain run folder, .safetensors or .pth; `null`: none."""
    temperature: float = 0.1
    """Temperature of the auxiliary contrastive loss."""
    label_dropout: float = 0.0
    """Probability of the unconditional label."""
    ema: float = 0.9999
    """Decay per step of the averaged weights."""
    ema_warmup: bool = False
    """Use min(ema, i/(i+10)) at update i, for short runs."""
    dropout: float = 0.5
    """Dropout on the output projection of decoder attention."""
    preview: PreviewConfig = field(default_factory=lambda: PreviewConfig(sampler="onestep", steps=1))
    """Sample grids during training."""

    def __post_init__(self):
        super().__post_init__()
        _check_finite(self, "p_mean", "b")
        _check(self, 0, math.inf, "p_std", "k", "first_stage", "delta")
        _check(self, 1, math.inf, "stage_length")
        _check(self, 0, 1, "label_dropout", "ema", "dropout")
        _check_positive(self, "q", "huber_c", "temperature")


@dataclass
class DryRunConfig:
    """Flags of training jobs that describe a run instead of starting one."""

    dry_run: bool = False
    """Print parameters, FLOPs, expected memory and time, and stop: no data, GPU or run folder is touched."""
    gpus: int | None = None
    """Dry run: number of GPUs; `null` takes torchrun's, or 8."""
    gpu: str | None = None
    """Dry run: whose nominal peak to reckon with, e.g. `H100`; `null` takes this machine's, or `H200`."""
    utilization: float = 0.6
    """Dry run: share of the nominal peak to assume."""

    def __post_init__(self):
        _check(self, 1, math.inf, "gpus")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization is {self.utilization}, want more than 0 and at most 1")
        given = [f.name for f in fields(self) if f.name != "dry_run" and getattr(self, f.name) != f.default]
        if given and not self.dry_run:
            raise ValueError(f"{given[0]} is for --dry_run; torchrun --nproc-per-node starts training on several GPUs")


@dataclass
class SampleConfig:
    """Draw images from a trained model."""

    checkpoint: str = ""
    """Run folder, .safetensors, official .pth (or its folder), or hub id."""
    outdir: str = ""
    """Folder for samples.npz, PNG files and grid.png; the same command with the same folder goes on."""
    num: int = 64
    """Images to draw."""
    labels: str = "balanced"
    """`balanced`, `random`, class indices such as `3` or `0,1,2` (at most `num`, repeated in turn), or
    `frequencies:PATH`, drawn as often as in the data whose manifest.json of prepare-data (or its folder) is PATH."""
    seed: int = 0
    """Image i starts from noise that depends on the seed and i only."""
    sampler: Sampler = "heun"
    """Sampler; `onestep` is for consistency models."""
    steps: int = 32
    """Noise levels; heun makes 2(steps-1) evaluations."""
    guidance: float = 1.0
    """Guidance scale; 1 means unguided (with `autoguidance`, 0 does)."""
    interval: tuple[float, float] = (0.19, 1.61)
    """Unshifted sigma interval of the guidance (low excluded, high included), such as `[0.19,1.61]`."""
    autoguidance: str | None = None
    """Checkpoint of a weaker model to guide away from, with scale `guidance`."""
    clamp: Literal["official", "data", "none"] = "official"
    """Clamp of the denoised estimate: [-1,1], the data's true range, or none."""
    parameterization: Literal["auto", "x0", "edm"] = "auto"
    """Meaning of the network's output; `auto` reads it from the checkpoint (official files: x0)."""
    normalization: Literal["auto", "imagenet", "simple"] = "auto"
    """Pixel scaling; `auto` reads it from the checkpoint (official files: imagenet)."""
    batch_size: int = 64
    """Images per network call, on each GPU."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp8"] = "fp32"
    """What weights and matrix products are computed in; one that the device lacks gives way to the nearest, with a
    message. `fp32` is the released code's."""
    error_images: int = 8
    """Images to draw in fp32 as well, at most a batch, to report how far those in `precision` are from them."""
    compile: Literal["auto", "off", "blocks", "network"] = "auto"
    """torch.compile of the transformer blocks or of the whole network; `auto`: as the plan says, else of the blocks, on
    a GPU."""
    cuda_graphs: bool | None = None
    """Launch all evaluations of a batch as one CUDA graph; `null`: as the plan says, else on a GPU."""
    ops: str = "auto"
    """What computes: `auto` (the plan that `tune` has made for this job on this device, else plain PyTorch), `tune`
    (makes the plan first if there is none), `plain`, `triton` (every Triton kernel), `cuda` (the extension's products,
    Triton elsewhere), a plan's file; then single sites, such as `auto,attention=triton,mlp=plain`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to sample."""
    npz: bool = True
    """Write samples.npz, images and labels in the layout of ADM's evaluation."""
    png: bool = False
    """Write png/<class>/<index>.png, one file per image."""
    s_churn: float = 0.0
    """edm_sde: amount of added noise."""
    s_min: float = 0.0
    """edm_sde: lowest shifted sigma at which noise is added."""
    s_max: float = float("inf")
    """edm_sde: highest shifted sigma at which noise is added."""
    s_noise: float = 1.0
    """edm_sde: scale of the added noise."""

    def __post_init__(self):
        _check(self, 1, 10_000_000, "num")
        check_sampler(self.sampler, self.steps, **self.churn)
        _check(self, 1, math.inf, "batch_size")
        _check(self, 0, 2**63 - 1, "seed")
        _check_interval(self, "interval")
        _check_finite(self, "guidance")
        _check(self, 0, math.inf, "error_images")
        if not (self.npz or self.png):
            raise ValueError("npz and png are both false, want at least one: there would be nothing to write")

    @property
    def churn(self) -> dict[str, float]:
        """Those options of the sampler edm_sde that are not their defaults."""
        values = {name: getattr(self, name) for name in CHURN}
        return {name: value for name, value in values.items() if value != getattr(SampleConfig, name)}


@dataclass
class TuneConfig:
    """What `tune` has beside the options of the job that it makes a plan for."""

    job: Literal["sample", "pretrain", "finetune-diffusion", "finetune-consistency"] = "sample"
    """The job to make a plan for; its options follow, `--config` and `--batch_size` as in the job itself."""
    minutes: float = 10.0
    """After so long nothing more is begun; what was not tried is said."""
    gpus: int | None = None
    """Training: GPUs that share the batch; `null`: those that are visible."""
    output: str | None = None
    """A further file to write the plan to, such as one for other users of this device."""
    seconds: float = 3.0
    """Of timing, for each pair of candidates."""
    limit: float = 240.0
    """Seconds after which a candidate that gives no answer counts as hung."""

    def __post_init__(self):
        _check_positive(self, "minutes", "seconds", "limit")
        _check(self, 1, math.inf, "gpus")


@dataclass
class TunedSampleConfig(SampleConfig):
    """A `sample` command to make a plan for: of a checkpoint, or of a preset's shapes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network, where there is no checkpoint."""


@dataclass
class EvaluateConfig:
    """Judge samples against real images, or probe an encoder. Needs scikit-learn, but for `reference`."""

    samples: str | None = None
    """samples.npz of `sample` or a folder of images, to judge by `reference` and `inception`, or by `train` and `test`
    (these need class folders)."""
    reference: str | None = None
    """Samples: reference npz of ADM's evaluation (arr_0, or mu and sigma, may be missing) or a folder of images, for
    FID, Inception Score, precision and recall."""
    inception: str | None = None
    """Samples: network for `reference`: inception-2015-12-05.pt of NVIDIA, or torch-fidelity's
    weights-inception-2015-12-05-6726825d.pth (needs torch-fidelity)."""
    batch_size: int = 64
    """Reference: images per network call."""
    splits: int = 10
    """Reference: parts of the samples over which the Inception Score is averaged."""
    neighbors: int = 3
    """Reference: the balls of precision and recall reach to this nearest neighbour."""
    probe: str | None = None
    """Encoder or generator checkpoint, or the name of a preset (freshly initialised), to judge by a linear probe."""
    train: str = ""
    """Folder of class folders: real images that classifier, PCA and probe are fitted on (without `reference`)."""
    test: str = ""
    """Folder of class folders: held-out real images (without `reference`)."""
    size: int = 8
    """Samples and `train`: images are compared as size x size grayscale."""
    components: int = 20
    """Samples and `train`: dimensions of the PCA."""
    sigmas: list[float] = field(default_factory=lambda: [0.002, 0.5, 2.0, 5.0])
    """Probe: unshifted noise levels."""
    normalization: Literal["auto", "imagenet", "simple"] = "auto"
    """Probe: pixel scaling; `auto` reads it from the checkpoint (official files and presets: imagenet)."""
    seed: int = 0
    """Probe: seed of the noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Probe and reference: where the network runs."""
    output: str | None = None
    """JSON file to write the result to; it is printed in any case. A result of the same settings is replaced, any other
    file refused."""

    def __post_init__(self):
        _check(self, 1, math.inf, "batch_size", "splits", "neighbors")
        _check(self, 1, 256, "size")


@dataclass
class PrepareDataConfig:
    """Write centre crops of a dataset as tar shards or as a folder of class folders."""

    source: str = "digits"
    """`digits` (the handwritten digits inside scikit-learn, always a folder), or a folder of class folders, a tar or a
    folder of tars (WebDataset, ImageNet's) to centre-crop."""
    outdir: str = ""
    """Folder to write; digits make train/ and test/ in it. The same command goes on after an interruption."""
    layout: Literal["shards", "folder"] = "shards"
    """`shards`: WebDataset tars in mixed order with checksums; `folder`: PNG files, from a folder of class folders."""
    image_size: int = 256
    """Side of the centre crop (not for digits)."""
    format: Literal["png", "jpeg"] = "png"
    """Shards: `png` is lossless, `jpeg` (4:4:4) is smaller and is not."""
    quality: int = 95
    """Shards: quality of JPEG."""
    images_per_shard: int = 2048
    """Shards: images per tar; each worker makes one at a time."""
    seed: int = 0
    """Shards: seed of the order."""
    workers: int = 4
    """Processes (not for digits)."""
    max_bad_fraction: float = 0.01
    """Share of files that cannot be decoded up to which they are left out (not for digits)."""
    verify: bool = False
    """Write nothing; read the shards in `outdir` and compare them with their checksums."""

    def __post_init__(self):
        _check(self, 1, math.inf, "image_size", "images_per_shard")
        _check(self, 0, math.inf, "seed", "workers")
        _check(self, 0, 1, "max_bad_fraction")
        _check(self, 1, 100, "quality")
        if self.format != "png" and self.layout == "folder":
            raise ValueError(f"format is {self.format}: layout folder is of PNG files; take layout shards")


@dataclass
class ExportConfig:
    """Write the averaged weights of a run in another form."""

    checkpoint: str = ""
    """Run folder, .safetensors or official .pth."""
    output: str = ""
    """File (.safetensors) or folder (official: nnet.pth and nnet_ema.pth) to write."""
    format: Literal["safetensors", "official"] = "safetensors"
    """`safetensors` holds the preset inside; `official` is what the released code loads."""


@dataclass
class ReconstructEmaConfig:
    """Write the weights averaged over any length of a run that was trained with `posthoc_ema.sigma_rel`."""

    run: str = ""
    """Run folder with posthoc_ema/."""
    sigma_rel: float | None = None
    """Width of the average relative to `step`: more than 0, less than 0.2887."""
    step: int | None = None
    """Step at which the average ends, one of the snapshots'; `null`: the last."""
    output: str = ""
    """File (.safetensors) to write; it is used like a run's model.safetensors."""
    max_residual: float = 0.05
    """Refuse when the snapshots represent the average worse than this (relative L2 distance of the profiles)."""

    def __post_init__(self):
        if self.sigma_rel is not None:
            check_sigma_rel(self.sigma_rel)
        _check(self, 1, math.inf, "step")
        _check(self, 0, 1, "max_residual")
