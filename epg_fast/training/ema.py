"""EMA of the weights: power-function decays, the networks that are tracked, in host memory if asked, and snapshots.

The EMA at step t with exponent gamma weighs the weights theta(tau) of the steps so far by the profile

    p_{t,gamma}(tau) = (gamma + 1) tau^gamma / t^(gamma+1)    for 0 <= tau <= t, else 0,

whose width (standard deviation) relative to t is

    sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2).

Updated once per step, with decay (1 - 1/t)^(gamma+1) at step t = 1, 2, ..., it is exact for weights that are constant
between the steps: theta(i) counts with the integral of the profile over [i - 1, i].

A snapshot, posthoc_ema/step_<step>.safetensors, holds `<sigma_rel>/<parameter>` for every tracked width,
`buffers/<name>` as the network had them, and the stage's metadata with `step`, `sigma_rel` and each tensor's `crc32`.
`epg_fast.training.reconstruct` makes EMA of other lengths from them. Parameters are float16: half of float32's disk
space and an eighth of bfloat16's error, at most 2^-11 of a value (3e-8 for values below 6e-5). A tensor with a value
that float16 cannot hold (beyond 65504) stays float32.

The tracked EMA themselves are float32. Late in a long run an update adds less than half a unit in the last place, and
is lost, where the weight is nearer to its EMA than about t / (gamma + 1) * 6e-8 of its value. Weights that tremble lose
less. Simulated for 600 000 steps, weights of about 1 that drift by about 0.01 ended off by 2.5e-3 (sigma_rel 0.10) and
1.3e-3 (0.05) without any noise, by 1e-3 and 1e-4 with noise of 1e-3 in each step.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (2024, arXiv 2312.02696),
section 3 and its appendix.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from epg_fast.config import check_sigma_rel
from epg_fast.models import save_weights
from epg_fast.training.checkpoint import Background, step_path
from epg_fast.training.stages import Stage, ema_copy

FOLDER, ENDING = "posthoc_ema", ".safetensors"
# An EMA reads and writes memory, which more cores do not make faster; others decode images.
_MOST_THREADS = 8


def gamma_of(sigma_rel: float) -> float:
    """Exponent gamma > 0 of the profile whose relative width is `sigma_rel`.

    The positive root of gamma^3 + 7 gamma^2 + (16 - s) gamma + (12 - s) with s = sigma_rel^-2. Raises ValueError
    unless 0 < sigma_rel < 12^(-1/2), the width at gamma = 0.
    """
    check_sigma_rel(sigma_rel)
    s = sigma_rel**-2
    gamma = float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max())
    # one Newton step takes away what the eigenvalue solver leaves
    value = ((gamma + 7) * gamma + 16 - s) * gamma + 12 - s
    return gamma - value / ((3 * gamma + 14) * gamma + 16 - s)


def power_decay(step: int, gamma: float) -> float:
    """Decay of the EMA at update `step` (1-based): (1 - 1/step)^(gamma+1); 0 at the first, which is copied."""
    return (1 - 1 / step) ** (gamma + 1)


class HostEma:
    """Updates `emas`, networks in host memory, in a thread while the device goes on; without any, nothing is done.

    Around each update of `network`, which has the same structure on any device, call `before_update` and
    `after_update`. After it the weights are copied, on a stream of their own, to pinned memory; the thread waits for
    the copy and takes them into the EMA, which are at most one update behind. Three things wait:
        the next update on the device  until the weights that it changes are copied;
        the host, before the next copy until the thread is done with the pinned memory, so that an EMA that takes longer
                                       than a step of training slows it down;
        a reader of the EMA            for `wait`.
    The arithmetic is torch.lerp's in float32, as on the device. On a CPU, where only tests need it, the copy is made at
    once.
    """

    def __init__(self, network: torch.nn.Module, emas: Sequence[torch.nn.Module]):
        self._emas = [list(ema.parameters()) for ema in emas]
        if not emas:
            return
        self._weights = list(network.parameters())
        self._device = self._weights[0].device
        cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if cuda else None
        self._copied: torch.cuda.Event | None = None
        self._staging = [torch.empty(p.shape, dtype=p.dtype, pin_memory=cuda) for p in self._weights]
        self._found_inf = torch.zeros((), pin_memory=cuda)
        threads = torch.get_num_threads()
        self._thread = Background("epg-ema")
        self._thread.submit(self._start)
        self._thread.wait()
        # what the thread has set for itself is also what threads begin with
        torch.set_num_threads(threads)

    def before_update(self) -> None:
        """Let the device's next work, which may change the weights, wait until they are copied; the host does not."""
        if self._emas and self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    @torch.no_grad()
    def after_update(self, decays: Sequence[float], found_inf: torch.Tensor) -> None:
        """Take the weights into the EMA with these decays, unless found_inf, [] on their device, is 1.

        Returns at once, or when the thread is done with the update before; raises what that raised.
        """
        if not self._emas:
            return
        self.wait()
        # on the main stream, which may use this tensor's memory again
        self._found_inf.copy_(found_inf, non_blocking=True)
        if self._stream is None:
            torch._foreach_copy_(self._staging, self._weights)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                torch._foreach_copy_(self._staging, self._weights, non_blocking=True)
            self._copied = self._stream.record_event()
        decays, copied = list(decays), self._copied
        self._thread.submit(lambda: self._average(decays, copied))

    def wait(self) -> None:
        """Wait until the newest update is in the EMA; raises what the thread raised, once."""
        if self._emas:
            self._thread.wait()

    def _start(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, min(_MOST_THREADS, cores // 2)))
        # the first call in a thread takes over what any thread has set last: now, before the other sets it back
        torch.get_num_threads()
        if self._stream is not None:
            torch.cuda.set_device(self._device)  # threads begin on device 0

    def _average(self, decays: list[float], copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        if self._found_inf > 0:
            return
        for ema, decay in zip(self._emas, decays, strict=True):
            torch._foreach_lerp_(ema, self._staging, 1 - decay)


class PosthocEma:
    """The tracked EMA of a run: `networks` are for others to update, with `decays`.

    With `offload_ema` the main rank alone has them, in host memory.

    Args:
        stage: its network is followed, from the values it has now. Without `posthoc_ema.sigma_rel` none is tracked, and
            then nothing is due.
    """

    def __init__(self, stage: Stage):
        config = stage.config
        self.sigma_rel = list(config.posthoc_ema.sigma_rel or ())
        copies = [ema_copy(stage.network, stage.ranks, config.offload_ema) for _ in self.sigma_rel]
        self.networks = [network for network in copies if network is not None]
        self._stage = stage
        self._gammas = [gamma_of(s) for s in self.sigma_rel]
        self._folder = Path(config.outdir) / FOLDER

    def decays(self, step: int) -> list[float]:
        """Decay of each EMA at the update of batch `step`, counted from 0."""
        return [power_decay(step + 1, gamma) for gamma in self._gammas]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`<sigma_rel>/<parameter>` of each EMA that this rank has; the tensors are the live ones."""
        pairs = zip(self.sigma_rel, self.networks, strict=False)  # no network where another rank has them
        return {f"{s}/{name}": p.detach() for s, network in pairs for name, p in network.named_parameters()}

    def is_due(self, step: int) -> bool:
        """Whether this rank has a part in a snapshot at `step`: a multiple of `posthoc_ema.every`, or the last.

        Never at 0, where a run may be stopped: an EMA over no steps has no profile.
        """
        due = self._stage.config.is_due(step, self._stage.config.posthoc_ema.every)
        return bool(self.networks and due and (self._stage.ranks.main or self._stage.sharded))

    def snapshot(self) -> dict[str, torch.Tensor]:
        """What `write` takes; the tensors are the live ones."""
        network = self._stage.network
        parameters = {name for name, _ in network.named_parameters()}
        buffers = {f"buffers/{name}": b for name, b in network.state_dict().items() if name not in parameters}
        return self.state_dict() | buffers

    def write(self, step: int, snapshot: dict[str, torch.Tensor]) -> None:
        """Write a `snapshot` of `step`, copied to host memory; in any thread.

        Raises OSError when the disk does not take it; the earlier ones are untouched.
        """
        tensors = {n: tensor if n.startswith("buffers/") else _narrow(tensor) for n, tensor in snapshot.items()}
        self._folder.mkdir(exist_ok=True)
        metadata = self._stage.metadata() | {"step": step, "sigma_rel": self.sigma_rel}
        metadata["crc32"] = {name: checksum(tensor) for name, tensor in tensors.items()}
        save_weights(step_path(self._folder, step, ENDING), tensors, metadata)


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes; safetensors files have none."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _narrow(parameter: torch.Tensor) -> torch.Tensor:
    narrow = parameter.half()
    return narrow if narrow.isfinite().all() else parameter
