"""EPG in the plainest PyTorch: the baseline of the benchmarks, without a line of what it is compared with.

Operations are those of the released implementation, one call each, in its order. Networks: LayerNorm in float32,
modulation, gates, concatenated skips and GELU as passes of their own; an adaLN projection per block. Sampling: noise
levels, denoiser, guidance in two calls, samplers as loops. Training: the losses, and a step that reads the loss on the
host, clips, updates and averages parameter by parameter. Parameter names are the released checkpoints'.

Attention is `F.scaled_dot_product_attention`, what anyone would write today: the explicit softmax is slower, and would
flatter what is compared with it. Precision is autocast's, from outside.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Collection

import torch
import torch.nn as nn
import torch.nn.functional as F

# encoder and generator (SPEC 3), for weights that are loaded: the initial ones are PyTorch's defaults


def from_config(kind: type[nn.Module], config: dict) -> nn.Module:
    """PlainEncoder or PlainGenerator from a preset's fields; those that are the other network's are ignored."""
    return kind(**{name: config[name] for name in inspect.signature(kind).parameters if name in config})


class LayerNorm(nn.LayerNorm):
    """In float32, whatever comes in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, L, D] -> [B, L, D]."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        x = x.transpose(1, 2).reshape(batch, length, dim)
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x: [B, L, D]; shift, scale: [B, 1, D]."""
    return x * (1 + scale) + shift


class DecoderBlock(nn.Module):
    def __init__(self, dim: int, encoder_dim: int, num_heads: int, mlp_ratio: float, drop: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, drop)
        self.norm2 = LayerNorm(dim)
        self.skip_linear = nn.Linear(dim + encoder_dim, dim)
        self.skip_norm = LayerNorm(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(encoder_dim, 6 * dim))
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, cond: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        """x: [B, L, D], cond: [B, 1, E], skip: [B, L, E] -> [B, L, D]."""
        if skip is not None:
            x = self.skip_norm(self.skip_linear(torch.cat([x, skip], dim=-1)))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """t: [B] -> [cos(t f), sin(t f)]: [B, dim] in float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    phase = t[:, None].float() * frequencies[None]
    embedding = torch.cat([torch.cos(phase), torch.sin(phase)], dim=-1)
    return torch.cat([embedding, torch.zeros_like(embedding[:, :1])], dim=-1) if dim % 2 else embedding


class Trunk(nn.Module):
    """What both networks begin with: class token, time token and patches, position embedding, blocks, norm."""

    def __init__(self, image_size, patch_size, in_channels, embed_dim, depth, num_heads, mlp_ratio):
        super().__init__()
        self.image_size, self.patch_size, self.in_channels = image_size, patch_size, in_channels
        self.embed_dim = embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + (image_size // patch_size) ** 2, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(embed_dim)

    def embed(self, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        """x: [B, C, H, W], time: [B, 1, E], label: [B, 1, E] or None -> tokens [B, L, E]."""
        cls = self.cls_token.expand(len(x), -1, -1)
        if label is not None:
            cls = cls + label
        return torch.cat([cls, time, self.patch_embed(x)], dim=1) + self.pos_embed


class PlainEncoder(Trunk):
    """`forward(x, t)`: x [B, C, H, W], scaled by c_in, t [B], 250 ln sigma -> (projection [B, P], feature [B, E])."""

    def __init__(
        self,
        image_size=256,
        patch_size=16,
        in_channels=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        hidden_dim=4096,
        output_dim=256,
    ):
        super().__init__(image_size, patch_size, in_channels, embed_dim, depth, num_heads, mlp_ratio)
        self.projection_head = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, output_dim, bias=False),
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(x, timestep_embedding(t, self.embed_dim)[:, None])
        for block in self.blocks:
            x = block(x)
        feature = self.norm(x[:, 0])
        return self.projection_head(feature), feature


class PlainGenerator(Trunk):
    """`forward(x, t, y)`: x [B, C, H, W], scaled by c_in, t [B], 250 ln sigma, y [B] labels -> [B, C, H, W]."""

    def __init__(
        self,
        image_size=256,
        patch_size=16,
        in_channels=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        decoder_depth=12,
        decoder_embed_dim=1584,
        decoder_num_heads=22,
        num_classes=1000,
        drop=0.0,
    ):
        super().__init__(image_size, patch_size, in_channels, embed_dim, depth, num_heads, mlp_ratio)
        self.num_classes = num_classes
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(decoder_embed_dim, embed_dim, decoder_num_heads, mlp_ratio, drop) for _ in range(decoder_depth)
        )
        self.encoder_to_decoder = nn.Linear(embed_dim, decoder_embed_dim) if decoder_embed_dim != embed_dim else None
        self.out_norm = LayerNorm(decoder_embed_dim)
        self.out = nn.Linear(decoder_embed_dim, patch_size**2 * in_channels)
        self.class_embed = nn.Embedding(num_classes + 1, embed_dim)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        time, label = timestep_embedding(t, self.embed_dim)[:, None], self.class_embed(y)[:, None]
        x = self.embed(x, time, label)
        skips = []
        for block in self.blocks:
            x = block(x)
            skips.append(x)
        x = self.norm(x)
        if self.encoder_to_decoder is not None:
            x = self.encoder_to_decoder(x)
        cond = time + label
        for block in self.decoder_blocks:
            x = block(x, cond, skips.pop() if skips else None)
        return self.unpatchify(self.out(self.out_norm(x[:, 2:])))

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [B, N, p*p*C], channels fastest -> [B, C, H, W]."""
        side, p = self.image_size // self.patch_size, self.patch_size
        x = tokens.reshape(-1, side, side, p, p, self.in_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_channels, self.image_size, self.image_size)


# noise levels, denoiser, guidance and samplers (SPEC 2 and 7); a sigma is shifted (times H/64) unless it says not

# ImageNet's mean and twice its standard deviation (SPEC 1).
_MEAN, _SCALE = (0.485, 0.456, 0.406), (0.458, 0.448, 0.45)

SIGMA_MIN, SIGMA_MAX, RHO, SIGMA_DATA = 0.002, 80.0, 7.0, 0.5


def sigma_at(index: torch.Tensor, num_scales: int) -> torch.Tensor:
    """Unshifted level of a grid of `num_scales`, 0 the noisiest: float64 of index's shape."""
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return (high + index.double() / (num_scales - 1) * (low - high)) ** RHO


def levels(steps: int, image_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A sampler's levels, noisiest first: [steps] in float32."""
    if steps == 1:
        return torch.tensor([SIGMA_MAX * image_size / 64], device=device)
    return (sigma_at(torch.arange(steps, device=device), steps) * image_size / 64).float()


def per_image(values: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]


def network_input(x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(c_in x [B, C, H, W], 250 ln sigma [B]) for x [B, C, H, W] and sigma [B]."""
    c_in = 1 / (sigma**2 + SIGMA_DATA**2).sqrt()
    return per_image(c_in) * x, 250 * sigma.log()


class Denoiser:
    """`denoiser(x, sigma, y)`: x [B, C, H, W], sigma [B], y [B] -> the clean estimate; `x0` or `edm` (SPEC 2)."""

    def __init__(self, network: Callable, parameterization: str = "x0"):
        self.network, self.parameterization = network, parameterization

    def network_output(self, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.network(*network_input(x, sigma), y).float()

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        output = self.network_output(x, sigma, y)
        if self.parameterization == "x0":
            return output
        above = sigma - SIGMA_MIN * x.shape[-1] / 64
        c_skip = SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2)
        c_out = above * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()
        return per_image(c_skip) * x + per_image(c_out) * output


class IntervalGuidance(Denoiser):
    """u + scale (c - u) for low < sigma <= high, unshifted; c and u are two calls of the network (SPEC 7)."""

    def __init__(self, network, uncond_label: int, parameterization="x0", scale=2.5, interval=(0.19, 1.61)):
        super().__init__(network, parameterization)
        self.uncond_label, self.scale, self.interval = uncond_label, scale, interval

    def network_output(self, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        cond = super().network_output(x, sigma, y)
        low, high = (end * x.shape[-1] / 64 for end in self.interval)
        if not low < sigma[0].item() <= high:
            return cond
        uncond = super().network_output(x, sigma, torch.full_like(y, self.uncond_label))
        return uncond + self.scale * (cond - uncond)


def clean_estimate(denoiser: Denoiser, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """At one level, sigma [], for all images, clamped to what pixels can be."""
    return denoiser(x, sigma * torch.ones(len(x), device=x.device), y).clamp(-1, 1)


def slope_at(denoiser: Denoiser, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """dx/dsigma of the probability-flow ODE."""
    return (x - clean_estimate(denoiser, x, sigma, y)) / sigma


@torch.no_grad()
def sample_onestep(denoiser: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """noise: [B, C, H, W] of unit variance, sigmas: [S] -> images [B, C, H, W]."""
    return clean_estimate(denoiser, noise * sigmas[0], sigmas[0], y)


@torch.no_grad()
def sample_heun(denoiser: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Two evaluations in every interval, the last included."""
    x = noise * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = slope_at(denoiser, x, sigma, y)
        ahead = x + (sigma_next - sigma) * slope
        x = x + (sigma_next - sigma) * (slope + slope_at(denoiser, ahead, sigma_next, y)) / 2
    return x


class Sampler:
    """`sampler(noise, labels)`: images [B, 3, H, W] in [0, 1], float32 in host memory.

    network: PlainGenerator. steps: levels of Heun's method with interval guidance on an x0 network; 1: one step of an
    edm network. dtype: of autocast, None for float32.
    """

    def __init__(self, network: torch.nn.Module, steps: int, dtype: torch.dtype | None, scale: float, interval):
        self.network, self.dtype, self.interval = network, dtype, interval
        self.device = network.pos_embed.device
        self.levels = levels(steps, network.image_size, self.device)
        if steps == 1:
            self.denoiser = Denoiser(network, "edm")
        else:
            self.denoiser = IntervalGuidance(network, network.num_classes, "x0", scale, interval)

    def __call__(self, noise: torch.Tensor, labels: torch.Tensor, sigmas: torch.Tensor | None = None) -> torch.Tensor:
        """sigmas: other levels than all, of which a trajectory in part is made."""
        sigmas = self.levels if sigmas is None else sigmas
        method = sample_onestep if len(self.levels) == 1 else sample_heun
        products = torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()
        with products:
            x = method(self.denoiser, noise, sigmas, labels.to(self.device))
        mean, scale = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (_MEAN, _SCALE))
        return (x * scale + mean).clamp(0, 1).cpu()

    def network_calls(self, sigmas: torch.Tensor) -> int:
        """Of a trajectory through these levels."""
        if len(sigmas) == 1:
            return 1
        low, high = (end * self.network.image_size / 64 for end in self.interval)
        ends = [sigma for pair in zip(sigmas.tolist(), sigmas[1:].tolist(), strict=False) for sigma in pair]
        return sum(2 if low < sigma <= high else 1 for sigma in ends)

    def part(self, intervals: int) -> torch.Tensor:
        """Neighbouring levels around so many intervals, with a share of guided ones that is nearest to all levels'."""
        wanted = self.network_calls(self.levels) / (len(self.levels) - 1) * intervals
        windows = [self.levels[i : i + intervals + 1] for i in range(len(self.levels) - intervals)]
        return min(windows, key=lambda window: abs(self.network_calls(window) - wanted))


# the three losses (SPEC 4 to 6), with one network call for each image that needs one, and a step that trains


def info_nce(queries: torch.Tensor, keys: torch.Tensor, temperature: float) -> torch.Tensor:
    """queries, keys: [B, P] -> [B], in float32."""
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = F.normalize(queries.float(), dim=-1), F.normalize(keys.float(), dim=-1)
        similarity = queries @ keys.T / temperature
        return torch.logsumexp(similarity, dim=-1) - (queries * keys).sum(dim=-1) / temperature


def encode(encoder: nn.Module, image: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(projection, feature) of an image [B, C, H, W] that has noise of sigma [] in it."""
    return encoder(*network_input(image, sigma * torch.ones(len(image), device=image.device)))


def pretraining_loss(
    online: nn.Module,
    target: nn.Module,
    x: torch.Tensor,
    view1: torch.Tensor,
    view2: torch.Tensor,
    noise: torch.Tensor,
    index: torch.Tensor,
    num_scales: int,
    contrastive_temperature: float = 0.2,
    temperature: float = 0.1,
) -> torch.Tensor:
    """x, view1, view2, noise: [B, C, H, W]; index: [], of the whole batch -> loss of each image [B]."""
    shift = x.shape[-1] / 64
    t, r = ((sigma_at(index + i, num_scales) * shift).float() for i in (0, 1))
    clean = torch.full_like(t, SIGMA_MIN * shift)
    noised1, noised2 = view1 + clean * noise, view2 + clean * noise
    projection1, _ = encode(online, noised1, clean)
    projection2, _ = encode(online, noised2, clean)
    _, feature_t = encode(online, x + t * noise, t)
    with torch.no_grad():
        _, feature_r = encode(online, x + r * noise, r)
        key1, _ = encode(target, noised1, clean)
        key2, _ = encode(target, noised2, clean)
    contrastive = info_nce(projection1, key2, contrastive_temperature)
    contrastive = contrastive + info_nce(projection2, key1, contrastive_temperature)
    return contrastive + info_nce(feature_t, feature_r, temperature)


def denoising_loss(
    network: nn.Module,
    x: torch.Tensor,
    noise: torch.Tensor,
    y: torch.Tensor,
    sigma: torch.Tensor,
    num_scales: int = 1280,
    parameterization: str = "x0",
) -> torch.Tensor:
    """sigma: [B], unshifted, snapped to the grid -> loss of each image [B]."""
    grid = sigma_at(torch.arange(num_scales, device=x.device), num_scales).float()
    index = (sigma[:, None] - grid[None]).abs().argmin(dim=1)
    level = (sigma_at(index, num_scales) * x.shape[-1] / 64).float()
    weight = (1 / (sigma_at(index, num_scales) - sigma_at(index + 1, num_scales))).float()
    denoised = Denoiser(network, parameterization)(x + per_image(level) * noise, level, y)
    return weight * ((denoised - x) ** 2).mean(dim=(1, 2, 3))


def consistency_r(t: torch.Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> torch.Tensor:
    """The lower level for t: [B], both unshifted."""
    return (t * (1 - (1 + k * torch.sigmoid(-b * t)) / q**stage)).clamp(min=SIGMA_MIN)


def consistency_loss(
    network: nn.Module,
    x: torch.Tensor,
    noise: torch.Tensor,
    y: torch.Tensor,
    t: torch.Tensor,
    r: torch.Tensor,
    stage: int,
    perceptual: nn.Module | None = None,
    huber_c: float = 0.06,
    temperature: float = 0.1,
) -> torch.Tensor:
    """t, r: [B], unshifted; stage 0 compares with x. perceptual: a frozen encoder in eval mode -> loss of each [B]."""
    shift = x.shape[-1] / 64
    t, r = t * shift, r * shift
    denoiser, seed = Denoiser(network, "edm"), int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    y_t = denoiser(x + per_image(t) * noise, t, y)
    y_r = x
    if stage > 0:
        torch.manual_seed(seed)  # the same dropout mask
        with torch.no_grad():
            y_r = denoiser(x + per_image(r) * noise, r, y)
    distance = ((y_t - y_r) ** 2).sum(dim=(1, 2, 3))
    weight = torch.where(t > r, 1 / (t - r), 0.0)
    loss = weight * distance / (distance.detach() + huber_c**2).sqrt()
    if perceptual is None or stage == 0:
        return loss
    clean = torch.full((), SIGMA_MIN * shift, device=x.device)
    queries, _ = encode(perceptual, y_t, clean)
    with torch.no_grad():
        keys, _ = encode(perceptual, x, clean)
    return loss + info_nce(queries, keys, temperature)


class Trainer:
    """A network in training: AdamW, clipping, loss scale and the EMA that follows its weights.

    ema: a copy of the network, of which only parameters are averaged. dtype: of autocast, None for float32; float16
    scales the loss. exempt: names of the parameters without weight decay. The learning rate is that behind the warm-up;
    the released schedules cost nothing.
    """

    def __init__(
        self,
        network: nn.Module,
        ema: nn.Module,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        exempt: Collection[str] = (),
        ema_decay: float = 0.9999,
        clip_norm: float | None = None,
        dtype: torch.dtype | None = torch.float16,
    ):
        self.network, self.ema, self.ema_decay, self.clip_norm = network, ema, ema_decay, clip_norm
        self.device_type, self.dtype = next(network.parameters()).device.type, dtype
        named = list(network.named_parameters())
        groups = [
            {"params": [p for name, p in named if name not in exempt], "weight_decay": weight_decay},
            {"params": [p for name, p in named if name in exempt], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, foreach=False, fused=False)
        self.scaler = torch.amp.GradScaler(
            self.device_type,
            init_scale=2.0**14,
            growth_factor=2 ** (1 / 1000),
            backoff_factor=0.5,
            growth_interval=1,
            enabled=dtype == torch.float16,
        )

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device_type, self.dtype) if self.dtype else contextlib.nullcontext()

    def step(self, loss_of: Callable[..., torch.Tensor], *arguments, **options) -> float:
        """Update the weights from the mean of loss_of(network, *arguments, **options), and return it."""
        self.optimizer.zero_grad()
        with self.autocast():
            loss = loss_of(self.network, *arguments, **options).mean()
        self.scaler.scale(loss).backward()
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # or a gradient was not finite, and nothing has been updated
            self.update_ema()
        return loss.item()

    @torch.no_grad()
    def update_ema(self) -> None:
        for averaged, p in zip(self.ema.parameters(), self.network.parameters(), strict=True):
            averaged.mul_(self.ema_decay).add_(p, alpha=1 - self.ema_decay)
