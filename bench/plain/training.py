"""The three losses (SPEC 4 to 6), with one network call for each image that needs one, and a step that trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection

import torch
import torch.nn as nn
import torch.nn.functional as F

from bench.plain.sampling import SIGMA_MIN, Denoiser, network_input, per_image, sigma_at


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
