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


GUIDANCE_INTERVAL = (0.19, 1.61)
"""Unshifted sigmas between which guidance acts in the released sampler (low excluded, high included)."""


SIGMA_REL = {"above": 0, "below": 12**-0.5}
"""Limits of a relative width of power-function EMA; 12^-1/2 is that of the uniform average, with gamma = 0."""


def number(default, least=-math.inf, most=math.inf, **limits):
    """A field whose number, or each of whose numbers, is within limits, those of `check_number`. None passes."""
    return field(default=default, metadata={"least": least, "most": most, **limits})


def check_number(name: str, value, least=-math.inf, most=math.inf, above=-math.inf, below=math.inf, **rules: bool):
    """Raise ValueError unless a number, or each of several, is finite, from `least` to `most`, `above` and `below`.

    rules: "infinite": it may be infinity. "ordered": a pair is (low, high). "differ": there are some, and no two equal.
    Whatever is no number passes.
    """
    numbers = [n for n in (value if isinstance(value, list | tuple) else [value]) if isinstance(n, int | float)]
    inside = ((least <= n <= most and above < n < below) or (n == math.inf and "infinite" in rules) for n in numbers)
    if not all(inside):
        low = f"at least {least}" if least > -math.inf else f"more than {above}" if above > -math.inf else ""
        high = f"at most {most}" if most < math.inf else f"less than {below:.4g}" if below < math.inf else ""
        wanted = " and ".join(filter(None, (low, high))) or "a finite number"
        wanted = f"{least} to {most}" if -math.inf < least and most < math.inf else wanted
        raise ValueError(f"{name} is {value}, want {wanted}")
    if "ordered" in rules and value[0] > value[1]:
        raise ValueError(f"{name} is {value}, want low <= high")
    if "differ" in rules and value is not None and len(set(numbers)) < max(len(value), 1):
        raise ValueError(f"{name} is {value}, want numbers that differ")


class _Checked:
    """A configuration that is checked when it is made: its numbers, and what `_check` of a class says beside.

    Raises ValueError.
    """

    def __post_init__(self):
        for f in fields(self):
            check_number(f.name, getattr(self, f.name), **f.metadata)
        for kind in reversed(type(self).__mro__):
            vars(kind).get("_check", lambda _: None)(self)


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
    """Raise ValueError for a relative width that no power-function EMA has."""
    check_number("sigma_rel", value, **SIGMA_REL)


@dataclass
class ModelConfig(_Checked):
    """A preset of `epg_fast/configs/models` and what to change in it; `null` keeps the preset's value."""

    preset: str = "epg_xl_16_256"
    """Name of a preset (`epg_fast.list_presets()`)."""
    image_size: int | None = number(None, 1)
    """Image height and width in pixels; a multiple of the patch size."""
    patch_size: int | None = number(None, 1)
    """Patch height and width in pixels."""
    embed_dim: int | None = number(None, 1)
    """Encoder width E."""
    depth: int | None = number(None, 1, 1000)
    """Encoder blocks."""
    num_heads: int | None = number(None, 1)
    """Encoder attention heads."""
    decoder_embed_dim: int | None = number(None, 1)
    """Decoder width D."""
    decoder_depth: int | None = number(None, 1, 1000)
    """Decoder blocks."""
    decoder_num_heads: int | None = number(None, 1)
    """Decoder attention heads."""
    mlp_ratio: float | None = number(None, above=0)
    """Hidden width of the MLPs over the width of the block."""
    num_classes: int | None = number(None, 0)
    """Number of classes, without the unconditional label."""
    hidden_dim: int | None = number(None, 1)
    """Width of the projection head (pre-training)."""
    output_dim: int | None = number(None, 1)
    """Output width of the projection head (pre-training)."""


@dataclass
class ScheduleConfig(_Checked):
    """Karras noise grid; sigmas here are unshifted (the image sees them times H/64)."""

    sigma_min: float = number(0.002, above=0)
    """Lowest noise level, unshifted."""
    sigma_max: float = number(80.0, above=0)
    """Highest noise level, unshifted."""
    rho: float = number(7.0, above=0)
    """Curvature of the grid."""
    sigma_data: float = number(0.5, above=0)
    """Standard deviation of the normalised pixels."""

    def _check(self):
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min is {self.sigma_min}, want less than sigma_max ({self.sigma_max})")


@dataclass
class AugmentConfig(_Checked):
    """The two augmented views of pre-training; pairs are (low, high) or (view 1, view 2)."""

    crop_area: tuple[float, float] = number((0.08, 1.0), most=1, above=0, ordered=True)
    """Random resized crop: range of the area fraction."""
    crop_ratio: tuple[float, float] = number((0.75, 4.0 / 3.0), above=0, ordered=True)
    """Random resized crop: range of the aspect ratio."""
    jitter_probability: float = number(0.8, 0, 1)
    """Probability of colour jitter."""
    brightness: float = number(0.4, 0)
    """Colour jitter: factor in 1 +- this."""
    contrast: float = number(0.4, 0)
    """Colour jitter: factor in 1 +- this."""
    saturation: float = number(0.2, 0)
    """Colour jitter: factor in 1 +- this."""
    hue: float = number(0.1, 0, 0.5)
    """Colour jitter: shift in +- this, in turns of the hue circle."""
    grayscale_probability: float = number(0.2, 0, 1)
    """Probability of grayscale."""
    blur_probability: tuple[float, float] = number((1.0, 0.1), 0, 1)
    """Probability of Gaussian blur in view 1 and in view 2."""
    blur_sigma: tuple[float, float] = number((0.1, 2.0), 0, 1024, ordered=True)
    """Gaussian blur: range of sigma in pixels."""
    solarize_probability: tuple[float, float] = number((0.0, 0.2), 0, 1)
    """Probability of solarisation (threshold 128) in view 1 and in view 2."""
    flip_probability: float = number(0.5, 0, 1)
    """Probability of a horizontal flip."""


@dataclass
class DataConfig(_Checked):
    """Where images come from and how they become tensors."""

    path: str = ""
    """Folder of class folders with images, folder of tars (`prepare-data`, WebDataset, ImageNet's), or a tar; parquet
    files of the Hugging Face hub: their folder, one of them, or a pattern such as `data/train-*.parquet`."""
    backend: Literal["auto", "dali", "pillow"] = "auto"
    """Who decodes and augments: `auto` takes DALI when it is installed and says so. Their pixels differ slightly."""
    normalization: Literal["imagenet", "simple"] = "imagenet"
    """Pixel scaling: `imagenet` gives standard deviation 0.5, `simple` maps [0,1] to [-1,1]."""
    flip_probability: float = number(0.5, 0, 1)
    """Probability of a horizontal flip of the centre crop."""
    workers: int = number(4, 0)
    """Pillow: decoding processes per rank, 0 decodes in the training process. DALI: CPU threads per rank."""
    readers: int = number(1, 0)
    """DALI: processes per rank that read files and draw parameters of views; 0 reads in the training process."""
    max_bad_fraction: float = number(0.01, 0, 1)
    """Training stops when more than this share of the files cannot be decoded."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmented views (pre-training only)."""


@dataclass
class OptimizerConfig(_Checked):
    """AdamW and its learning rate."""

    backend: Literal["auto", "fused", "torch"] = "auto"
    """Who computes the update, with equal numbers up to rounding; `fused` is the C++/CUDA extension, in one pass."""
    lr: float = number(1e-4, 0)
    """Peak learning rate."""
    betas: tuple[float, float] = number((0.9, 0.999), 0, below=1)
    """AdamW betas."""
    eps: float = number(1e-8, above=0)
    """AdamW epsilon."""
    weight_decay: float = number(0.01, 0)
    """Decoupled weight decay."""
    decay_tokens: bool = False
    """Apply weight decay to `pos_embed` and `cls_token` as well."""
    schedule: Literal["warmup-cosine", "warmup-step", "constant"] = "warmup-cosine"
    """Learning-rate factor: warm-up then cosine to `min_scale`, or 1 / 0.3 / 0.08 at `milestones`, or 1."""
    warmup_steps: int = number(10_000, 0)
    """Steps of linear warm-up; the update at step s uses factor s/warmup_steps."""
    milestones: tuple[int, int] = number((400_000, 500_000), 0, ordered=True)
    """Steps after which `warmup-step` falls to 0.3 and to 0.08."""
    min_scale: float = number(0.0, 0, 1)
    """Lower bound of the cosine."""
    clip_norm: float | None = number(None, above=0)
    """Gradient norm limit; `null` means none."""
    clip_after: int = number(0, 0)
    """Clipping begins after this many steps."""


@dataclass
class PosthocEmaConfig(_Checked):
    """EMAs of the weights from which one of any length is made after training (`reconstruct-ema`)."""

    sigma_rel: list[float] | None = number(None, differ=True, **SIGMA_REL)
    """Widths of power-function EMA to track, relative to the steps made; EDM2 has [0.05,0.10]; `null`: none."""
    every: int = number(10_000, 1)
    """Steps between their snapshots in posthoc_ema/ (2 bytes per weight and width); the last step has one, too."""


@dataclass
class PreviewConfig(_Checked):
    """The grid of samples that training draws from the EMA weights."""

    every: int = number(10_000, 0)
    """Steps between grids; 0 draws none."""
    num: int = number(16, 1)
    """Images in a grid."""
    sampler: Sampler = "heun"
    """Sampler of the grid."""
    steps: int = 18
    """Noise levels of the grid's sampler."""
    guidance: float = 1.0
    """Guidance scale; 1 means unguided."""
    interval: tuple[float, float] = number(GUIDANCE_INTERVAL, ordered=True)
    """Unshifted sigma interval of the guidance (low excluded, high included)."""

    def _check(self):
        check_sampler(self.sampler, self.steps)


@dataclass
class JudgeConfig(_Checked):
    """What images are judged by: networks and a reference, or small real images without any network."""

    reference: str | None = None
    """Reference npz of ADM's evaluation (arr_0, or mu and sigma, may be missing), samples.npz or a folder of images,
    for FID, KID, Inception Score, precision and recall."""
    inception: str | None = None
    """Network for `reference`: inception-2015-12-05.pt of NVIDIA, or torch-fidelity's
    weights-inception-2015-12-05-6726825d.pth (needs torch-fidelity)."""
    dinov2: str | None = None
    """Network for FD-DINOv2 and others: a name of torch-fidelity's such as dinov2-vit-l-14 (needs torch-fidelity), or a
    TorchScript file that makes features of uint8 images."""
    splits: int = number(10, 1)
    """Reference: parts of the samples over which the Inception Score is averaged."""
    neighbors: int = number(3, 1)
    """Reference: the balls of precision and recall reach to this nearest neighbour."""
    train: str = ""
    """Folder of class folders: real images that classifier, PCA and probe are fitted on (without `reference`)."""
    test: str = ""
    """Folder of class folders: held-out real images (without `reference`)."""
    size: int = number(8, 1, 256)
    """`train`: images are compared as size x size grayscale."""
    components: int = 20
    """`train`: dimensions of the PCA."""


@dataclass
class RunEvaluationConfig(JudgeConfig):
    """How training judges its EMA weights, with images that are drawn as `preview` says."""

    every: int = number(0, 0)
    """Steps between evaluations, whose figures go to metrics.jsonl and evaluation/; the last step has one, too.
    0: none."""
    num: int = number(5_000, 2)
    """Images to draw for one, shared by the ranks."""
    batch_size: int = number(64, 1)
    """Images per network call, on each GPU."""
    seed: int = number(0, 0, 2**63 - 1)
    """Image i starts from noise that depends on the seed and i only, the same in every evaluation."""
    sigma_rel: list[float] | None = None
    """Widths of `posthoc_ema.sigma_rel` to judge beside the EMA; each costs as much again."""
    best: str | None = None
    """Figure by which best.safetensors is kept; `null`: fid, else fd_dinov2, else frechet_distance."""


@dataclass
class _DeviceConfig(_Checked):
    """Where a network computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a GPU when there is one and says so."""


@dataclass
class _GeneratorConfig(_DeviceConfig):
    """A trained model, and how its output is to be read."""

    checkpoint: str = ""
    """Run folder, .safetensors, official .pth (or its folder), or hub id."""
    parameterization: Literal["auto", "x0", "edm"] = "auto"
    """Meaning of the network's output; `auto` reads it from the checkpoint (official files: x0)."""
    normalization: Literal["auto", "imagenet", "simple"] = "auto"
    """Pixel scaling; `auto` reads it from the checkpoint (official files: imagenet)."""


@dataclass
class _ComputeConfig(_DeviceConfig):
    """How training and sampling compute."""

    ops: str = "auto"
    """What computes: `auto` (the plan that `tune` has made for this job on this device, else plain PyTorch), `tune`
    (makes the plan first if there is none), `plain`, `triton` (every Triton kernel), `cuda` (the extension's products,
    Triton elsewhere), a plan's file; then single sites, such as `auto,attention=triton,mlp=plain`."""
    compile: Literal["auto", "off", "blocks", "network"] = "auto"
    """torch.compile of each transformer block (quick to compile) or of whole networks; `auto`: as the plan says, else
    blocks on a GPU only."""


@dataclass
class RunConfig(_ComputeConfig):
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
    """EMAs for `reconstruct-ema`."""
    steps: int = number(1_000_000, 1)
    """Updates to make."""
    batch_size: int = number(1024, 1)
    """Global batch size, split over the ranks."""
    gradient_accumulation: int = number(1, 1)
    """Micro-batches that each rank's batch is split into, for less memory; the gradient is that of the whole batch,
    contrastive negatives and BatchNorm statistics included (GradCache). Pre-training runs its three views once more."""
    seed: int = number(0, 0, 2**63 - 1)
    """Every random draw follows from this, the step and the sample."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """What several GPUs hold: `ddp` a copy of everything each; `fsdp` a part each of weights, gradients, moments and
    EMAs, which saves memory and sends each block's weights round for every forward and backward pass."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast dtype; fp16 scales the loss dynamically."""
    fp8: Literal["rowwise"] | None = None
    """Experimental: the blocks' large matrix products in FP8 (forward and gradient of the input) with a scale per row,
    on GPUs that have it; needs precision bf16."""
    cuda_graphs: bool = False
    """Experimental: launch the networks as CUDA graphs; one GPU, compile network."""
    activation_checkpointing: bool | float = number(False, 0, 1)
    """Compute each transformer block again in the backward pass instead of keeping what it needs: less memory. A number
    between 0 and 1 is the share of the blocks, evenly spread."""
    offload_ema: bool = False
    """Keep the EMA weights in the first rank's host memory: less GPU memory. Pre-training's target network
    stays on the GPU."""
    log_every: int = number(100, 1)
    """Steps per line of metrics.jsonl."""
    checkpoint_every: int = number(5_000, 1)
    """Steps between checkpoints."""
    keep_checkpoints: int = number(2, 1)
    """How many of the newest checkpoints stay."""
    keep_every: int = number(0, 0)
    """Checkpoints of multiples of this step stay for good, their weights also as kept/step_<step>.safetensors;
    0: none."""
    tensorboard: bool = True
    """Write TensorBoard events when tensorboard is installed."""
    wandb: str | None = None
    """Weights & Biases project to log to (needs wandb); `WANDB_MODE=offline` logs to files alone."""
    trackio: str | None = None
    """Trackio project to log to, a local database that `trackio show` opens (needs trackio)."""

    def _check(self):
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every: got {self.keep_every}, wanted a multiple of checkpoint_every, {self.checkpoint_every}"
            )
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

    def is_due(self, step: int, every: int) -> bool:
        """Whether what is done every so many steps, 0 for never, is done after `step` updates; at the last all is."""
        return step > 0 and every > 0 and (step % every == 0 or step == self.steps)


@dataclass
class CollapseConfig(_Checked):
    """Whether the features that the contrastive loss makes collapse."""

    every: int = number(0, 0)
    """Steps between measurements of effective rank, alignment and uniformity, on a fixed batch of at most 1024 images;
    0: none."""


@dataclass
class ProbeConfig(_Checked):
    """Linear probe of the encoder while it is trained. Needs scikit-learn."""

    every: int = number(0, 0)
    """Steps between linear probes of the encoder; 0: none."""
    train: str = ""
    """Images with classes that the probe is fitted on, as `data.path` has them; default: those of `data.path`."""
    test: str = ""
    """Held-out images of the same classes."""
    num: tuple[int, int] = number((10_000, 2_000), 1)
    """At most so many images of `train` and of `test`, evenly over the classes; they stay in host memory."""
    sigmas: list[float] = field(default_factory=lambda: [0.002, 2.0], metadata={"above": 0, "differ": True})
    """Unshifted noise levels."""

    def _check(self):
        if self.every and not self.test:
            raise ValueError(
                "test: got nothing, want held-out images with classes; add --probe.test FOLDER, or leave out "
                "--probe.every"
            )


@dataclass
class PretrainConfig(RunConfig):
    """Stage 1: self-supervised pre-training of the encoder."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.03, decay_tokens=True)
    )
    steps: int = number(600_000, 1)
    batch_size: int = number(1024, 2)  # the contrastive loss compares images
    start_scales: int = number(20, 1)
    """Curriculum: noise levels at the start (K0)."""
    end_scales: int = 1280
    """Curriculum: noise levels at the end (K1)."""
    contrastive_temperature: float = number(0.2, above=0)
    """Temperature of the symmetric contrastive term."""
    temperature_schedule: Literal["constant", "interpolated"] = "constant"
    """Temperature of the consistency term: constant (released code), or linear in sigma (paper)."""
    temperature: float = number(0.1, above=0)
    """Temperature of the consistency term when constant."""
    temperature_range: tuple[float, float] = number((0.1, 0.2), above=0)
    """Interpolated temperature at sigma_min and at sigma_max."""
    target_ema: float = number(0.99, 0, 1)
    """Decay per step of the target network."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Linear probes during training."""
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    """Measurements of the features during training."""

    def _check(self):
        if self.end_scales < self.start_scales:
            raise ValueError(f"end_scales is {self.end_scales}, want at least start_scales, {self.start_scales}")
        if self.offload_ema and not self.posthoc_ema.sigma_rel:
            raise ValueError(
                "offload_ema: pre-training calls its average, the target network, in every step, so that it stays on "
                "the device; leave the flag out, or track others with --posthoc_ema.sigma_rel, which are offloaded"
            )


@dataclass
class FinetuneConfig(RunConfig):
    """What both kinds of fine-tuning have."""

    init_from: str | None = None
    """Encoder or generator to start from: a run folder, .safetensors or official .pth; `null` starts from scratch."""
    p_mean: float = -1.2
    """Mean of ln sigma, unshifted (consistency: of ln t)."""
    p_std: float = number(1.6, 0)
    """Standard deviation of ln sigma (consistency: of ln t)."""
    label_dropout: float = number(0.1, 0, 1)
    """Probability of the unconditional label."""
    ema: float = number(0.9999, 0, 1)
    """Decay per step of the EMA weights."""
    ema_warmup: bool = False
    """Use min(ema, i/(i+10)) at update i, for short runs."""
    dropout: float = number(0.0, 0, 1)
    """Dropout on the output projection of decoder attention."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """Sample grids during training."""
    evaluate: RunEvaluationConfig = field(default_factory=RunEvaluationConfig)
    """Figures of samples during training."""

    def _check(self):
        tracked = self.posthoc_ema.sigma_rel or []
        if untracked := [width for width in self.evaluate.sigma_rel or () if width not in tracked]:
            raise ValueError(
                f"evaluate.sigma_rel: got {untracked[0]}, want widths that the run tracks; "
                f"--posthoc_ema.sigma_rel is {tracked or 'null'}"
            )


@dataclass
class DiffusionConfig(FinetuneConfig):
    """Stage 2a: diffusion fine-tuning of encoder and decoder."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(clip_norm=0.5, clip_after=10_000))
    parameterization: Literal["x0", "edm"] = "x0"
    """What the network's output means."""
    num_scales: int = number(1280, 2)
    """Noise levels of the grid that sigma is snapped to (K)."""


@dataclass
class ConsistencyConfig(FinetuneConfig):
    """Stage 2b: consistency fine-tuning for one-step generation."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            betas=(0.9, 0.99), weight_decay=0.03, schedule="warmup-step", warmup_steps=0
        )
    )
    steps: int = number(700_000, 1)
    p_mean: float = -0.4
    label_dropout: float = number(0.0, 0, 1)
    dropout: float = number(0.5, 0, 1)
    preview: PreviewConfig = field(default_factory=lambda: PreviewConfig(sampler="onestep", steps=1))
    q: float = number(2.0, above=0)
    """Base of the shrinking of t - r over the stages."""
    k: float = number(8.0, 0)
    """Weight of the sigmoid in r(t)."""
    b: float = 1.0
    """Slope of the sigmoid in r(t)."""
    first_stage: int = number(100_000, 0)
    """Steps of the first stage (d0)."""
    stage_length: int = number(100_000, 1)
    """Steps of each later stage (d1)."""
    delta: int = number(1, 0)
    """Number of the first stage; 0 begins with plain denoising."""
    huber_c: float = number(0.06, above=0)
    """Constant c of the pseudo-Huber distance."""
    perceptual: str | None = None
    """Frozen encoder of the auxiliary contrastive loss: a pretrain run folder, .safetensors or .pth; `null`: none."""
    temperature: float = number(0.1, above=0)
    """Temperature of the auxiliary contrastive loss."""


@dataclass
class DryRunConfig(_Checked):
    """Flags of training jobs that describe a run instead of starting one."""

    dry_run: bool = False
    """Print parameters, FLOPs, expected memory and time, and stop: no data, GPU or run folder is touched."""
    gpus: int | None = number(None, 1)
    """Dry run: number of GPUs; `null` takes torchrun's, or 8."""
    gpu: str | None = None
    """Dry run: whose nominal peak to reckon with, e.g. `H100`; `null` takes this machine's, or `H200`."""
    utilization: float = number(0.6, most=1, above=0)
    """Dry run: share of the nominal peak to assume."""

    def _check(self):
        given = [f.name for f in fields(self) if f.name != "dry_run" and getattr(self, f.name) != f.default]
        if given and not self.dry_run:
            raise ValueError(f"{given[0]} is for --dry_run; torchrun --nproc-per-node starts training on several GPUs")


@dataclass
class _DrawConfig(_ComputeConfig, _GeneratorConfig):
    """What drawing images needs, whatever the setting."""

    labels: str = "balanced"
    """`balanced`, `random`, class indices and names such as `3` or `0,1,goldfish` (at most `num`, repeated in turn), or
    `frequencies:PATH`, drawn as often as in the data whose manifest.json of prepare-data (or its folder) is PATH."""
    seed: int = number(0, 0, 2**63 - 1)
    """Image i starts from noise that depends on the seed and i only."""
    sampler: Sampler = "heun"
    """Sampler; `onestep` is for consistency models."""
    clamp: Literal["official", "data", "none"] = "official"
    """Clamp of the denoised estimate: [-1,1], the data's true range, or none."""
    batch_size: int = number(64, 1)
    """Images per network call, on each GPU."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp8"] = "fp32"
    """What weights and matrix products are computed in; one that the device lacks gives way to the nearest, with a
    message. `fp32` is the released code's."""
    cuda_graphs: bool | None = None
    """Launch all evaluations of a batch as one CUDA graph; `null`: as the plan says, else on a GPU."""
    s_churn: float = number(0.0, 0)
    """edm_sde: amount of added noise."""
    s_min: float = number(0.0, 0)
    """edm_sde: lowest shifted sigma at which noise is added."""
    s_max: float = number(math.inf, 0, infinite=True)
    """edm_sde: highest shifted sigma at which noise is added."""
    s_noise: float = number(1.0, 0)
    """edm_sde: scale of the added noise."""

    @property
    def churn(self) -> dict[str, float]:
        """Those options of the sampler edm_sde that are not their defaults."""
        values = {name: getattr(self, name) for name in CHURN}
        return {name: value for name, value in values.items() if value != getattr(_DrawConfig, name)}


@dataclass
class SampleConfig(_DrawConfig):
    """Draw images from a trained model."""

    outdir: str = ""
    """Folder for samples.npz, PNG files and grid.png; the same command with the same folder goes on."""
    num: int = number(64, 1, 10_000_000)
    """Images to draw."""
    steps: int = 32
    """Noise levels; heun makes 2(steps-1) evaluations."""
    guidance: float = 1.0
    """Guidance scale; 1 means unguided (with `autoguidance`, 0 does)."""
    interval: tuple[float, float] = number(GUIDANCE_INTERVAL, ordered=True)
    """Unshifted sigma interval of the guidance (low excluded, high included), such as `[0.19,1.61]`."""
    autoguidance: str | None = None
    """Checkpoint of a weaker model to guide away from, with scale `guidance`."""
    error_images: int = number(8, 0)
    """Images to draw in fp32 as well, at most a batch, to report how far those in `precision` are from them."""
    npz: bool = True
    """Write samples.npz, images and labels in the layout of ADM's evaluation."""
    png: bool = False
    """Write png/<class>/<index>.png, one file per image."""

    def _check(self):
        check_sampler(self.sampler, self.steps, **self.churn)
        if not (self.npz or self.png):
            raise ValueError("npz and png are both false, want at least one: there would be nothing to write")


@dataclass
class AppConfig(_GeneratorConfig):
    """Play with a trained model in the browser: images and trajectories. Nothing is compiled."""

    host: str = "127.0.0.1"
    """Address to listen at; this one is reached from this machine alone. There is no password."""
    port: int = number(7860, 1, 65535)
    """Port to listen at."""


@dataclass
class TuneConfig(_Checked):
    """Measure on this device what computes a job fastest, and keep it as a plan that the job then takes."""

    job: Literal["sample", "pretrain", "finetune-diffusion", "finetune-consistency"] = "sample"
    """The job to make a plan for; its options follow, `--config` and `--batch_size` as in the job itself."""
    minutes: float = number(10.0, above=0)
    """After so long nothing more is begun; what was not tried is said."""
    gpus: int | None = number(None, 1)
    """Training: GPUs that share the batch; `null`: those that are visible."""
    output: str | None = None
    """A further file to write the plan to, such as one for other users of this device."""
    seconds: float = number(3.0, above=0)
    """Of timing, for each pair of candidates."""
    limit: float = number(240.0, above=0)
    """Seconds after which a candidate that gives no answer counts as hung."""


@dataclass
class TunedSampleConfig(SampleConfig):
    """A `sample` command to make a plan for: of a checkpoint, or of a preset's shapes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network, where there is no checkpoint."""


@dataclass
class EvaluateConfig(JudgeConfig):
    """Judge samples against real images, or probe an encoder. Needs scikit-learn, but for `reference`."""

    samples: str | None = None
    """samples.npz of `sample` or a folder of images, to judge by `reference` and `inception`, or by `train` and `test`
    (these need class folders)."""
    compare: str | None = None
    """Other samples: whether they differ from `samples` by more than chance would have it."""
    bootstrap: int = number(20, 0)
    """Samples: sets drawn from the images with repetition, whose figures' deviation is the spread; 0: first-order
    estimates, which take no time. KID, recall, FID at infinity and `compare` have estimates of their own."""
    repeats: int = number(1, 1)
    """Samples: parts that are judged apart, image by image in the order of the file, such as three of 50000, of which
    EDM's protocol reports the best FID."""
    batch_size: int | None = number(None, 1)
    """Reference: images per network call; `null`: 64. Protocol: also when they are drawn; `null`: as then."""
    probe: str | None = None
    """Encoder or generator checkpoint, or the name of a preset (freshly initialised), to judge by a linear probe."""
    sigmas: list[float] = field(default_factory=lambda: [0.002, 0.5, 2.0, 5.0])
    """Probe: unshifted noise levels."""
    normalization: Literal["auto", "imagenet", "simple"] = "auto"
    """Probe: pixel scaling; `auto` reads it from the checkpoint (official files and presets: imagenet)."""
    seed: int = number(0, 0, 2**63 - 1)
    """Probe: seed of the noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Probe and reference: where the network runs."""
    protocol: str | None = None
    """A result that `output` has written: its images are drawn and judged again, and compared with it. The settings are
    those in the file; `reference`, `inception`, `dinov2`, `train` and `test` say where the same things are now."""
    checkpoint: str | None = None
    """Protocol: where the weights are now; `null`: where they were."""
    outdir: str | None = None
    """Protocol: folder for the images, as `sample` fills it; the same command goes on."""
    page: str | None = None
    """Samples: HTML file to write the result to, with images and plots (these need matplotlib). A page is replaced, any
    other file refused."""
    output: str | None = None
    """JSON file to write the result to; it is printed in any case. A result of the same settings is replaced, any other
    file refused."""

    def _check(self):
        if self.bootstrap == 1:
            raise ValueError("bootstrap is 1, want 0, or at least 2 sets, which have a deviation")


@dataclass
class SweepConfig(_DrawConfig, JudgeConfig):
    """Search the guidance, interval, EMA width and steps whose images are judged best."""

    outdir: str = ""
    """Folder for sweep.json, sweep.md and plots, which nodes share; the same command with the same folder goes on."""
    num: int = number(10_000, 1, 10_000_000)
    """Images of each of the last settings; figures of fewer are biased, so that only equal numbers are compared."""
    guidance: str = "1.0"
    """Axis: guidance scales. An axis is a list of numbers and ranges start:stop:step, stop included, such as
    `1,1.5:4.0:0.25`; every combination of the axes is a setting. 1 means unguided, drawn once for all intervals."""
    interval: str = "0.19-1.61"
    """Axis: unshifted sigma intervals of the guidance as low-high, such as `0.19-1.61,0.28-2.9`."""
    interval_low: str | None = None
    """Axis: lower ends of the interval, each with every upper end; `null`: that of `interval`."""
    interval_high: str | None = None
    """Axis: upper ends of the interval, each with every lower end; `null`: that of `interval`."""
    steps: str = "32"
    """Axis: noise levels."""
    sigma_rel: str = "null"
    """Axis: widths of the EMA, made from the snapshots in posthoc_ema/ of the run folder `checkpoint`, at the last of
    them; `null`, which may be one of several, is the checkpoint as it is."""
    search: Literal["halving", "grid"] = "halving"
    """`halving` begins with few images and goes on with the best settings and four times as many, up to `num`; `grid`
    draws `num` of every setting."""
    first: int = number(500, 1)
    """Halving: the first round has at least so many images of each setting. FID has a spread, which protects settings
    that are as good as the last that stays, from more images than features on (2048)."""
    keep: float = number(0.25, above=0, most=0.5)
    """Halving: share of the settings that stay, and with them whatever is within one spread of the last of these, up to
    half. Where no spread is known, half stay."""
    figure: str | None = None
    """What is best; `null`: fid, else fd_dinov2, else frechet_distance."""


@dataclass
class PrepareDataConfig(_Checked):
    """Write centre crops of your images as tar shards or class folders, or the embedded digits."""

    source: str = "digits"
    """`digits` (the handwritten digits inside scikit-learn, always a folder), or a folder of class folders, a tar or a
    folder of tars (WebDataset, ImageNet's), or parquet files (as in `data.path`) to centre-crop."""
    outdir: str = ""
    """Folder to write; digits make train/ and test/ in it. The same command goes on after an interruption."""
    layout: Literal["shards", "folder"] = "shards"
    """`shards`: WebDataset tars in mixed order with checksums; `folder`: PNG files in class folders."""
    image_size: int = number(256, 1)
    """Side of the centre crop (not for digits)."""
    format: Literal["png", "jpeg"] = "png"
    """Shards: `png` is lossless, `jpeg` (4:4:4) is smaller and is not."""
    quality: int = number(95, 1, 100)
    """Shards: quality of JPEG."""
    images_per_shard: int = number(2048, 1)
    """Shards: images per tar; each worker makes one at a time."""
    seed: int = number(0, 0)
    """Shards: seed of the order."""
    workers: int = number(4, 0)
    """Processes (not for digits)."""
    max_bad_fraction: float = number(0.01, 0, 1)
    """Share of files that cannot be decoded up to which they are left out (not for digits)."""
    verify: bool = False
    """Write nothing; read the shards in `outdir` and compare them with their checksums."""

    def _check(self):
        if self.format != "png" and self.layout == "folder":
            raise ValueError(f"format is {self.format}: layout folder is of PNG files; take layout shards")


@dataclass
class ExportConfig(_Checked):
    """Write weights as safetensors, official .pth files or a pipeline of diffusers."""

    checkpoint: str = ""
    """Run folder, .safetensors or official .pth."""
    output: str = ""
    """File (.safetensors) or folder (official: nnet.pth and nnet_ema.pth; diffusers: a pipeline's) to write."""
    format: Literal["safetensors", "official", "diffusers"] = "safetensors"
    """`safetensors` holds the preset inside; `official` is what the released code loads, `diffusers` what
    `EPGPipeline.from_pretrained` and `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` load."""


@dataclass
class ReconstructEmaConfig(_Checked):
    """Write EMA weights of any length, from the snapshots of a run with `posthoc_ema.sigma_rel`."""

    run: str = ""
    """Run folder with posthoc_ema/."""
    sigma_rel: float | None = number(None, **SIGMA_REL)
    """Width of the EMA relative to `step`: more than 0, less than 0.2887."""
    step: int | None = number(None, 1)
    """Step at which the EMA ends, one of the snapshots'; `null`: the last."""
    output: str = ""
    """File (.safetensors) to write; it is used like a run's model.safetensors."""
    max_residual: float = number(0.05, 0, 1)
    """Refuse when the snapshots represent the EMA worse than this (relative L2 distance of the profiles)."""
