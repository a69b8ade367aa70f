"""One optimiser step of a whole model, with gradient norm, clipping, AdamW and one average: the extension against
torch's AdamW(fused=True) with foreach calls, NVIDIA's apex where it is installed, and the plain reference.

`torch` and `apex` get no check of the gradients' finiteness, which costs the extension nothing: it would be a
synchronisation with the host. The traffic model is that of one pass, the norm's read of the gradients included. There
is no "compile": the reference decides on the host whether to update.
"""

import functools

import pytest
import torch

from epg_fast.ops import fused_adamw_ema_, global_norm
from epg_fast.ops.fused_adamw_ema import SPEC
from tests.ops.extension_checks import AVAILABLE, REASON
from tests.ops.test_fused_adamw_ema import assert_follows_torch, make_state

SHAPES = SPEC.shapes if torch.cuda.is_available() else ((20, 300_000), (500, 33))
DECAY, MAX_NORM, BETAS = 0.9999, 0.5, (0.9, 0.99)


def _tensors(shape, device, seed):
    count, size = shape
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(size, generator=generator, device=device) for _ in range(count)]


class Ours:
    def __init__(self, shape, device, dtype, backend, seed):
        self.params = _tensors(shape, device, seed)
        self.grads = [p.to(dtype, copy=True) for p in self.params]
        self.moments = [[torch.zeros_like(p) for p in self.params] for _ in range(2)]
        count, float64 = len(self.params), {"dtype": torch.float64, "device": device}
        self.rest = {
            "steps": torch.zeros(count, device=device),
            "lrs": torch.full((count,), 1e-4, **float64),
            "weight_decays": torch.full((count,), 0.01, **float64),
            "max_norm": torch.tensor(MAX_NORM, **float64),
            "emas": [[p.clone() for p in self.params]],
            "ema_weights": torch.tensor([1 - DECAY], **float64),
            "betas": BETAS,
            "backend": backend,
        }

    def step(self):
        norm, found_inf = global_norm(self.grads, backend=self.rest["backend"])
        fused_adamw_ema_(self.params, self.grads, *self.moments, norm=norm, found_inf=found_inf, **self.rest)


class Torch:
    def __init__(self, shape, device, dtype, seed):
        self.params = [p.requires_grad_() for p in _tensors(shape, device, seed)]
        self.emas = [p.detach().clone() for p in self.params]
        for p in self.params:
            p.grad = p.detach().clone()  # AdamW wants gradients in the parameters' dtype
        self.optimizer = self.make_optimizer(device)

    def make_optimizer(self, device):
        capturable = device == "cuda"
        return torch.optim.AdamW(self.params, lr=1e-4, betas=BETAS, fused=True, capturable=capturable)

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.emas, self.params, 1 - DECAY)


class Apex(Torch):
    def make_optimizer(self, device):
        from apex.optimizers import FusedAdam

        return FusedAdam(self.params, lr=1e-4, betas=BETAS, weight_decay=0.01, capturable=True)


def _provider(name, shape, device, dtype):
    if name in ("extension", "eager"):
        if name == "extension" and not AVAILABLE:
            pytest.skip(f"extension: {REASON}")
        if name == "eager" and device == "cuda":
            pytest.skip("eager: the reference reads found_inf on the host, which no CUDA graph holds")
        backend = "extension" if name == "extension" else "plain"
        assert_follows_torch(make_state(max_norm=MAX_NORM), backend, 3, (dtype,))
        return functools.partial(Ours, shape, device, dtype, backend)
    if dtype != torch.float32:
        pytest.skip(f"{name}: takes gradients in the parameters' dtype only")
    if name == "apex":
        pytest.importorskip("amp_C", reason="apex: NVIDIA's is not installed")
    return functools.partial(Apex if name == "apex" else Torch, shape, device, dtype)


@pytest.mark.parametrize("provider", ["extension", "torch", "apex", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_optimizer_step(measure, device, shape, dtype, provider):
    make = _provider(provider, shape, device, dtype)
    norm_bytes = dtype.itemsize * torch.Size(shape).numel()
    measure(
        lambda model: model.step(),
        lambda seed: [make(seed=seed)],
        SPEC.bytes(shape, dtype.itemsize) + norm_bytes,
        SPEC.flops(shape),
        op=SPEC.name,
        shape=list(shape),
        dtype=str(dtype),
        direction="step",
        provider=provider,
    )
