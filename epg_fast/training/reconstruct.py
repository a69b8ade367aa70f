"""Weights averaged over any length, from the snapshots of a run's tracked averages (`posthoc_ema`).

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (2024, arXiv 2312.02696),
section 3 and its appendix.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from epg_fast.files import check_writable
from epg_fast.models import save_weights
from epg_fast.models.weight_files import open_safetensors
from epg_fast.training.posthoc_ema import FOLDER, checksum, list_snapshots, snapshot_step
from epg_fast.training.power_ema import Fit, fit_profile, gamma_of

# Root mean square of float16's rounding error, relative to a power of two: the spacing 2^-10 over the root of 12.
_ROUNDING = 2**-10 * 12**-0.5


@dataclass(frozen=True)
class _Snapshot:
    path: Path
    metadata: dict
    shapes: dict[str, list[int]]

    @property
    def step(self) -> int:
        return self.metadata["step"]


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
    gamma = gamma_of(sigma_rel)
    snapshots = _read_headers(Path(run) / FOLDER)
    step = snapshots[-1].step if step is None else step
    snapshots = _up_to(step, snapshots)
    tracked = snapshots[0].metadata["sigma_rel"]
    fit = _fit(snapshots, tracked, step, sigma_rel, gamma)
    if fit.residual > max_residual:
        raise ValueError(
            f"sigma_rel {sigma_rel:g} at step {step}: the {len(snapshots)} snapshots up to there (of sigma_rel "
            f"{', '.join(map(str, tracked))}) represent it with a relative residual of {fit.residual:.2g}, over "
            f"max_residual {max_residual:g}; choose a width nearer to theirs or a later step, raise --max_residual, or "
            "train with more frequent snapshots (--posthoc_ema.every)"
        )
    state = _combine(snapshots, tracked, fit.weights.reshape(len(snapshots), len(tracked)))
    made = {"tracked": tracked, "snapshots": len(snapshots), "residual": fit.residual, "rounding": fit.gain * _ROUNDING}
    metadata = {name: value for name, value in snapshots[-1].metadata.items() if name != "crc32"}
    return state, metadata | {"step": step, "sigma_rel": sigma_rel, "posthoc_ema": made}


def _up_to(step: int, snapshots: list[_Snapshot]) -> list[_Snapshot]:
    steps = [s.step for s in snapshots]
    if step not in steps:
        nearest = " or ".join(map(str, sorted(sorted(steps, key=lambda s: abs(s - step))[:2])))
        raise ValueError(
            f"step is {step}, want one of the {len(steps)} that {snapshots[0].path.parent} has a snapshot of "
            f"({steps[0]} to {steps[-1]}), such as {nearest}"
        )
    return snapshots[: steps.index(step) + 1]


def _fit(snapshots: list[_Snapshot], tracked: list[float], step: int, sigma_rel: float, gamma: float) -> Fit:
    if sigma_rel in tracked:
        weights = np.zeros((len(snapshots), len(tracked)))
        weights[-1, tracked.index(sigma_rel)] = 1
        return Fit(weights.ravel(), 0.0)
    steps = np.repeat([float(s.step) for s in snapshots], len(tracked))
    gammas = np.tile([gamma_of(s) for s in tracked], len(snapshots))
    return fit_profile(steps, gammas, step, gamma)


def _combine(snapshots: list[_Snapshot], tracked: list[float], weights: np.ndarray) -> dict[str, torch.Tensor]:
    """sum_ij weights[i, j] * average j of snapshot i, in float32, and the buffers of the last snapshot."""
    prefix = f"{tracked[0]}/"
    names = [name.removeprefix(prefix) for name in snapshots[0].shapes if name.startswith(prefix)]
    state = {name: torch.zeros(snapshots[0].shapes[prefix + name]) for name in names}
    for snapshot, row in zip(snapshots, weights, strict=True):
        if not row.any():
            continue
        with _opened(snapshot.path) as f:
            for name in names:
                for sigma_rel, weight in zip(tracked, row, strict=True):
                    if weight:
                        state[name].add_(_read(f, snapshot, f"{sigma_rel}/{name}").float(), alpha=float(weight))
    with _opened(snapshots[-1].path) as f:
        for name in snapshots[0].shapes:
            if name.startswith("buffers/"):
                state[name.removeprefix("buffers/")] = _read(f, snapshots[-1], name).clone()
    return state


def _read(file, snapshot: _Snapshot, name: str) -> torch.Tensor:
    tensor = file.get_tensor(name)
    if checksum(tensor) != snapshot.metadata.get("crc32", {}).get(name):
        raise ValueError(f"the checksum of {name} does not match")
    return tensor


def _read_headers(folder: Path) -> list[_Snapshot]:
    """All snapshots of a folder by step, checked against each other."""
    paths = list_snapshots(folder) if folder.is_dir() else []
    if not paths:
        raise ValueError(
            f"{folder} holds no snapshots (step_*.safetensors); train with --posthoc_ema.sigma_rel [0.05,0.10]"
        )
    snapshots = [_read_header(path) for path in paths]
    for snapshot in snapshots[1:]:
        _check_same_run(snapshots[0], snapshot)
    return snapshots


def _read_header(path: Path) -> _Snapshot:
    with _opened(path) as f:
        metadata = json.loads((f.metadata() or {}).get("epg_fast", "{}"))
        shapes = {name: list(f.get_slice(name).get_shape()) for name in sorted(f.keys())}
    if not (isinstance(metadata, dict) and isinstance(metadata.get("sigma_rel"), list) and "step" in metadata):
        raise ValueError(f"{path} is not a snapshot of tracked averages: it does not say sigma_rel and step; remove it")
    if metadata["step"] != snapshot_step(path):
        raise ValueError(f"{path} is of step {metadata['step']}, unlike its name; rename or remove it")
    return _Snapshot(path, metadata, shapes)


def _check_same_run(one: _Snapshot, other: _Snapshot) -> None:
    for key in sorted((one.metadata.keys() | other.metadata.keys()) - {"step", "crc32", "untrained_classes"}):
        a, b = one.metadata.get(key), other.metadata.get(key)
        if a != b:
            raise ValueError(
                f"{other.path} is of another run than {one.path.name}: {key} is {b!r}, there {a!r}; remove those that "
                "do not belong here"
            )
    names = sorted(one.shapes.keys() | other.shapes.keys())
    differing = [name for name in names if one.shapes.get(name) != other.shapes.get(name)]
    if differing:
        name = differing[0]
        a, b = (s.shapes.get(name, "missing") for s in (one, other))
        raise ValueError(f"{other.path} is of another model than {one.path.name}: {name} is {b}, there {a}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    try:
        with open_safetensors(path) as f:
            yield f
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable snapshot ({error}); restore it, or remove it to do without") from None
