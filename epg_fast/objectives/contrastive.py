"""The contrastive loss of both stages (SPEC 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    temperature: float | torch.Tensor,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """NCE(u, v)_k = logsumexp_j(<u_k, v_j>/tau) - <u_k, v_k>/tau, per sample: [B], at least float32.

    queries, keys: [B, P]; both are L2-normalised here. temperature: a number or [B] (one per query).
    gather: keys of this rank [B, P] -> keys of all ranks [G, P]; no gradient flows through it (keys come from networks
    without gradient in every use). Computed outside autocast.
    """
    if queries.shape != keys.shape:
        raise ValueError(f"info_nce: queries have shape {list(queries.shape)}, keys {list(keys.shape)}; want the same")
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = (
            F.normalize(t.to(torch.promote_types(t.dtype, torch.float32)), dim=-1) for t in (queries, keys)
        )
        everyone = keys if gather is None else gather(keys)
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
