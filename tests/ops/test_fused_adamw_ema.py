import dataclasses
import math

import pytest
import torch
from torch.utils._pytree import tree_map

from epg_fast.ops import fused_adamw_ema_, global_norm
from tests.ops.kernel_checks import CPU, DEVICE, GPU, assert_close_to_reference, make_tensors, needs_extension

# Odd sizes, an empty tensor, one of no dimensions, one that spans several blocks and threads.
SHAPES = [(33, 7), (1,), (0, 4), (), (130, 257), (40_003,), (16,)]
BETAS, EPS = (0.9, 0.99), 1e-8


@dataclasses.dataclass
class State:
    """Arguments of `fused_adamw_ema_`, by name."""

    params: list
    exp_avgs: list
    exp_avg_sqs: list
    steps: torch.Tensor
    lrs: torch.Tensor
    weight_decays: torch.Tensor
    max_norm: torch.Tensor
    emas: list
    ema_weights: torch.Tensor
    copies: list
    ema_copies: list = ()

    def arguments(self):
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def update(self, grads, backend, **changes):
        norm, found_inf = global_norm(grads, backend="plain")
        arguments = (
            self.arguments()
            | {"grads": grads, "norm": norm, "found_inf": found_inf, "betas": BETAS, "eps": EPS}
            | changes
        )
        fused_adamw_ema_(**arguments, backend=backend)

    def tensors(self):
        averages = [t for average in self.emas for t in average]
        copies = [copy for copy in (*self.copies, *self.ema_copies) if copy is not None]
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *averages, *copies, self.steps]


def make_state(shapes=SHAPES, averages=1, copies=False, max_norm=math.inf, offset=0, dtype=torch.float32):
    def placed(values):
        """At `offset` values behind an aligned address."""
        buffer = torch.zeros(values.numel() + offset, dtype=dtype, device=DEVICE)
        buffer[offset:] = values.flatten()
        return buffer[offset:].view(values.shape)

    params = [placed(t) for t in make_tensors(shapes)]
    float64 = {"dtype": torch.float64, "device": DEVICE}
    return State(
        params=params,
        exp_avgs=[placed(torch.zeros(s)) for s in shapes],
        exp_avg_sqs=[placed(torch.zeros(s)) for s in shapes],
        steps=torch.zeros(len(shapes), device=DEVICE),
        lrs=torch.tensor([1e-3 * 0.8 ** (i % 5) for i in range(len(shapes))], **float64),
        weight_decays=torch.tensor([0.1 if i % 3 else 0.0 for i in range(len(shapes))], **float64),
        max_norm=torch.tensor(max_norm, **float64),
        emas=[[placed(p) for p in params] for _ in range(averages)],
        ema_weights=torch.tensor([0.05, 0.7, 1e-4, 0.5][:averages], **float64),
        copies=[p.bfloat16() for p in params] if copies else [],
    )


class TorchAdamW:
    """The same update by torch.optim.AdamW, torch.nn.utils' clipping and lerp, in any dtype."""

    def __init__(self, state, dtype):
        self.params = [p.to(dtype, copy=True).requires_grad_() for p in state.params]
        self.emas = [[p.detach().clone() for p in self.params] for _ in state.emas]
        self.weights, self.max_norm = state.ema_weights.tolist(), state.max_norm.item()
        groups = zip(self.params, state.lrs.tolist(), state.weight_decays.tolist(), strict=True)
        groups = [{"params": [p], "lr": lr, "weight_decay": decay} for p, lr, decay in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=dtype == torch.float32)

    @torch.no_grad()
    def update(self, grads):
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad.to(p.dtype, copy=True)
        torch.nn.utils.clip_grad_norm_(self.params, self.max_norm)
        self.optimizer.step()
        for average, weight in zip(self.emas, self.weights, strict=True):
            for e, p in zip(average, self.params, strict=True):
                e.lerp_(p, weight)

    def named(self):
        state = [self.optimizer.state[p] for p in self.params]
        return {
            "params": self.params,
            "exp_avgs": [s["exp_avg"] for s in state],
            "exp_avg_sqs": [s["exp_avg_sq"] for s in state],
        } | {f"emas[{k}]": average for k, average in enumerate(self.emas)}


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def assert_follows_torch(state, backend, updates, grad_dtypes=(torch.float32,)):
    exact, same_dtype = TorchAdamW(state, torch.float64), TorchAdamW(state, torch.float32)
    for step in range(updates):
        grads = make_tensors([p.shape for p in state.params], seed=100 + step)
        grads = [g.mul(0.3).to(grad_dtypes[i % len(grad_dtypes)]) for i, g in enumerate(grads)]
        state.update(grads, backend)
        exact.update(grads)
        same_dtype.update(grads)
    got = {name: getattr(state, name) for name in ("params", "exp_avgs", "exp_avg_sqs")}
    got |= {f"emas[{k}]": average for k, average in enumerate(state.emas)}
    for name, tensors in got.items():
        assert_close_to_reference(
            flat(tensors), flat(same_dtype.named()[name]), flat(exact.named()[name]), name=f"{name} after {updates}"
        )
    assert torch.equal(state.steps, torch.full_like(state.steps, updates))


MIXED = (torch.bfloat16, torch.float32)


@needs_extension
@pytest.mark.slow
@pytest.mark.parametrize(
    ("grad_dtypes", "max_norm"), [((torch.float32,), math.inf), ((torch.bfloat16,), 0.5), (MIXED, 0.5)], ids=str
)
def test_50_updates_follow_torch_in_float64(grad_dtypes, max_norm):
    assert_follows_torch(make_state(max_norm=max_norm, averages=2), "extension", 50, grad_dtypes)


@needs_extension
@pytest.mark.parametrize("shape", [(2, 16_385), *(pytest.param(s, marks=GPU) for s in ((349, 65_537), (5000, 4096)))])
def test_updates_of_long_and_of_many_tensors(shape):
    count, size = shape
    assert_follows_torch(make_state([(size,)] * count, max_norm=1.0), "extension", 3)


@needs_extension
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_tensors(offset):
    state = make_state(offset=offset, max_norm=0.5)
    state.copies = [torch.zeros(p.numel() + offset, dtype=torch.bfloat16, device=DEVICE) for p in state.params]
    state.copies = [c[offset:].view(p.shape) for c, p in zip(state.copies, state.params, strict=True)]
    state.ema_copies = [torch.zeros_like(c) for c in state.copies]
    assert_follows_torch(state, "extension", 3, MIXED)
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(state.copies, state.params, strict=True))
    assert all(torch.equal(c, e.bfloat16()) for c, e in zip(state.ema_copies, state.emas[0], strict=True))


@needs_extension
@pytest.mark.slow
def test_thousands_of_tiny_tensors():
    assert_follows_torch(make_state([(1 + i % 7,) for i in range(3000)], max_norm=0.5), "extension", 2)


@needs_extension
@pytest.mark.parametrize("averages", [0, 1, 3, 4])
def test_any_number_of_averages_up_to_four(averages):
    assert_follows_torch(make_state(averages=averages, copies=averages == 3, max_norm=0.5), "extension", 3, MIXED)


def test_the_reference_is_torch_adamw_in_float64():
    state = make_state(max_norm=0.5, averages=2, dtype=torch.float64)
    exact = TorchAdamW(state, torch.float64)
    for step in range(10):
        grads = make_tensors([p.shape for p in state.params], seed=step, dtype=torch.float64)
        state.update(grads, "plain")
        exact.update(grads)
    torch.testing.assert_close(flat(state.params), flat(exact.params), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(flat(state.emas[1]), flat(exact.emas[1]), rtol=1e-12, atol=1e-14)


@needs_extension
@pytest.mark.parametrize("backend", ["extension", "plain"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_leaves_every_bit(value, backend):
    state = make_state(copies=True, averages=2, max_norm=0.5)
    state.ema_copies = [torch.full_like(copy, 7.0) for copy in state.copies]
    grads = make_tensors([p.shape for p in state.params])
    state.update(grads, backend)
    state.params[0][0, 0] = -0.0
    before = [t.clone() for t in state.tensors()]
    grads[4][3, 3] = value
    state.update(grads, backend)
    for was, now in zip(before, state.tensors(), strict=True):
        assert torch.equal(was.reshape(-1).view(torch.uint8), now.reshape(-1).view(torch.uint8))


@needs_extension
@pytest.mark.parametrize("backend", ["extension", "plain"])
def test_a_scaled_loss_gives_the_same_update(backend):
    plain, scaled = make_state(max_norm=0.5), make_state(max_norm=0.5)
    grads = make_tensors([p.shape for p in plain.params])
    plain.update(grads, backend)
    scaled.update([512 * g for g in grads], backend, grad_scale=torch.tensor(512.0, device=DEVICE))
    torch.testing.assert_close(flat(scaled.params), flat(plain.params), rtol=1e-6, atol=1e-7)


@needs_extension
@pytest.mark.parametrize("backend", ["extension", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_are_the_rounded_weights_and_averages_where_they_are_wanted(dtype, backend):
    state = make_state(averages=2)
    special = [math.nan, math.inf, -math.inf, 3.4e38, 1.00390625, 1.01171875, -0.0, 1e-40]
    special += [65519.0, 65520.0, 6e-8, 1.00048828125]  # where float16 ends, at both sides, and a tie
    state.params[6][:12], state.lrs[6] = torch.tensor(special, device=DEVICE), 0.0
    state.ema_weights[0] = 1.0
    wanted = [i not in (1, 4) for i in range(len(state.params))]
    state.copies = [p.to(dtype) if want else None for p, want in zip(state.params, wanted, strict=True)]
    state.ema_copies = [None if i == 5 else torch.zeros_like(p, dtype=dtype) for i, p in enumerate(state.params)]
    state.update(make_tensors([p.shape for p in state.params]), backend)
    pairs = [*zip(state.copies, state.params, strict=True), *zip(state.ema_copies, state.emas[0], strict=True)]
    assert sum(copy is not None for copy, _ in pairs) == 2 * len(state.params) - 3
    for copy, value in pairs:
        if copy is not None:
            rounded = value.to(dtype)
            assert torch.equal(copy.isnan(), rounded.isnan())
            assert torch.equal(copy.nan_to_num(7.0).view(torch.int16), rounded.nan_to_num(7.0).view(torch.int16))


@needs_extension
def test_an_average_of_weight_one_is_the_parameter_and_of_weight_zero_stays():
    state = make_state(averages=2)
    state.ema_weights.copy_(torch.tensor([1.0, 0.0]))
    before = [e.clone() for e in state.emas[1]]
    state.update(make_tensors([p.shape for p in state.params]), "extension")
    assert all(torch.equal(e, p) for e, p in zip(state.emas[0], state.params, strict=True))
    assert all(torch.equal(e, b) for e, b in zip(state.emas[1], before, strict=True))


@needs_extension
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.3, 0.999)])
def test_small_betas_forget_large_gradients(betas):
    state, exact = make_state([(50,)]), make_state([(50,)], dtype=torch.float64)
    for scale in (1.0, 1e-6, 1e-6, 1e-6):
        grads = [g * scale for g in make_tensors([(50,)])]
        state.update(grads, "extension", betas=betas)
        exact.update([g.double() for g in grads], "plain", betas=betas)
    torch.testing.assert_close(state.exp_avgs[0].double(), exact.exp_avgs[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(state.params[0].double(), exact.params[0], rtol=1e-6, atol=1e-7)


@needs_extension
@pytest.mark.parametrize("backend", ["extension", "plain"])
def test_a_huge_finite_gradient_does_not_freeze_the_weights_and_a_limit_that_is_nan_shows(backend):
    state = make_state([(5,)])
    state.update([torch.full((5,), 1e21, device=DEVICE)], backend)
    assert not state.steps.any() and not state.exp_avg_sqs[0].any()
    before = state.params[0].clone()
    state.update(make_tensors([(5,)]), backend)
    assert (state.params[0] != before).all()
    state.update(make_tensors([(5,)]), backend, max_norm=torch.full_like(state.max_norm, math.nan))
    assert state.params[0].isnan().all()


def test_the_reference_takes_what_the_extension_does_not_take():
    state = make_state([(5,)], averages=4)
    state.emas, state.ema_weights = state.emas + [[state.params[0].clone()]], torch.full((5,), 0.5, device=DEVICE)
    state.lrs = state.lrs.float()
    state.update(make_tensors([(5,)]), "plain")
    assert state.steps.tolist() == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"emas": [[torch.zeros(5).bfloat16()]]}, r"got emas\[0\] in torch.bfloat16, wanted torch.float32"),
        ({"grads": [torch.ones(1)]}, r"got grads\[0\] of shape \(1,\), wanted \(5,\)"),
        ({"copies": [torch.ones(1).bfloat16()]}, r"got copies\[0\] of shape \(1,\), wanted \(5,\)"),
    ],
)
def test_in_plain_pytorch_it_stops_before_it_has_changed_anything(change, message):
    state = make_state([(5,)])
    before = [t.clone() for t in state.tensors()]
    with pytest.raises(ValueError, match=message):
        state.update(**{"grads": make_tensors([(5,)])} | on_device(change), backend="plain")
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))


@needs_extension
def test_every_tensor_has_its_own_step_count():
    together, apart = make_state([(5,), (6,)]), make_state([(5,), (6,)])
    grads = make_tensors([(5,), (6,)])
    together.steps[1] = 10
    together.update(grads, "extension")
    assert together.steps.tolist() == [1, 11]
    apart.steps[1] = 10
    apart.update(grads, "plain")
    torch.testing.assert_close(flat(together.params), flat(apart.params), rtol=1e-6, atol=1e-8)


@needs_extension
def test_autograd_notices_that_a_saved_weight_was_overwritten():
    state = make_state([(4,)])
    state.params[0].requires_grad_()
    loss = (state.params[0] ** 2).sum()
    state.update(make_tensors([(4,)]), "extension")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_extension
@CPU
@pytest.mark.slow
def test_the_extension_is_compiled_into_one_graph():
    eager, traced = make_state([(5, 3), (17,)], copies=True), make_state([(5, 3), (17,)], copies=True)
    grads = make_tensors([(5, 3), (17,)])
    norm, found_inf = global_norm(grads)

    def update(state):
        fused_adamw_ema_(**state.arguments(), grads=grads, norm=norm, found_inf=found_inf, backend="extension")

    update(eager)
    torch.compile(update, fullgraph=True, backend="aot_eager")(traced)
    assert all(torch.equal(a, b) for a, b in zip(eager.tensors(), traced.tensors(), strict=True))


HALF = torch.zeros(3).half()
WRONG_TENSORS = [
    ("params", torch.zeros(3, dtype=torch.float64), r"params\[1\] must be float32"),
    ("exp_avgs", torch.zeros(4), r"exp_avgs\[1\] has size 4 in dimension 0, params has 3 there"),
    ("exp_avg_sqs", torch.zeros(3, 1), r"exp_avg_sqs\[1\] has 2 dimensions, params has 1 there"),
    ("exp_avgs", torch.zeros(3).bfloat16(), r"exp_avgs\[1\] must be float32"),
    ("exp_avgs", torch.zeros(6)[::2], r"exp_avgs\[1\] must be contiguous"),
    ("copies", torch.zeros(3), r"copies\[1\] must be bfloat16 or float16"),
    ("copies", HALF, r"copies\[1\] must have the dtype of copies\[0\]"),
    ("copies", torch.zeros(4).bfloat16(), r"copies\[1\] has size 4 in dimension 0, params has 3 there"),
    ("copies", torch.zeros(6).bfloat16()[::2], r"copies\[1\] must be contiguous"),
]
WRONG_ARGUMENTS = [
    ({"steps": torch.zeros(1)}, "steps must hold 2 values, has 1"),
    ({"steps": torch.zeros(2, dtype=torch.int64)}, "steps must be float32"),
    ({"lrs": torch.zeros(2)}, "lrs must be float64"),
    ({"weight_decays": torch.zeros(3, dtype=torch.float64)}, "weight_decays must hold 2 values, has 3"),
    ({"max_norm": torch.zeros(2, dtype=torch.float64)}, "max_norm must hold 1 values, has 2"),
    ({"grad_scale": torch.ones((), dtype=torch.float64)}, "grad_scale must be float32"),
    ({"grads": [torch.zeros(2), HALF]}, r"grads\[1\] must be float32 or bfloat16"),
    ({"grads": [torch.zeros(2)]}, "got 1 grads for 2 params, wanted one for each"),
    ({"emas": []}, "got 0 emas and 1 ema_weights, wanted one for each"),
    ({"emas": [[torch.zeros(2)]]}, r"got 1 tensors in emas\[0\] for 2 params, wanted as many"),
    ({"copies": [torch.zeros(2).bfloat16()]}, "got 1 copies for 2 params, wanted one for each"),
    ({"ema_copies": [torch.zeros(2).bfloat16()]}, "got 1 ema_copies for 2 params, wanted one for each"),
    ({"norm": torch.zeros((), device="meta")}, r"got norm\[0\] on meta and others on c.*, wanted one device"),
    ({"betas": (0.9, 1.0)}, r"got betas=\(0.9, 1.0\), wanted two values in \[0, 1\)"),
]


def on_device(value):
    return tree_map(lambda t: t.to(DEVICE) if isinstance(t, torch.Tensor) and not t.is_meta else t, value)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [({name: tensor}, message) for name, tensor, message in WRONG_TENSORS] + WRONG_ARGUMENTS,
)
def test_a_wrong_argument_is_named_and_nothing_changes(change, message):
    state, grads = make_state([(2,), (3,)], copies=True), make_tensors([(2,), (3,)])
    for name, value in change.items():
        if isinstance(value, torch.Tensor) and isinstance(getattr(state, name, None), list):
            change = {name: [getattr(state, name)[0], value]}  # in the second place
    before = [t.clone() for t in state.tensors()]
    with pytest.raises((RuntimeError, ValueError), match=message):
        state.update(**{"grads": grads} | on_device(change), backend="extension")
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))


@needs_extension
def test_five_averages_and_shared_memory_are_refused():
    for change, message in (
        ({"emas": 5 * [[torch.zeros(2)]]}, "ema_weights holds 5 values, wanted at most 4"),
        ({}, r"emas\[0\] must not share its memory with params"),
    ):
        state = make_state([(2,)])
        change = on_device(change) or {"emas": [state.params]}
        weights = state.ema_weights.repeat(len(change["emas"]))
        with pytest.raises(RuntimeError, match=message):
            state.update(make_tensors([(2,)]), "extension", **change, ema_weights=weights)


@needs_extension
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_captured_graph_reads_what_changes_and_never_waits():
    captured, eager = make_state(max_norm=0.5), make_state(max_norm=0.5)
    grads = make_tensors([p.shape for p in captured.params])
    arguments = captured.arguments()

    def update():
        norm, found_inf = global_norm(grads, backend="extension")
        fused_adamw_ema_(**arguments, grads=grads, norm=norm, found_inf=found_inf, betas=BETAS, backend="extension")

    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    eager.update(grads, "extension")
    for lr in (2e-3, 5e-4):
        for state in (captured, eager):
            state.lrs.fill_(lr)
        for grad in grads:
            grad.mul_(-0.7)
        graph.replay()
        eager.update(grads, "extension")
    torch.testing.assert_close(flat(captured.params), flat(eager.params))
    assert torch.equal(captured.steps, eager.steps)
