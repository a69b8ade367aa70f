"""The contrastive loss of both stages (SPEC 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from epg_fast.ops.backends import accumulation_dtype

Gather = Callable[[torch.Tensor], Callable[[], torch.Tensor]]
"""Starts to gather the keys of this rank, [B, P], and returns a function that waits for those of all ranks, [G, P]."""


def info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    temperature: float | torch.Tensor,
    everyone: torch.Tensor | None = None,
) -> torch.Tensor:
    """NCE(u, v)_k = logsumexp_j(<u_k, v_j>/tau) - <u_k, v_k>/tau, per sample: [B], at least float32.

    queries, keys: [B, P]. temperature: a number or [B] (one per query).
    everyone: [G, P], the keys that the sum runs over, `keys` among them, in any order: those of the whole global batch.
    None: `keys` themselves. All are L2-normalised here. No gradient should reach the keys (they come from networks
    without gradient in every use). Computed outside autocast. Raises ValueError for shapes that do not fit.
    """
    if queries.shape != keys.shape:
        raise ValueError(f"info_nce: queries have shape {list(queries.shape)}, keys {list(keys.shape)}; want the same")
    everyone = keys if everyone is None else everyone
    if everyone.ndim != 2 or everyone.shape[1] != keys.shape[1] or everyone.shape[0] < keys.shape[0]:
        raise ValueError(
            f"info_nce: everyone's keys have shape {list(everyone.shape)}, want at least {list(keys.shape)}"
        )
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys, everyone = (F.normalize(t.to(accumulation_dtype(t)), dim=-1) for t in (queries, keys, everyone))
        similarity = queries @ everyone.T
        positive = (queries * keys).sum(dim=-1)
        if isinstance(temperature, torch.Tensor) and temperature.ndim:
            return (similarity / temperature[:, None]).logsumexp(dim=-1) - positive / temperature
        return (similarity / temperature).logsumexp(dim=-1) - positive / temperature


def interpolated_temperature(
    sigma: torch.Tensor, tau_min: float, tau_max: float, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> torch.Tensor:
    """Temperature linear in the unshifted sigma: tau_min at sigma_min, tau_max at sigma_max (the paper's schedule)."""
    return tau_min + (sigma - sigma_min) / (sigma_max - sigma_min) * (tau_max - tau_min)


def own_keys(keys: torch.Tensor) -> Callable[[], torch.Tensor]:
    """`Gather` of a single rank."""
    return lambda: keys
