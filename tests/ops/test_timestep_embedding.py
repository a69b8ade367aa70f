import functools
import math

import pytest
import torch

from epg_fast.ops.timestep_embedding import (
    SPEC,
    timestep_condition,
    timestep_condition_ref,
    timestep_embedding,
    timestep_embedding_ref,
)
from tests.ops.kernel_checks import (
    DEVICE,
    assert_accurate,
    assert_compiles_into_one_graph,
    assert_repeatable,
    needs_triton,
    randn,
    run,
    shapes_of,
)

# dtypes of the embedding and of label
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16 with an fp32 label": (torch.float16, torch.float32),
    "fp16": (torch.float16, torch.float16),
}
OF_SIGMA = pytest.mark.parametrize("of_sigma", [False, True], ids=["of t", "of sigma"])


def levels(batch, of_sigma=False):
    """Noise levels of the whole range, 0.002 to 640, or their 250 ln(sigma)."""
    sigma = torch.exp(torch.linspace(math.log(0.002), math.log(640.0), batch, dtype=torch.float64))
    values = sigma if of_sigma else 250 * sigma.log()
    return values.to(DEVICE, torch.float32).requires_grad_()


def embedding(function, dim, of_sigma=False, dtype=None, **options):
    return lambda t: function(t, dim, of_sigma=of_sigma, dtype=_double(t, dtype), **options)


def condition(function, dim, of_sigma=False, dtype=None, **options):
    return lambda t, label: function(t, dim, label, of_sigma=of_sigma, dtype=_double(t, dtype), **options)


def _double(t, dtype):
    """The exact result keeps its precision."""
    return None if t.dtype == torch.float64 else dtype


def make_grads(batch, dim, count):
    return [randn(batch, dim, seed=seed, requires_grad=False) for seed in range(10, 10 + count)]


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@OF_SIGMA
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes, of_sigma):
    (batch, dim), (dtype, label_dtype) = shape, dtypes
    t, options = levels(batch, of_sigma), {"of_sigma": of_sigma, "dtype": dtype}
    assert_accurate(
        embedding(timestep_embedding, dim, backend="triton", **options),
        embedding(timestep_embedding_ref, dim, **options),
        [t],
        make_grads(batch, dim, 1),
    )
    assert_accurate(
        condition(timestep_condition, dim, backend="triton", **options),
        condition(timestep_condition_ref, dim, **options),
        [t, randn(batch, dim, dtype=label_dtype)],
        make_grads(batch, dim, 2),
    )


@needs_triton
def test_a_model_without_classes_has_no_label():
    t = levels(5)
    actual, wanted = timestep_condition(t, 40, backend="triton"), timestep_condition(t, 40)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wanted[1], torch.nn.functional.silu(wanted[0]))


@needs_triton
def test_kernel_accepts_tensors_that_are_not_contiguous():
    batch, dim = 4, 40
    t = levels(2 * batch).detach()[::2].requires_grad_()
    label = randn(dim, batch).detach().T.requires_grad_()
    grads = [torch.ones((), device=DEVICE).expand(batch, dim), randn(batch, 2 * dim).detach()[:, ::2]]
    kernel, reference = condition(timestep_condition, dim, backend="triton"), condition(timestep_condition_ref, dim)
    assert_accurate(kernel, reference, [t, label], grads)


@needs_triton
def test_one_of_the_two_results_can_be_left_unused():
    t, label = levels(3), randn(3, 40)
    for used, part in ((0, [t]), (1, [t, label])):
        actual, wanted = (
            torch.autograd.grad(function(t, 40, label)[used].sin().sum(), part)
            for function in (functools.partial(timestep_condition, backend="triton"), timestep_condition_ref)
        )
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)


@needs_triton
def test_kernel_repeats_its_results_bit_for_bit():
    kernel = condition(timestep_condition, 768, backend="triton")
    assert_repeatable(kernel, [levels(3), randn(3, 768)], make_grads(3, 768, 2))


@needs_triton
def test_operator_passes_opcheck():
    t, label = levels(3), randn(3, 40)
    operator = torch.ops.epg_fast.timestep_embedding.default
    torch.library.opcheck(operator, (t, label, 40, 1e4, False, torch.float32, True))
    torch.library.opcheck(operator, (levels(3, of_sigma=True), None, 41, 1e4, True, torch.float16, False))


@needs_triton
@OF_SIGMA
def test_kernel_compiles_into_one_graph(of_sigma):
    t, label = levels(3, of_sigma), randn(3, 40)
    kernel = functools.partial(timestep_condition, of_sigma=of_sigma, backend="triton")
    assert_compiles_into_one_graph(lambda t, label: kernel(t, 40, label), [t, label], make_grads(3, 40, 2))
    kernel = functools.partial(timestep_embedding, of_sigma=of_sigma, backend="triton")
    assert_compiles_into_one_graph(lambda t: kernel(t, 40), [t], make_grads(3, 40, 1))


@OF_SIGMA
def test_operator_on_the_cpu_is_the_reference(of_sigma, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    t, label = (tensor.detach().double().cpu().requires_grad_() for tensor in (levels(3, of_sigma), randn(3, 41)))
    operator, grads = torch.ops.epg_fast.timestep_embedding, [torch.randn(3, 41).double() for _ in range(2)]
    actual = run(lambda *x: tuple(operator(*x, 41, 1e4, of_sigma, torch.float64, True)), [t, label], grads)
    wanted = run(condition(timestep_condition_ref, 41, of_sigma), [t, label], grads)
    torch.testing.assert_close(actual, wanted)
    alone = operator(t, None, 41, 1e4, of_sigma, torch.float64, False)[0]
    torch.testing.assert_close(
        torch.autograd.grad(alone, t, grads[0]), run(embedding(timestep_embedding_ref, 41, of_sigma), [t], grads[:1])[1]
    )


def test_reference_is_the_formula():
    t = [0.0, -3.5, 1615.0]
    values = timestep_embedding(torch.tensor(t, dtype=torch.float64), 7)
    for i, level in enumerate(t):
        phases = [level * 10_000 ** (-k / 3) for k in range(3)]
        wanted = [*map(math.cos, phases), *map(math.sin, phases), 0.0]
        torch.testing.assert_close(values[i], torch.tensor(wanted, dtype=torch.float64))
    sigma = torch.tensor([0.002, 80.0], dtype=torch.float64)
    torch.testing.assert_close(timestep_embedding(sigma, 8, of_sigma=True), timestep_embedding(250 * sigma.log(), 8))


def test_reference_gradients_are_right_in_float64():
    t, label = torch.tensor([0.7, -1.3], dtype=torch.float64).requires_grad_(), randn(2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t, label: timestep_condition_ref(t, 5, label), (t, label))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "got backend='cuda', wanted one of plain, triton"),
        ({"t": torch.zeros(3, 1)}, r"got t of shape \(3, 1\), wanted \[B\]"),
        ({"max_period": 0.0}, "got max_period=0.0, wanted a positive number"),
        ({"dim": 1}, "got dim=1, wanted at least 2"),
        ({"label": torch.zeros(3, 41)}, r"got label of shape \(3, 41\), wanted \[3, 40\]"),
    ],
)
def test_a_mistake_is_answered_with_what_was_wanted(change, message):
    with pytest.raises(ValueError, match=message):
        timestep_condition(**{"t": torch.zeros(3), "dim": 40, "label": torch.zeros(3, 40)} | change)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
def test_t_may_have_another_dtype(dtype):
    t = torch.tensor([3, -7], device=DEVICE).to(dtype)
    wanted = timestep_embedding(t.double(), 40)
    for backend in ("plain", "triton"):
        actual = timestep_embedding(t, 40, backend=backend)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)


@needs_triton
def test_float64_is_left_to_the_reference():
    with pytest.raises(ValueError, match="got t in torch.float64, wanted one of torch.float32.*backend='triton'"):
        timestep_embedding(torch.zeros(3, dtype=torch.float64, device=DEVICE), 40, backend="triton")


def test_traffic_model_counts_each_tensor_once():
    assert SPEC.bytes((2, 8), 2) == 3 * 16 * 2 + 2 * 4
    assert SPEC.bytes((2, 8), 2, backward=True) == 5 * 16 * 2 + 4 * 4
