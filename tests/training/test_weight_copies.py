"""Copies of weights in 16 bits change no bit of training, and are never those of other weights."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from epg_fast.runtime import AUTOCAST
from epg_fast.training import optimizer
from epg_fast.training.gradients import compile_stage
from epg_fast.training.optimizer import WeightCopies
from tests.ops.kernel_checks import needs_extension
from tests.training.stages import JOBS, Training

pytest.importorskip("triton")
FUSED = pytest.param("fused", marks=needs_extension)


@pytest.fixture(autouse=True)
def _operators_without_the_interpreter(monkeypatch):
    """Fused operations run what they are on a CPU, PyTorch's operators: Triton's interpreter takes minutes."""
    monkeypatch.setattr("epg_fast.ops.registration.interpreting", lambda: False)


def in_16_bits(job="finetune-diffusion", backend="torch", **fields):
    return Training(job, backend, **({"precision": "bf16", "ops": "triton"} | fields))


def large_weights(training, *names):
    networks = [getattr(training.stage, name) for name in names or ("network",)]
    blocks = [block for network in networks for block in getattr(network, "decoder_blocks", ())]
    linears = [linear for network in networks for _, linear in network.large_linears()]
    return [linear.weight for linear in (*linears, *(block.adaLN_modulation[1] for block in blocks))]


def assert_right(training, weights):
    """Inside `in_use` every weight has a copy, and it is that of the weight."""
    copies = training.state.copies
    with copies.in_use():
        for weight in weights:
            assert torch.equal(copies.get(weight), weight.detach().to(copies.get(weight).dtype))


class _Casts(TorchDispatchMode):
    """The addresses of what is cast, and how many tensors each foreach copy writes."""

    def __init__(self):
        super().__init__()
        self.addresses, self.foreach = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._foreach_copy_.default:
            self.foreach.append(len(args[0]))
        if func is torch.ops.aten._to_copy.default:
            self.addresses.append(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "job, backend, fields",
    [
        *(pytest.param(job, "fused", {}, marks=needs_extension) for job in JOBS),
        *(("finetune-diffusion", "torch", fields) for fields in ({}, {"precision": "fp16"})),
        ("finetune-diffusion", "torch", {"activation_checkpointing": 1.0}),
        ("finetune-diffusion", "torch", {"gradient_accumulation": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_updates_with_copies_and_with_casts_are_the_same_bit_for_bit(job, backend, fields, monkeypatch):
    with_copies = in_16_bits(job, backend, **fields)
    names = {"pretrain": ["network", "ema"], "finetune-consistency": ["network", "perceptual"]}
    assert_right(with_copies, large_weights(with_copies, *names.get(job, ["network"])))
    start = with_copies.stage.network.blocks[0].mlp.fc1.weight.clone()
    monkeypatch.setattr(optimizer, "linears_with_operands", lambda network: ())
    with_casts = in_16_bits(job, backend, **fields)
    assert with_casts.state.copies.get(large_weights(with_casts)[0]) is None
    got, want = with_copies.updated(2), with_casts.updated(2)
    assert not torch.equal(want["network.blocks.0.mlp.fc1.weight"], start)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(("backend", "foreach"), [pytest.param("fused", 0, marks=needs_extension), ("torch", 1)])
def test_an_update_casts_no_large_weight_and_copies_them_in_one_call_at_most(backend, foreach):
    training = in_16_bits("pretrain", backend)
    training.update()
    weights = large_weights(training, "network", "ema")
    with _Casts() as casts:
        training.update()
    assert casts.foreach.count(len(weights)) == foreach
    assert casts.addresses and not {weight.data_ptr() for weight in weights} & {*casts.addresses}


@pytest.mark.parametrize("backend", [FUSED, "torch"])
def test_a_copy_is_never_that_of_another_weight(backend):
    training = in_16_bits("pretrain", backend)
    weights = large_weights(training, "network", "ema")
    for broken in (False, True, False):
        training.update(broken)
        assert_right(training, weights)
    saved = copy.deepcopy(training.stage.network.state_dict())
    training.update()
    training.stage.network.load_state_dict(saved)
    assert_right(training, weights)
    with torch.no_grad():
        weights[2].mul_(2)
    assert_right(training, weights)
    # changed behind an update's back, which then leaves everything as it is
    with torch.no_grad():
        weights[2].mul_(2)
    training.state.optimizer.schedule(1.0, None, [0.5])
    for weight in training.stage.network.parameters():
        weight.grad = torch.full_like(weight, float("nan"))
    training.state.optimizer.step()
    assert_right(training, weights)
    linear = training.stage.network.blocks[0].mlp.fc1
    linear.weight = torch.nn.Parameter(linear.weight.detach() + 1)
    with training.state.copies.in_use():
        operand = training.stage.network.blocks[0].operands["mlp.fc1"]
        assert torch.equal(operand, linear.weight.to(operand.dtype))


def test_only_an_update_reads_copies_and_no_copy_of_a_network_has_them():
    training = in_16_bits()
    training.update()
    network = training.stage.network
    names = [name for name, _ in network.named_buffers()]
    assert all(not module.operands for module in [network, *network.blocks, *network.decoder_blocks])
    with training.state.copies.in_use():
        assert all(module.operands for module in [network, *network.blocks, *network.decoder_blocks])
        assert [name for name, _ in network.named_buffers()] == names
    assert "operands" not in vars(copy.deepcopy(network).blocks[0])


@pytest.mark.parametrize(
    ("fields", "left_out"),
    [
        ({"precision": "fp32"}, ["qkv", "proj", "fc1", "fc2", "skip_linear"]),
        ({"ops": "plain"}, ["qkv", "proj", "fc1", "fc2", "skip_linear"]),
        ({"ops": {"mlp": "triton"}}, ["proj", "skip_linear"]),
        ({"ops": {"proj": "norm"}}, ["fc1", "fc2", "skip_linear"]),
    ],
    ids=str,
)
def test_products_that_would_not_read_a_copy_have_none(fields, left_out):
    ops = fields.pop("ops", "triton")
    training = in_16_bits(ops="plain", **fields)
    training.stage.network.use_ops(ops)
    copies = WeightCopies([training.stage.network], AUTOCAST.get(training.stage.config.precision))
    linears = dict(training.stage.network.large_linears())
    without = {name.rpartition(".")[2] for name, linear in linears.items() if copies.get(linear.weight) is None}
    assert without == set(left_out)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "network"])
def test_compiled_blocks_share_one_graph_and_read_the_copies_of_their_own_weights(how):
    eager, compiled = in_16_bits(), in_16_bits()
    compile_stage(compiled.stage, how, backend="aot_eager")
    compiled.update()
    with torch._dynamo.config.patch(error_on_recompile=True):
        got, want = compiled.updated(1), eager.updated(2)
    assert all(torch.equal(got[name], want[name]) for name in want)
