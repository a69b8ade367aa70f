"""The fused optimiser against torch.optim.AdamW, torch's clipping and lerp; what it refuses and leaves alone."""

import math

import pytest
import torch
from torch.utils._pytree import tree_map

from epg_fast.ops import fused_adamw_ema_, global_norm
from tests.ops.kernel_checks import (
    CPU,
    DEVICE,
    GPU,
    assert_close_to_reference,
    make_tensors,
    needs_extension,
    tensors_of,
)

# Odd sizes, an empty tensor, one of no dimensions, one that spans several blocks and threads.
SHAPES = [(33, 7), (1,), (0, 4), (), (130, 257), (40_003,), (16,)]
BETAS, EPS = (0.9, 0.99), 1e-8
EACH_BACKEND = pytest.mark.parametrize("backend", ["extension", "plain"])


def make_state(shapes=SHAPES, averages=1, copies=False, max_norm=math.inf, dtype=torch.float32):
    """Arguments of `fused_adamw_ema_` by name, but for the gradients and their norm."""
    params, float64 = make_tensors(shapes, dtype=dtype), {"dtype": torch.float64, "device": DEVICE}
    return {
        "params": params,
        "exp_avgs": [torch.zeros_like(p) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "steps": torch.zeros(len(shapes), device=DEVICE),
        "lrs": torch.tensor([1e-3 * 0.8 ** (i % 5) for i in range(len(shapes))], **float64),
        "weight_decays": torch.tensor([0.1 if i % 3 else 0.0 for i in range(len(shapes))], **float64),
        "max_norm": torch.tensor(max_norm, **float64),
        "emas": [[p.clone() for p in params] for _ in range(averages)],
        "ema_weights": torch.tensor([0.05, 0.7, 1e-4, 0.5][:averages], **float64),
        "copies": [p.bfloat16() for p in params] if copies else [],
        "ema_copies": [torch.full_like(p, 7.0, dtype=torch.bfloat16) for p in params] if copies else [],
    }


def make_grads(state, seed=0, scale=1.0):
    return [scale * grad for grad in make_tensors([p.shape for p in state["params"]], seed)]


def update(state, grads, backend, **changes):
    norm, found_inf = global_norm(grads, backend="plain")
    given = {"grads": grads, "norm": norm, "found_inf": found_inf, "betas": BETAS, "eps": EPS}
    fused_adamw_ema_(**state | given | changes, backend=backend)


def copied(state):
    return [t.clone() for t in tensors_of(state)]


class TorchAdamW:
    """The same update by torch.optim.AdamW, torch.nn.utils' clipping and lerp, in any dtype."""

    def __init__(self, state, dtype):
        self.params = [p.to(dtype, copy=True).requires_grad_() for p in state["params"]]
        self.emas = [[p.detach().clone() for p in self.params] for _ in state["emas"]]
        self.weights, self.max_norm = state["ema_weights"].tolist(), state["max_norm"].item()
        groups = zip(self.params, state["lrs"].tolist(), state["weight_decays"].tolist(), strict=True)
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
        moments = {
            f"{name}s": [self.optimizer.state[p][name] for p in self.params] for name in ("exp_avg", "exp_avg_sq")
        }
        return {"params": self.params} | moments | {f"emas[{k}]": average for k, average in enumerate(self.emas)}


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


LONG = [("fp32", {"averages": 2}), ("bf16", {"averages": 2, "max_norm": 0.5}), ("mixed", {"max_norm": 0.5})]


@needs_extension
@pytest.mark.parametrize(
    ("updates", "grad_dtypes", "options"),
    [
        *(pytest.param(50, *case, marks=pytest.mark.slow) for case in LONG),
        *((3, "mixed", {"averages": averages, "copies": averages == 3, "max_norm": 0.5}) for averages in (0, 1, 3, 4)),
        (3, "fp32", {"shapes": [(16_385,)] * 2, "max_norm": 1.0}),
        (2, "fp32", {"shapes": [(1 + i % 7,) for i in range(600)], "max_norm": 0.5}),  # more than a launch takes
        pytest.param(3, "fp32", {"shapes": [(65_537,)] * 349, "max_norm": 1.0}, marks=GPU),
        pytest.param(3, "fp32", {"shapes": [(4096,)] * 5000, "max_norm": 1.0}, marks=GPU),
    ],
    ids=lambda value: str(value)[:40],
)
def test_updates_follow_torch_in_float64(updates, grad_dtypes, options):
    state = make_state(**options)
    exact, same_dtype = TorchAdamW(state, torch.float64), TorchAdamW(state, torch.float32)
    dtypes = {"fp32": [torch.float32], "bf16": [torch.bfloat16], "mixed": [torch.bfloat16, torch.float32]}[grad_dtypes]
    for step in range(updates):
        grads = [g.to(dtypes[i % len(dtypes)]) for i, g in enumerate(make_grads(state, 100 + step, 0.3))]
        update(state, grads, "extension")
        exact.update(grads)
        same_dtype.update(grads)
    got = state | {f"emas[{k}]": average for k, average in enumerate(state["emas"])}
    for name, wanted in exact.named().items():
        values = (flat(tensors) for tensors in (got[name], same_dtype.named()[name], wanted))
        assert_close_to_reference(*values, name=f"{name} after {updates}")
    assert torch.equal(state["steps"], torch.full_like(state["steps"], updates))


def test_the_reference_is_torch_adamw_in_float64():
    state = make_state(max_norm=0.5, averages=2, dtype=torch.float64)
    exact = TorchAdamW(state, torch.float64)
    for step in range(10):
        grads = [g.double() for g in make_grads(state, step)]
        update(state, grads, "plain")
        exact.update(grads)
    for got, wanted in ((state["params"], exact.params), (state["emas"][1], exact.emas[1])):
        torch.testing.assert_close(flat(got), flat(wanted), rtol=1e-12, atol=1e-14)


@needs_extension
@EACH_BACKEND
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_leaves_every_bit(value, backend):
    state = make_state(copies=True, averages=2, max_norm=0.5)
    grads = make_grads(state)
    update(state, grads, backend)
    state["params"][0][0, 0] = -0.0
    before = copied(state)
    grads[4][3, 3] = value
    update(state, grads, backend)
    for was, now in zip(before, tensors_of(state), strict=True):
        assert torch.equal(was.reshape(-1).view(torch.uint8), now.reshape(-1).view(torch.uint8))


@needs_extension
@EACH_BACKEND
def test_a_scaled_loss_gives_the_same_update(backend):
    plain, scaled = make_state(max_norm=0.5), make_state(max_norm=0.5)
    update(plain, make_grads(plain), backend)
    update(scaled, make_grads(scaled, scale=512), backend, grad_scale=torch.tensor(512.0, device=DEVICE))
    torch.testing.assert_close(flat(scaled["params"]), flat(plain["params"]), rtol=1e-6, atol=1e-7)


@needs_extension
@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_are_the_rounded_weights_and_averages_where_they_are_wanted(dtype, backend):
    state = make_state(averages=2)
    special = [math.nan, math.inf, -math.inf, 3.4e38, 1.00390625, 1.01171875, -0.0, 1e-40]
    special += [65519.0, 65520.0, 6e-8, 1.00048828125]  # where float16 ends, at both sides, and a tie
    params, averages = state["params"], state["emas"][0]
    params[6][:12], state["lrs"][6], state["ema_weights"][0] = torch.tensor(special, device=DEVICE), 0.0, 1.0
    state["copies"] = [None if i in (1, 4) else torch.zeros_like(p, dtype=dtype) for i, p in enumerate(params)]
    state["ema_copies"] = [None if i == 5 else torch.zeros_like(p, dtype=dtype) for i, p in enumerate(params)]
    update(state, make_grads(state), backend)
    pairs = [*zip(state["copies"], params, strict=True), *zip(state["ema_copies"], averages, strict=True)]
    assert sum(copy is not None for copy, _ in pairs) == 2 * len(params) - 3
    for copy, value in pairs:
        if copy is not None:
            rounded = value.to(dtype)
            assert torch.equal(copy.isnan(), rounded.isnan())
            assert torch.equal(copy.nan_to_num(7.0).view(torch.int16), rounded.nan_to_num(7.0).view(torch.int16))


@needs_extension
def test_an_average_of_weight_one_is_the_parameter_and_of_weight_zero_stays():
    state = make_state(averages=2)
    state["ema_weights"].copy_(torch.tensor([1.0, 0.0]))
    before = flat(state["params"])
    update(state, make_grads(state), "extension")
    assert torch.equal(flat(state["emas"][0]), flat(state["params"])) and torch.equal(flat(state["emas"][1]), before)


@needs_extension
@pytest.mark.parametrize("steps", [0, 10])
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.3, 0.999)])
def test_small_betas_forget_large_gradients_and_every_tensor_has_its_own_step_count(betas, steps):
    state, exact = make_state([(50,), (6,)]), make_state([(50,), (6,)], dtype=torch.float64)
    state["steps"][1] = exact["steps"][1] = steps
    for scale in (1.0, 1e-6, 1e-6, 1e-6):
        grads = make_grads(state, scale=scale)
        update(state, grads, "extension", betas=betas)
        update(exact, [g.double() for g in grads], "plain", betas=betas)
    assert state["steps"].tolist() == [4, 4 + steps]
    for name, rtol, atol in (("exp_avgs", 1e-5, 0), ("params", 1e-6, 1e-7)):
        torch.testing.assert_close(flat(state[name]).double(), flat(exact[name]), rtol=rtol, atol=atol)


@needs_extension
@EACH_BACKEND
def test_a_huge_finite_gradient_does_not_freeze_the_weights_and_a_limit_that_is_nan_shows(backend):
    state = make_state([(5,)])
    update(state, [torch.full((5,), 1e21, device=DEVICE)], backend)
    assert not state["steps"].any() and not state["exp_avg_sqs"][0].any()
    before = state["params"][0].clone()
    update(state, make_grads(state), backend)
    assert (state["params"][0] != before).all()
    update(state, make_grads(state), backend, max_norm=torch.full_like(state["max_norm"], math.nan))
    assert state["params"][0].isnan().all()


def test_the_reference_takes_what_the_extension_does_not_take():
    state = make_state([(5,)], averages=4)
    state |= {"emas": [*state["emas"], [state["params"][0].clone()]], "lrs": state["lrs"].float()}
    update(state, make_grads(state), "plain", ema_weights=torch.full((5,), 0.5, device=DEVICE))
    assert state["steps"].tolist() == [1]


@needs_extension
def test_autograd_notices_that_a_saved_weight_was_overwritten():
    state = make_state([(4,)])
    loss = (state["params"][0].requires_grad_() ** 2).sum()
    update(state, make_tensors([(4,)]), "extension")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_extension
@CPU
@pytest.mark.slow
def test_the_extension_is_compiled_into_one_graph():
    eager, traced = make_state([(5, 3), (17,)], copies=True), make_state([(5, 3), (17,)], copies=True)
    grads = make_grads(eager)
    norm, found_inf = global_norm(grads)

    def step(state):
        fused_adamw_ema_(**state, grads=grads, norm=norm, found_inf=found_inf, backend="extension")

    step(eager)
    torch.compile(step, fullgraph=True, backend="aot_eager")(traced)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(eager), tensors_of(traced), strict=True))


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
WRONG_IN_PLAIN = [
    ({"emas": [[torch.zeros(2), torch.zeros(3).bfloat16()]]}, r"got emas\[0\]\[1\] in torch.bfloat16"),
    ({"grads": torch.ones(1)}, r"got grads\[1\] of shape \(1,\), wanted \(3,\)"),
    ({"copies": torch.ones(1).bfloat16()}, r"got copies\[1\] of shape \(1,\), wanted \(3,\)"),
]
WRONG = [("plain", *wrong) for wrong in WRONG_IN_PLAIN]
WRONG += [pytest.param("extension", {n: tensor}, m, marks=needs_extension) for n, tensor, m in WRONG_TENSORS]
WRONG += [pytest.param("extension", *wrong, marks=needs_extension) for wrong in WRONG_ARGUMENTS]


def on_device(value):
    return tree_map(lambda t: t.to(DEVICE) if isinstance(t, torch.Tensor) and not t.is_meta else t, value)


@pytest.mark.parametrize(("backend", "change", "message"), WRONG)
def test_a_wrong_argument_is_named_and_nothing_changes(backend, change, message):
    """A tensor for an argument that is a list stands in its second place."""
    state = make_state([(2,), (3,)], copies=True) | {"ema_copies": []}
    good = state | {"grads": make_grads(state)}
    for name, value in change.items():
        if isinstance(value, torch.Tensor) and isinstance(good.get(name), list):
            change = {name: [good[name][0], value]}
    before = copied(state)
    with pytest.raises((RuntimeError, ValueError), match=message):
        update(state, **{"grads": good["grads"]} | on_device(change), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(state), strict=True))


@needs_extension
def test_five_averages_and_shared_memory_are_refused():
    for count, message in ((5, "ema_weights holds 5 values, wanted at most 4"), (1, r"emas\[0\] must not share its")):
        state = make_state([(2,)])
        emas = [state["params"]] if count == 1 else [[torch.zeros(2, device=DEVICE)]] * 5
        with pytest.raises(RuntimeError, match=message):
            update(state, make_grads(state), "extension", emas=emas, ema_weights=state["ema_weights"].repeat(count))


@needs_extension
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_captured_graph_reads_what_changes_and_never_waits():
    captured, eager = make_state(max_norm=0.5), make_state(max_norm=0.5)
    grads = make_grads(captured)

    def step():
        norm, found_inf = global_norm(grads, backend="extension")
        fused_adamw_ema_(**captured, grads=grads, norm=norm, found_inf=found_inf, betas=BETAS, backend="extension")

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    update(eager, grads, "extension")
    for lr in (2e-3, 5e-4):
        for state in (captured, eager):
            state["lrs"].fill_(lr)
        for grad in grads:
            grad.mul_(-0.7)
        graph.replay()
        update(eager, grads, "extension")
    torch.testing.assert_close(flat(captured["params"]), flat(eager["params"]))
    assert torch.equal(captured["steps"], eager["steps"])
