"""One update of all weights and their EMA: groups, backends that agree, state that any of them resumes."""

import copy
import math
import re

import pytest
import torch
from safetensors.torch import load, save

from epg_fast.config import OptimizerConfig
from epg_fast.models import EPGViT
from epg_fast.training import optimizer as module
from epg_fast.training.optimizer import make_optimizer
from tests.ops.kernel_checks import DEVICE, needs_extension
from tests.waiting import NothingIsRead

FUSED = pytest.param("fused", marks=needs_extension)
BACKENDS = [FUSED, "torch"]
CONFIG = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}


@pytest.fixture
def network():
    """One with frozen parameters: a decoder block without a skip."""
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    network = EPGViT(**sizes, decoder_depth=1, decoder_embed_dim=24, decoder_num_heads=2).to(DEVICE)
    network.decoder_blocks[0].skip_linear.requires_grad_(False)
    return network


def _by_name(optimizer):
    return {name: group for group in optimizer.param_groups for name in group["names"]}


def test_tokens_are_exempt_from_weight_decay_unless_asked(network):
    groups = _by_name(make_optimizer(network, OptimizerConfig(weight_decay=0.1)))
    assert set(groups) == {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name for name, group in groups.items() if group["weight_decay"] == 0} == {"pos_embed", "cls_token"}
    groups = _by_name(make_optimizer(network, OptimizerConfig(weight_decay=0.1, decay_tokens=True)))
    assert {group["weight_decay"] for group in groups.values()} == {0.1}


# ---- updates


class Run:
    """A network and two EMA under one optimiser, with gradients that depend on the step only."""

    def __init__(self, network, backend):
        self.network = copy.deepcopy(network)
        self.emas = [copy.deepcopy(network), copy.deepcopy(network)]
        self.optimizer = make_optimizer(self.network, OptimizerConfig(backend=backend, **CONFIG), self.emas)
        self.steps = 0

    def update(self, steps=1, scale=None, change=lambda network: None):
        for _ in range(steps):
            for p, grad in _gradients(self.network, self.steps):
                p.grad = grad * (1 if scale is None else scale)
            change(self.network)
            max_norm = None if self.steps < 2 else 0.5
            self.optimizer.schedule(1 / (1 + self.steps), max_norm, [self.steps / (self.steps + 4), 0.99])
            result = self.optimizer.step(scale)
            self.optimizer.zero_grad()
            self.steps += 1
        return result

    def weights(self):
        networks = [self.network, *self.emas]
        return torch.cat([p.detach().flatten() for network in networks for p in network.parameters()])

    def everything(self):
        return [self.weights(), *(value.clone() for value in self.optimizer.state_dict().values())]


def _gradients(network, step):
    generator = torch.Generator().manual_seed(step)
    for p in network.parameters():
        if p.requires_grad:
            yield p, torch.randn(p.shape, generator=generator).to(DEVICE, p.dtype)


def in_float64(network, steps):
    """The same run by torch.optim.AdamW, clipping and lerp in float64, written out."""
    network = copy.deepcopy(network)
    groups = make_optimizer(network, OptimizerConfig(backend="torch", **CONFIG)).param_groups
    network.double()
    emas = [copy.deepcopy(network), copy.deepcopy(network)]
    adamw = torch.optim.AdamW([{k: g[k] for k in ("params", "lr", "weight_decay")} for g in groups], betas=(0.9, 0.99))
    for step in range(steps):
        for p, grad in _gradients(network, step):
            p.grad = grad
        if step >= 2:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        for group in adamw.param_groups:
            group["lr"] = CONFIG["lr"] / (1 + step)
        adamw.step()
        for ema, decay in zip(emas, [step / (step + 4), 0.99], strict=True):
            for a, p in zip(ema.parameters(), network.parameters(), strict=True):
                a.data.copy_(decay * a + (1 - decay) * p)
    return torch.cat([p.detach().flatten() for n in (network, *emas) for p in n.parameters()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_follows_the_formulas(network, backend):
    """And counts as a change of every trained weight, which copies of weights and autograd rely on."""
    run = Run(network, backend)
    weights = [p for part in (run.network, *run.emas) for n, p in part.named_parameters() if "skip_linear" not in n]
    before = [weight._version for weight in weights]
    norm, found_inf = run.update(12)
    torch.testing.assert_close(run.weights().double(), in_float64(network, 12), rtol=1e-5, atol=1e-6)
    assert all(weight._version > count for weight, count in zip(weights, before, strict=True))
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert norm.item() == pytest.approx(math.sqrt(count), rel=0.05) and found_inf.item() == 0


@pytest.mark.parametrize("second", BACKENDS)
@pytest.mark.parametrize("first", BACKENDS)
def test_any_backend_goes_on_from_the_state_of_any_other(network, first, second):
    """Through a file of tensors, and where the other has made updates of its own before."""
    whole, start, resumed = Run(network, second), Run(network, first), Run(network, second)
    whole.update(6)
    start.update(3)
    resumed.update(1)
    for ours, saved in zip([resumed.network, *resumed.emas], [start.network, *start.emas], strict=True):
        ours.load_state_dict(saved.state_dict())
    saved = load(save(start.optimizer.state_dict()))
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert saved.keys() == {f"{moment}/{name}" for moment in ("exp_avg", "exp_avg_sq") for name in trained} | {"step"}
    for name, tensor in resumed.optimizer.state_dict().items():
        tensor.copy_(saved[name])
    resumed.steps = 3
    resumed.update(3)
    tolerance = {"rtol": 0, "atol": 0} if first == second else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(resumed.weights(), whole.weights(), **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaled_loss_and_a_gradient_of_another_layout_give_the_same_update(network, backend):
    def transpose(network):
        weight = network.blocks[0].mlp.fc1.weight
        weight.grad = weight.grad.t().contiguous().t()

    plain, scaled = Run(network, backend), Run(network, backend)
    norm, _ = plain.update(3)
    scaled_norm, _ = scaled.update(3, scale=torch.tensor(1024.0, device=DEVICE), change=transpose)
    torch.testing.assert_close(scaled.weights(), plain.weights(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled_norm, norm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_without_a_gradient_is_a_mistake_and_named(network, backend):
    def drop(network):
        network.norm.weight.grad = None

    run = Run(network, backend)
    with pytest.raises(ValueError, match="got 1 decays for 2 EMA"):
        run.optimizer.schedule(decays=[0.9])
    before = run.everything()
    with pytest.raises(ValueError, match="got no gradient on norm.weight.*call backward.*or freeze it"):
        run.update(change=drop)
    assert all(torch.equal(a, b) for a, b in zip(before, run.everything(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_reads_nothing_on_the_host(network, backend):
    run, scale = Run(network, backend), torch.tensor(4.0, device=DEVICE)
    with NothingIsRead():
        run.update(2)
        run.update(scale=scale)
        with pytest.raises(AssertionError, match="the host waits"):
            run.update()[1].item()


@needs_extension
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_captured_step_follows_the_schedule(network):
    captured, eager = Run(network, "fused"), Run(network, "fused")

    def ones(run):
        for p in run.network.parameters():
            p.grad = torch.ones_like(p)

    for run in (captured, eager):
        run.update()
    ones(captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.optimizer.step()
    for factor in (0.3, 0.1):
        captured.optimizer.schedule(factor, 0.5, [0.9, 0.99])
        graph.replay()
        ones(eager)
        eager.optimizer.schedule(factor, 0.5, [0.9, 0.99])
        eager.optimizer.step()
    assert torch.equal(captured.weights(), eager.weights())


# ---- the choice


@needs_extension
@pytest.mark.parametrize(
    "change, emas, message",
    [
        (lambda n: n.to(memory_format=torch.channels_last), 0, "patch_embed.proj.weight is .* with strides"),
        (lambda n: n.double(), 0, "cls_token is torch.float64"),
        (lambda n: n, 5, "got 5 EMA, the fused update keeps 4 at most"),
    ],
    ids=["channels last", "float64", "five EMA"],
)
def test_what_the_fused_update_cannot_take_is_named_and_auto_takes_torch(change, emas, message, network, log):
    network = change(network)
    with pytest.raises(ValueError, match=f"{message}.*--optimizer.backend torch"):
        make_optimizer(network, OptimizerConfig(backend="fused"), [network] * emas)
    assert type(make_optimizer(network, OptimizerConfig(), [network] * emas, planned="fused")) is module.Optimizer
    assert re.search(message, log.messages[-1])


@needs_extension
@pytest.mark.skipif(DEVICE == "cuda", reason="the choice on a CPU")
def test_auto_is_what_is_planned_else_fused_on_a_cpu_and_torch_without_the_extension(network, monkeypatch, log):
    make = lambda **options: type(make_optimizer(network, OptimizerConfig(), **options))  # noqa: E731
    assert make() is module.FusedOptimizer
    assert make(planned="plain") is module.Optimizer
    monkeypatch.setattr(module, "extension_status", lambda: (False, "not built: run this"))
    assert make() is module.Optimizer
    assert log.messages == [
        "optimiser: fused (one pass in the C++ extension)",
        "optimiser: torch (as planned)",
        "optimiser: torch (the extension is not built: run this)",
    ]


def test_fused_without_the_extension_says_what_to_do(network, monkeypatch):
    monkeypatch.setattr("epg_fast.ops.extension.extension_status", lambda: (False, "not built: run this"))
    with pytest.raises(ValueError, match="'fused'.*not built: run this.*--optimizer.backend torch"):
        make_optimizer(network, OptimizerConfig(backend="fused"))
