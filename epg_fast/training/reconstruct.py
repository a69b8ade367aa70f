"""EMA of any length, from the snapshots of those that a run has tracked (`epg_fast.training.ema` has the formulas).

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (2024, arXiv 2312.02696),
section 3 and its appendix. All arithmetic on profiles is float64.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from epg_fast.files import check_writable, differences
from epg_fast.models import save_weights
from epg_fast.models.weight_files import open_safetensors
from epg_fast.training.checkpoint import by_step
from epg_fast.training.ema import ENDING, FOLDER, checksum, gamma_of

# Root mean square of float16's rounding error, relative to a power of two: the spacing 2^-10 over the root of 12.
_ROUNDING = 2**-10 * 12**-0.5
# Directions of the profiles' span that are smaller than this, relatively, are rounding errors of the inner products.
_SMALLEST_EIGENVALUE = 1e-12


@dataclass(frozen=True)
class _Snapshot:
    path: Path
    metadata: dict
    shapes: dict[str, list[int]]

    @property
    def step(self) -> int:
        return self.metadata["step"]

    @property
    def kind(self) -> dict:
        """What all snapshots of a run have in common."""
        own = ("step", "crc32", "untrained_classes", "class_names")
        return {name: value for name, value in self.metadata.items() if name not in own} | self.shapes


def reconstruct_file(
    run: str | os.PathLike,
    output: str | os.PathLike,
    sigma_rel: float,
    step: int | None = None,
    max_residual: float = 0.05,
) -> str:
    """Write what `reconstruct` returns to `output` (.safetensors), like a run's model.safetensors: one line about it.

    Raises ValueError as `reconstruct` does and for an output that exists or has another ending, OSError when the disk
    does not take it.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"output {output}: want a name that ends in .safetensors")
    if output.exists():
        raise ValueError(f"{output} exists; nothing is overwritten, choose another --output")
    check_writable(output, "output")
    state, metadata = reconstruct(run, sigma_rel, step, max_residual)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_weights(output, state, metadata)
    made = metadata["posthoc_ema"]
    return (
        f"{output}: sigma_rel {sigma_rel:g} (gamma {gamma_of(sigma_rel):.4g}) at step {metadata['step']} from "
        f"{made['snapshots']} snapshots of sigma_rel {', '.join(map(str, made['tracked']))}; relative residual of the "
        f"profile {made['residual']:.1e}, the snapshots' float16 adds about {made['rounding']:.1e} of a weight"
    )


def reconstruct(
    run: str | os.PathLike, sigma_rel: float, step: int | None = None, max_residual: float = 0.05
) -> tuple[dict[str, torch.Tensor], dict]:
    """(state dict in float32, metadata) of the weights of a run folder, averaged up to `step` with width `sigma_rel`.

    The weights of the snapshots up to `step` are fitted by `fit_profile`; the files are read one after the other, so
    that memory holds one model and one tensor. Buffers (BatchNorm statistics of a pre-training head) are those of the
    snapshot at `step`. metadata: the run's, with `step`, `sigma_rel` and how it was made.
    step: one that has a snapshot (the end of a profile between two cannot be represented); None for the last.
    Raises ValueError for a width or step that cannot be reached, for a fit worse than `max_residual`, and for snapshots
    that are missing, damaged or not of one model, naming the file.
    """
    snapshots, fit = _plan(run, sigma_rel, step, max_residual)
    step, tracked = snapshots[-1].step, snapshots[0].metadata["sigma_rel"]
    state = _combine(snapshots, tracked, fit.weights.reshape(len(snapshots), len(tracked)))
    made = {"tracked": tracked, "snapshots": len(snapshots), "residual": fit.residual, "rounding": fit.gain * _ROUNDING}
    metadata = {name: value for name, value in snapshots[-1].metadata.items() if name != "crc32"}
    return state, metadata | {"step": step, "sigma_rel": sigma_rel, "posthoc_ema": made}


def reconstructed_step(
    run: str | os.PathLike, sigma_rel: float, step: int | None = None, max_residual: float = 0.05
) -> int:
    """The step of the weights that `reconstruct` would return; raises what it would, but reads no weights."""
    return _plan(run, sigma_rel, step, max_residual)[0][-1].step


def _plan(
    run: str | os.PathLike, sigma_rel: float, step: int | None, max_residual: float
) -> tuple[list[_Snapshot], Fit]:
    """The snapshots up to `step`, and what each counts for; see `reconstruct`."""
    gamma = gamma_of(sigma_rel)
    snapshots = _read_headers(Path(run) / FOLDER)
    steps, tracked = [s.step for s in snapshots], snapshots[0].metadata["sigma_rel"]
    step = steps[-1] if step is None else step
    if step not in steps:
        nearest = " or ".join(map(str, sorted(sorted(steps, key=lambda s: abs(s - step))[:2])))
        raise ValueError(
            f"step is {step}, want one of the {len(steps)} that {snapshots[0].path.parent} has a snapshot of "
            f"({steps[0]} to {steps[-1]}), such as {nearest}"
        )
    snapshots = snapshots[: steps.index(step) + 1]
    if sigma_rel in tracked:
        weights = np.zeros((len(snapshots), len(tracked)))
        weights[-1, tracked.index(sigma_rel)] = 1
        return snapshots, Fit(weights.ravel(), 0.0)
    ends = np.repeat([float(s.step) for s in snapshots], len(tracked))
    fit = fit_profile(ends, np.tile([gamma_of(s) for s in tracked], len(snapshots)), step, gamma)
    if fit.residual > max_residual:
        raise ValueError(
            f"sigma_rel {sigma_rel:g} at step {step}: the {len(snapshots)} snapshots up to there (of sigma_rel "
            f"{', '.join(map(str, tracked))}) represent it with a relative residual of {fit.residual:.2g}, over "
            f"max_residual {max_residual:g}; choose a width nearer to theirs or a later step, raise --max_residual, or "
            "train with more frequent snapshots (--posthoc_ema.every)"
        )
    return snapshots, fit


def _combine(snapshots: list[_Snapshot], tracked: list[float], weights: np.ndarray) -> dict[str, torch.Tensor]:
    """sum_ij weights[i, j] * EMA j of snapshot i, in float32, and the buffers of the last snapshot."""
    shapes, prefix = snapshots[0].shapes, f"{tracked[0]}/"
    state = {n.removeprefix(prefix): torch.zeros(shape) for n, shape in shapes.items() if n.startswith(prefix)}
    names = list(state)
    for snapshot, row in zip(snapshots, weights, strict=True):
        with _opened(snapshot.path) as f:
            for name in names:
                for sigma_rel, weight in zip(tracked, row, strict=True):
                    if weight:
                        state[name].add_(_read(f, snapshot, f"{sigma_rel}/{name}").float(), alpha=float(weight))
            if snapshot is snapshots[-1]:
                buffers = [name for name in shapes if name.startswith("buffers/")]
                state |= {name.removeprefix("buffers/"): _read(f, snapshot, name).clone() for name in buffers}
    return state


def _read(file, snapshot: _Snapshot, name: str) -> torch.Tensor:
    tensor = file.get_tensor(name)
    if checksum(tensor) != snapshot.metadata["crc32"].get(name):
        raise ValueError(f"the checksum of {name} does not match")
    return tensor


def _read_headers(folder: Path) -> list[_Snapshot]:
    """All snapshots of a folder by rising step, checked against the first."""
    snapshots = []
    for step, path in reversed(by_step(folder, ENDING).items()):
        with _opened(path) as f:
            metadata = json.loads((f.metadata() or {}).get("epg_fast", "{}"))
            if not (isinstance(metadata, dict) and metadata.keys() >= {"step", "sigma_rel", "crc32"}):
                raise ValueError("it does not say step, sigma_rel and crc32")
            if metadata["step"] != step:
                raise ValueError(f"it is of step {metadata['step']}, unlike its name")
            shapes = {name: list(f.get_slice(name).get_shape()) for name in sorted(f.keys())}
        snapshots.append(_Snapshot(path, metadata, shapes))
        if changed := differences(snapshots[0].kind, snapshots[-1].kind):
            raise ValueError(
                f"{path} is not of the run or model of {snapshots[0].path.name}: {changed}; remove those that do not "
                "belong here"
            )
    if not snapshots:
        raise ValueError(
            f"{folder} holds no snapshots (step_*.safetensors); train with --posthoc_ema.sigma_rel [0.05,0.10]"
        )
    return snapshots


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    try:
        with open_safetensors(path) as f:
            yield f
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable snapshot ({error}); restore it, or remove it to do without") from None


def inner_products(steps_a, gammas_a, steps_b, gammas_b) -> np.ndarray:
    """Integral of p_a p_b over tau, with the arguments (floats or arrays) broadcast against each other.

    For t_a <= t_b: (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) * (t_a / t_b)^gamma_b / t_b.
    """
    steps_a, gammas_a, steps_b, gammas_b = (np.asarray(v, np.float64) for v in (steps_a, gammas_a, steps_b, gammas_b))
    earlier, later = np.minimum(steps_a, steps_b), np.maximum(steps_a, steps_b)
    gammas_of_later = np.where(steps_a <= steps_b, gammas_b, gammas_a)
    factor = (gammas_a + 1) * (gammas_b + 1) / (gammas_a + gammas_b + 1)
    return factor * (earlier / later) ** gammas_of_later / later


@dataclass(frozen=True)
class Fit:
    """How an EMA is put together: sum_i weights[i] * EMA i."""

    weights: np.ndarray
    """[N], with sum 1."""
    residual: float
    """L2 distance of the combined profile from the wanted one, over the L2 norm of the wanted one."""

    @property
    def gain(self) -> float:
        """Root of the sum of squares of the weights: what independent errors of the EMA are multiplied by."""
        return float(np.sqrt(np.square(self.weights).sum()))


def fit_profile(steps: np.ndarray, gammas: np.ndarray, step: float, gamma: float) -> Fit:
    """Represent the profile (step, gamma) by the profiles (steps[i], gammas[i]): least squares, weights of sum 1.

    The sum is an addition to the paper's fit, whose networks normalise their weights: what does not change during
    training is reproduced whatever the residual. Rounding hides residuals below 1e-7; they are given as 0.
    """
    products = inner_products(steps[:, None], gammas[:, None], steps, gammas)
    wanted = inner_products(steps, gammas, step, gamma)
    norm = float(inner_products(step, gamma, step, gamma))
    scale = np.diagonal(products) ** -0.5
    values, vectors = np.linalg.eigh(products * scale[:, None] * scale)
    kept = values > _SMALLEST_EIGENVALUE * values[-1]
    values, vectors = values[kept], vectors[:, kept]

    def solve(right):
        return scale * (vectors @ (vectors.T @ (scale * right) / values))

    weights, of_ones = solve(wanted), solve(np.ones_like(wanted))
    weights += (1 - weights.sum()) / of_ones.sum() * of_ones
    residual = (norm - 2 * weights @ wanted + weights @ products @ weights) / norm
    return Fit(weights, math.sqrt(residual) if residual > 1e-14 else 0.0)
