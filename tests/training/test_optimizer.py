"""One update of all weights and averages: groups, backends that agree, state that any of them resumes."""

import copy
import io
import math
import sys
import textwrap

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from epg_fast.config import OptimizerConfig
from epg_fast.models import EPGViT
from epg_fast.training import optimizer as module
from epg_fast.training.optimizer import make_optimizer
from tests.ops.extension_checks import DEVICE, needs_extension

needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
BACKENDS = [pytest.param("fused", marks=needs_extension), "torch", "apex"]


@pytest.fixture
def network():
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return EPGViT(**sizes, decoder_depth=1, decoder_embed_dim=24, decoder_num_heads=2).to(DEVICE)


def _by_name(network, optimizer):
    names = {id(p): name for name, p in network.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_tokens_are_exempt_from_weight_decay_unless_asked(network):
    groups = _by_name(network, make_optimizer(network, OptimizerConfig(weight_decay=0.1)))
    assert set(groups) == {name for name, _ in network.named_parameters()}
    assert {name for name, group in groups.items() if group["weight_decay"] == 0} == {"pos_embed", "cls_token"}
    groups = _by_name(network, make_optimizer(network, OptimizerConfig(weight_decay=0.1, decay_tokens=True)))
    assert {group["weight_decay"] for group in groups.values()} == {0.1}


def test_layer_decay_falls_towards_the_input(network):
    optimizer = make_optimizer(network, OptimizerConfig(lr=1.0, layer_decay=0.5))
    optimizer.schedule(lr_factor=0.1)
    assert optimizer.lr == pytest.approx(0.1)
    lr = {name: group["lr"] for name, group in _by_name(network, optimizer).items()}
    assert lr["decoder_blocks.0.mlp.fc1.weight"] == lr["norm.weight"] == pytest.approx(0.1)
    assert lr["blocks.1.mlp.fc1.weight"] == pytest.approx(0.05)
    assert lr["blocks.0.mlp.fc1.weight"] == pytest.approx(0.025)
    assert lr["patch_embed.proj.weight"] == lr["pos_embed"] == pytest.approx(0.0125)


NVIDIA_APEX = """
    import torch

    class FusedAdam(torch.optim.Optimizer):
        # What NVIDIA's does, one tensor at a time: the step count is the group's, AdamW only with adam_w_mode.
        def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                     weight_decay=0.0, amsgrad=False, set_grad_none=True):
            assert adam_w_mode and not amsgrad
            super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                beta1, beta2 = group["betas"]
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if not state:
                        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                    m, v = state["exp_avg"], state["exp_avg_sq"]
                    m.copy_(beta1 * m + (1 - beta1) * p.grad)
                    v.copy_(beta2 * v + (1 - beta2) * p.grad * p.grad)
                    m_hat, v_hat = m / (1 - beta1 ** group["step"]), v / (1 - beta2 ** group["step"])
                    p -= group["lr"] * (m_hat / (v_hat.sqrt() + group["eps"]) + group["weight_decay"] * p)
"""


def _install_apex(folder, monkeypatch, files):
    for name in [m for m in sys.modules if m.partition(".")[0] in ("apex", "amp_C")]:
        monkeypatch.delitem(sys.modules, name)
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(folder)


@pytest.fixture(autouse=True)
def apex(tmp_path, monkeypatch):
    """A stand-in with the interface of NVIDIA's apex, which cannot be installed here."""
    fused_adam = "from apex.optimizers.fused_adam import FusedAdam"
    files = {"apex/__init__.py": "", "apex/optimizers/__init__.py": fused_adam, "amp_C.py": ""}
    _install_apex(tmp_path / "apex", monkeypatch, files | {"apex/optimizers/fused_adam.py": NVIDIA_APEX})
    yield
    for name in [m for m in sys.modules if m.partition(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


CONFIG = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "layer_decay": 0.7}


class Run:
    """A network and two averages under one optimiser, with gradients that depend on the step only."""

    def __init__(self, network, backend):
        self.network = copy.deepcopy(network)
        self.averages = [copy.deepcopy(network), copy.deepcopy(network)]
        self.optimizer = make_optimizer(self.network, OptimizerConfig(backend=backend, **CONFIG), self.averages)
        self.steps = 0

    def update(self, steps=1, scale=None, change=lambda network: None):
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.steps)
            for p in self.network.parameters():
                grad = torch.randn(p.shape, generator=generator).to(DEVICE)
                p.grad = grad * (1 if scale is None else scale)
            change(self.network)
            max_norm = None if self.steps < 2 else 0.5
            self.optimizer.schedule(1 / (1 + self.steps), max_norm, [self.steps / (self.steps + 4), 0.99])
            result = self.optimizer.step(scale)
            self.optimizer.zero_grad()
            self.steps += 1
        return result

    def weights(self):
        networks = [self.network, *self.averages]
        return torch.cat([p.detach().flatten() for network in networks for p in network.parameters()])

    def everything(self):
        moments = [v for p in self.network.parameters() for v in self.optimizer.state[p].values()]
        return [self.weights().clone(), *(m.clone() for m in moments)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_counts_as_a_change_of_every_weight(network, backend):
    run = Run(network, backend)
    weights = [p for module in (run.network, *run.averages) for p in module.parameters()]
    before = [weight._version for weight in weights]
    run.update()
    assert all(weight._version > count for weight, count in zip(weights, before, strict=True))


def test_an_average_takes_one_cast_of_its_decay_for_all_weights(network):
    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._to_copy.default
            return func(*args, **(kwargs or {}))

    run = Run(network, "torch")
    with Casts() as casts:
        run.update()
    assert casts.count <= 2 * len(run.averages) < len(list(network.parameters())) / 4


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def in_float64(network, steps):
    """The same run by torch.optim.AdamW, clipping and lerp in float64, written out."""
    network = copy.deepcopy(network)
    groups = make_optimizer(network, OptimizerConfig(backend="torch", **CONFIG)).param_groups
    network.double()
    averages = [copy.deepcopy(network), copy.deepcopy(network)]
    groups = [{"params": g["params"], "lr": g["lr"], "weight_decay": g["weight_decay"]} for g in groups]
    peaks = [g["lr"] for g in groups]
    adamw = torch.optim.AdamW(groups, betas=CONFIG["betas"])
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(DEVICE).double()
        if step >= 2:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        for group, peak in zip(adamw.param_groups, peaks, strict=True):
            group["lr"] = peak / (1 + step)
        adamw.step()
        for average, decay in zip(averages, [step / (step + 4), 0.99], strict=True):
            for a, p in zip(average.parameters(), network.parameters(), strict=True):
                a.data.copy_(decay * a + (1 - decay) * p)
    return torch.cat([p.detach().flatten() for n in (network, *averages) for p in n.parameters()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_follows_the_formulas(network, backend):
    run = Run(network, backend)
    norm, found_inf = run.update(20)
    torch.testing.assert_close(run.weights().double(), in_float64(network, 20), rtol=1e-5, atol=1e-6)
    count = sum(p.numel() for p in network.parameters())
    assert norm.item() == pytest.approx(math.sqrt(count), rel=0.05) and found_inf.item() == 0


@pytest.mark.parametrize("second", BACKENDS)
@pytest.mark.parametrize("first", BACKENDS)
def test_any_backend_goes_on_from_the_state_of_any_other(network, first, second):
    whole = Run(network, second)
    whole.update(6)
    part = Run(network, first)
    part.update(3)
    resumed = Run(part.network, second)
    resumed.averages[0].load_state_dict(part.averages[0].state_dict())
    resumed.averages[1].load_state_dict(part.averages[1].state_dict())
    resumed.optimizer.load_state_dict(through_a_file(part.optimizer.state_dict()))
    resumed.steps = 3
    resumed.update(3)
    if first == second:
        assert torch.equal(resumed.weights(), whole.weights())
    else:
        torch.testing.assert_close(resumed.weights(), whole.weights(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_not_finite_changes_nothing(network, backend):
    run = Run(network, backend)
    run.update(2)
    before = run.everything()

    def spoil(network):
        network.blocks[0].mlp.fc1.weight.grad[0, 0] = math.nan

    norm, found_inf = run.update(change=spoil)
    assert found_inf.item() == 1 and not norm.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, run.everything(), strict=True))
    assert run.update()[1].item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaled_loss_gives_the_same_update_and_norm(network, backend):
    plain, scaled = Run(network, backend), Run(network, backend)
    norm, _ = plain.update(3)
    scaled_norm, _ = scaled.update(3, scale=torch.tensor(1024.0, device=DEVICE))
    torch.testing.assert_close(scaled.weights(), plain.weights(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled_norm, norm)


@needs_extension
def test_parameters_without_a_gradient_stay_and_their_averages_follow(network):
    """As torch does it: no decay and no step for them; a frozen parameter is averaged, too."""
    network.pos_embed.requires_grad_(False)

    def drop(network):
        network.norm.weight.grad = network.pos_embed.grad = None

    fused, plain = Run(network, "fused"), Run(network, "torch")
    for run in (fused, plain):
        run.averages[1].pos_embed.data += 1.0
        run.update(2)
        before = run.network.norm.weight.detach().clone()
        run.update(change=drop)
        assert torch.equal(run.network.norm.weight, before)
        run.update()
        assert run.optimizer.state[run.network.norm.weight]["step"].item() == 3
        assert run.optimizer.state[run.network.norm.bias]["step"].item() == 4
    torch.testing.assert_close(fused.weights(), plain.weights(), rtol=1e-5, atol=1e-6)
    again = Run(fused.network, "fused")
    again.optimizer.load_state_dict(through_a_file(fused.optimizer.state_dict()))
    assert again.optimizer.state[again.network.norm.weight]["step"].item() == 3


@needs_extension
def test_a_skipped_update_leaves_the_averages_of_parameters_without_gradient(network):
    def spoil(network):
        network.blocks[0].mlp.fc1.weight.grad[0, 0] = math.nan
        network.norm.weight.grad = None

    run = Run(network, "fused")
    run.averages[1].norm.weight.data += 1.0
    before = run.everything()
    assert run.update(change=spoil)[1].item() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run.everything(), strict=True))


@needs_extension
def test_state_can_be_loaded_into_an_optimiser_that_has_already_stepped(network):
    source, target = Run(network, "fused"), Run(network, "fused")
    source.update(3)
    target.update(3)
    target.network.load_state_dict(source.network.state_dict())
    target.optimizer.load_state_dict(through_a_file(source.optimizer.state_dict()))
    moments = [s["exp_avg"].clone() for s in target.optimizer.state.values()]
    target.update()
    assert not any(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, target.optimizer.state.values(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_another_layout_is_taken(network, backend):
    def transpose(network):
        weight = network.blocks[0].mlp.fc1.weight
        weight.grad = weight.grad.t().contiguous().t()

    run, plain = Run(network, backend), Run(network, backend)
    run.update(2, change=transpose)
    plain.update(2)
    torch.testing.assert_close(run.weights(), plain.weights(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loaded_state_leaves_the_configurations_learning_rate_and_decay(network, backend):
    run = Run(network, "torch")
    run.update()
    state = through_a_file(run.optimizer.state_dict())
    for group in state["param_groups"]:
        group |= {"lr": 1.0, "peak_lr": 1.0, "weight_decay": 0.9, "betas": (0.1, 0.1)}
    loaded, plain = Run(network, backend), Run(network, backend)
    for other, source in ((loaded, state), (plain, through_a_file(run.optimizer.state_dict()))):
        other.optimizer.load_state_dict(source)
        other.update()
    assert torch.equal(loaded.weights(), plain.weights())


@needs_extension
def test_parameters_that_never_had_a_gradient_have_no_state(network):
    def drop(network):
        network.norm.weight.grad = None

    run = Run(network, "fused")
    run.update(2, change=drop)
    saved = through_a_file(run.optimizer.state_dict())
    assert len(saved["state"]) == len(list(network.parameters())) - 1
    for backend in ("torch", "apex"):
        Run(network, backend).optimizer.load_state_dict(saved)


def _unfit(network, kind):
    if kind == "channels_last":
        return network.to(memory_format=torch.channels_last)
    return network.to(torch.float64)


@needs_extension
@pytest.mark.parametrize(
    ("kind", "message"),
    [("channels_last", "patch_embed.proj.weight has strides"), ("float64", "cls_token is torch.float64")],
)
def test_what_the_fused_update_cannot_take_is_named_and_auto_takes_torch(network, kind, message, log):
    network = _unfit(network, kind)
    with pytest.raises(ValueError, match=f"{message}.*--optimizer.backend torch"):
        make_optimizer(network, OptimizerConfig(backend="fused"))
    assert type(make_optimizer(network, OptimizerConfig())) is module.Optimizer
    if DEVICE == "cpu":
        assert message in log.messages[-1]
    with pytest.raises(ValueError, match="there are 5 averages"):
        make_optimizer(copy.deepcopy(network), OptimizerConfig(backend="fused"), [network] * 5)


class _NothingIsRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [pytest.param("fused", marks=needs_extension), "torch"])
def test_an_update_reads_nothing_on_the_host(network, backend):
    run = Run(network, backend)
    run.update()
    with _NothingIsRead():
        run.update(2)
        run.update(scale=torch.tensor(4.0, device=DEVICE))
    with pytest.raises(AssertionError, match="read on the host"), _NothingIsRead():
        run.update()[1].item()


@needs_extension
@pytest.mark.gpu
@needs_cuda
def test_a_captured_step_follows_the_schedule(network):
    captured, eager = Run(network, "fused"), Run(network, "fused")
    for run in (captured, eager):
        run.update()
    for p in captured.network.parameters():
        p.grad = torch.ones_like(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.optimizer.step()
    for factor in (0.3, 0.1):
        captured.optimizer.schedule(factor, 0.5, [0.9, 0.99])
        graph.replay()
        for p in eager.network.parameters():
            p.grad = torch.ones_like(p)
        eager.optimizer.schedule(factor, 0.5, [0.9, 0.99])
        eager.optimizer.step()
    assert torch.equal(captured.weights(), eager.weights())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_without_any_gradient_is_a_mistake(network, backend):
    run = Run(network, backend)
    with pytest.raises(ValueError, match="got no gradient on any parameter.*call backward"):
        run.optimizer.step()


def test_one_decay_for_each_average(network):
    with pytest.raises(ValueError, match="got 1 decays for 2 averages"):
        Run(network, "torch").optimizer.schedule(decays=[0.9])


@needs_extension
@pytest.mark.skipif(DEVICE == "cuda", reason="the choice on a CPU")
def test_auto_is_fused_on_a_cpu_and_torch_without_the_extension_and_says_so(network, monkeypatch, log):
    assert isinstance(make_optimizer(network, OptimizerConfig()), module.FusedOptimizer)
    monkeypatch.setattr(module, "extension_status", lambda: (False, "not built: run this"))
    assert type(make_optimizer(network, OptimizerConfig())) is module.Optimizer
    assert log.messages == [
        "optimiser: fused (one pass in the C++ extension)",
        "optimiser: torch (the extension is not built: run this)",
    ]


def test_fused_without_the_extension_says_what_to_do(network, monkeypatch):
    monkeypatch.setattr("epg_fast.ops.extension.extension_status", lambda: (False, "not built: run this"))
    with pytest.raises(ValueError, match="'fused'.*not built: run this.*--optimizer.backend torch"):
        make_optimizer(network, OptimizerConfig(backend="fused"))


def _make_apex(network):
    return make_optimizer(network, OptimizerConfig(backend="apex"))


def test_the_apex_of_pypi_is_recognised_and_not_imported(network, tmp_path, monkeypatch):
    _install_apex(tmp_path / "pypi", monkeypatch, {"apex/__init__.py": "raise RuntimeError('a web framework')"})
    with pytest.raises(ValueError, match="the package apex in .* is not NVIDIA's; build NVIDIA's from"):
        _make_apex(network)


def test_apex_without_its_kernels_says_so(network, tmp_path, monkeypatch):
    _install_apex(tmp_path / "bare", monkeypatch, {"amp_C.py": "raise ImportError('no kernels')"})
    with pytest.raises(ValueError, match=r"installed without its kernels \(no kernels\)"):
        _make_apex(network)


def test_no_apex_at_all_says_so(network, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="apex is not installed; build NVIDIA's from .*installs another package"):
        _make_apex(network)


def test_apex_refuses_step_counts_it_cannot_hold(network):
    run = Run(network, "torch")
    run.update(2)
    state = through_a_file(run.optimizer.state_dict())
    state["state"][0]["step"] += 1
    with pytest.raises(ValueError, match=r"updated \[2, 3\] times, apex counts one number per group"):
        Run(network, "apex").optimizer.load_state_dict(state)
