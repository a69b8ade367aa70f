"""Power-function averages that training keeps beside the stage's own, and their snapshots on disk.

`epg_fast.training.reconstruct` makes averages of other lengths from the snapshots; `power_ema` has the formulas.

A snapshot, posthoc_ema/step_<step>.safetensors, holds `<sigma_rel>/<parameter>` for every tracked width,
`buffers/<name>` as the network had them, and the stage's metadata with `step`, `sigma_rel` and each tensor's `crc32`.
Parameters are float16: half of float32's disk space and an eighth of bfloat16's error, at most 2^-11 of a value (3e-8
for values below 6e-5). A tensor with a value that float16 cannot hold (beyond 65504) stays float32.

The averages themselves are float32, as the stage's own. Late in a long run an update adds less than half a unit in the
last place, and is lost, where the weight is nearer to its average than about t / (gamma + 1) * 6e-8 of its value.
Weights that tremble lose less. Simulated for 600 000 steps, weights of about 1 that drift by about 0.01 ended off by
2.5e-3 (sigma_rel 0.10) and 1.3e-3 (0.05) without any noise, by 1e-3 and 1e-4 with noise of 1e-3 in each step.
"""

from __future__ import annotations

import logging
import re
import zlib
from pathlib import Path

import torch

from epg_fast.config import RunConfig
from epg_fast.models import save_weights
from epg_fast.training.host_average import follower
from epg_fast.training.parallel import local
from epg_fast.training.power_ema import gamma_of, power_decay
from epg_fast.training.stages import Stage

log = logging.getLogger("epg_fast")
FOLDER = "posthoc_ema"
_NAME = re.compile(r"step_(\d+)\.safetensors")


class PosthocEma:
    """The tracked averages of a run: `averages` are for others to update, with `decays`.

    With `offload_ema` the main rank alone has them, in host memory.

    Args:
        config: `posthoc_ema.sigma_rel` None tracks nothing, and then nothing is due.
        stage: its network is followed, from the values it has now.
    """

    def __init__(self, config: RunConfig, stage: Stage):
        self.sigma_rel = list(config.posthoc_ema.sigma_rel or ())
        self.averages = [
            average for _ in self.sigma_rel if (average := follower(stage.network, stage.ranks, config.offload_ema))
        ]
        self._stage, self._every, self._steps = stage, config.posthoc_ema.every, config.steps
        self._gammas = [gamma_of(s) for s in self.sigma_rel]
        self._folder = Path(config.outdir) / FOLDER

    def decays(self, step: int) -> list[float]:
        """Decay of each average at the update after `step` updates."""
        return [power_decay(step + 1, gamma) for gamma in self._gammas]

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """sigma_rel -> parameters of its average; the tensors are the live ones."""
        if not self.averages:  # none are tracked, or another rank has them
            return {}
        pairs = zip(self.sigma_rel, self.averages, strict=True)
        return {str(s): {n: p.detach() for n, p in average.named_parameters()} for s, average in pairs}

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Load what `state_dict` returned, of sharded averages this rank's parts.

        Raises ValueError for other widths.
        """
        own = [str(sigma_rel) for sigma_rel in self.sigma_rel]
        if set(own) != state.keys():
            raise ValueError(f"the checkpoint has averages of sigma_rel {list(state)}, wanted {own}")
        for sigma_rel, parameters in self.state_dict().items():
            for name, parameter in parameters.items():
                local(parameter).copy_(state[sigma_rel][name])

    def is_due(self, step: int) -> bool:
        """Whether this rank has a part in a snapshot at `step`: a multiple of `posthoc_ema.every`, or the last.

        Never at 0, where a run may be stopped: an average over no steps has no profile.
        """
        due = step > 0 and (step % self._every == 0 or step == self._steps)
        return bool(self.averages and due and (self._stage.ranks.main or self._stage.sharded))

    def snapshot(self) -> dict[str, torch.Tensor]:
        """What `write` takes; the tensors are the live ones."""
        tensors = {
            f"{sigma_rel}/{name}": parameter
            for sigma_rel, parameters in self.state_dict().items()
            for name, parameter in parameters.items()
        }
        network = self._stage.network
        parameters = {name for name, _ in network.named_parameters()}
        return tensors | {f"buffers/{name}": b for name, b in network.state_dict().items() if name not in parameters}

    def write(self, step: int, snapshot: dict[str, torch.Tensor]) -> None:
        """Write a `snapshot` of `step`, copied to host memory; in any thread.

        Raises OSError when the disk does not take it; the earlier ones are untouched.
        """
        tensors = {n: tensor if n.startswith("buffers/") else _narrow(tensor) for n, tensor in snapshot.items()}
        self._folder.mkdir(exist_ok=True)
        metadata = self._stage.metadata() | {"step": step, "sigma_rel": self.sigma_rel}
        metadata["crc32"] = {name: checksum(tensor) for name, tensor in tensors.items()}
        save_weights(self._folder / f"step_{step:09d}.safetensors", tensors, metadata)

    def discard_after(self, step: int) -> None:
        """Remove what a killed run wrote after `step`, where training now goes on; main rank only.

        The run will write these snapshots again. Until then nobody shall mistake the old ones for its own.
        """
        if not (self._stage.ranks.main and self._folder.is_dir()):
            return
        stale = [path for path in list_snapshots(self._folder) if snapshot_step(path) > step]
        for path in [*stale, *self._folder.glob(".step_*.tmp*")]:
            path.unlink(missing_ok=True)
        if stale:
            log.info("%d snapshots in %s are of steps after %d and are removed", len(stale), self._folder, step)


def list_snapshots(folder: Path) -> list[Path]:
    """Snapshots of a folder by rising step."""
    return sorted((f for f in folder.iterdir() if _NAME.fullmatch(f.name)), key=snapshot_step)


def snapshot_step(path: Path) -> int:
    """Step in a snapshot's name."""
    return int(_NAME.fullmatch(path.name)[1])


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes; safetensors files have none."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _narrow(parameter: torch.Tensor) -> torch.Tensor:
    narrow = parameter.half()
    return narrow if narrow.isfinite().all() else parameter
