"""What every operation must show, for each backend that can run here; inputs are those of tests/ops/examples.py.

Without a GPU, Triton's kernels run in its interpreter, and formulas stand for the extension's matrix products. A run
takes a tenth of a second there, so that the first form of an operation is checked by default, at one odd shape; its
other forms are marked `slow`, the grid of shapes and dtypes `kernels`.
"""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.ops import backends, extension
from tests.ops.examples import EXAMPLES, Example
from tests.ops.kernel_checks import (
    AVAILABLE,
    DEVICE,
    GPU,
    REASON,
    Operators,
    assert_accurate,
    assert_backend_accurate,
    assert_capturable,
    assert_compiles_into_one_graph,
    assert_refused,
    assert_same_bits,
    gradients_like,
    in_double,
    leaves_of,
    map_tensors,
    run,
    tensors_of,
    trained,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")
ROOT = Path(__file__).resolve().parents[2]
SLOW, KERNELS = pytest.mark.slow, pytest.mark.kernels


@pytest.fixture(autouse=True)
def _backend_runs(request):
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if backend in ("triton", "cuda"):
        pytest.importorskip("triton")
    if backend == "cuda":
        request.getfixturevalue("gemms")
    if backend == "extension" and not AVAILABLE:
        pytest.skip(f"extension: {REASON}")


def dtypes_of(example: Example, backend: str) -> tuple[str, ...]:
    return example.cuda_dtypes if backend == "cuda" else tuple(example.dtypes)


def small(example: Example, backend: str, form=None, batch=1, **more) -> dict:
    """One image; where that would be one number, whose error may happen to be small, the first odd shape."""
    odd = example.spec.odd_shapes[0]
    shape = odd if len(odd) == 2 and batch else (batch, *odd[1:])
    return example.inputs(shape, dtypes_of(example, backend)[0], form, **more)


def _fits(shape: tuple[int, ...], backend: str) -> bool:
    return backend != "cuda" or all(side % 8 == 0 for side in shape[-2:])


def each(of=lambda example: True, backends=("triton", "cuda", "extension", "any"), forms=False):
    """Parametrises example and backend, of which "cuda" differs from "triton" by its products alone, and form."""
    cases = []
    for example in filter(of, EXAMPLES.values()):
        for backend in [backend for backend in example.backends if backend in backends]:
            slow = backend != "extension" if forms else backend == "cuda"
            for i, form in enumerate(example.forms if forms else [None]):
                marks = [KERNELS if i else SLOW] * (i > 0 or slow)
                case = (example, backend, form)[: 2 + forms]
                cases.append(pytest.param(*case, id="-".join([example.name, *case[1:]]), marks=marks))
    return pytest.mark.parametrize(("example", "backend", "form")[: 2 + forms], cases)


def differentiable(example: Example) -> bool:
    return example.differentiable


def of_floats(example: Example) -> bool:
    """Not of 8-bit images, whose extension is for the CPU alone."""
    return "uint8" not in example.dtypes


def accuracy_cases():
    """Of shape, dtypes and form any two vary while the third is the first; on a GPU the presets' shapes, too."""
    for example in EXAMPLES.values():
        for backend in example.backends:
            odd, presets = example.spec.odd_shapes, example.spec.shapes if of_floats(example) else ()
            names, forms = dtypes_of(example, backend), list(example.forms)
            for shape, dtypes, form in itertools.product((*odd, *presets), names, forms):
                first = (shape in (odd[0], *presets[:1]), dtypes == names[0], form == forms[0])
                if any(first) and _fits(shape, backend):
                    if shape in presets:
                        marks = list(GPU)
                    elif backend == "extension":
                        marks = []
                    elif first[0] and (first[1] or (first[2] and dtypes == names[1])):
                        marks = [] if first[2] and backend != "cuda" else [SLOW]
                    else:
                        marks = [KERNELS]
                    case = (example.name, backend, str(shape), dtypes, form)
                    yield pytest.param(example, backend, shape, dtypes, form, id="-".join(case), marks=marks)


@pytest.mark.parametrize(("example", "backend", "shape", "dtypes", "form"), accuracy_cases())
def test_a_backend_is_as_accurate_as_plain_pytorch_in_the_same_dtypes(example, backend, shape, dtypes, form):
    inputs = example.inputs(shape, dtypes, form)
    assert_backend_accurate(example, backend, inputs)


@pytest.mark.parametrize(
    ("example", "form"),
    [(e, form) for e in EXAMPLES.values() for form in e.forms if e.backends[:1] == ("triton",)],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_an_operator_runs_on_a_cpu_is_as_accurate(example, form, monkeypatch):
    """Its formulas in plain PyTorch, of which the gradient's are its own."""
    monkeypatch.setattr("epg_fast.ops.backends.interpreting", lambda: True)
    monkeypatch.setattr("epg_fast.ops.registration.interpreting", lambda: False)
    inputs = example.inputs(form=form, device="cpu")
    assert_backend_accurate(example, "triton", inputs)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Values of `tensor` that are not contiguous, or not aligned."""
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "unaligned":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if layout == "within wider rows":
        return F.pad(tensor, (0, 8))[..., :-8]
    return F.pad(tensor.unsqueeze(-1), (0, 1)).flatten(-2)[..., ::2]


LAYOUTS = ("transposed", "every other", "expanded", "unaligned", "within wider rows")


@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=SLOW), *(pytest.param(i, marks=KERNELS) for i in (2, 3, 4))])
@each(backends=("triton", "any"))
def test_tensors_need_not_be_contiguous(example, backend, turn):
    turns = iter(range(turn, 1000))
    inputs = small(example, backend, batch=2)
    inputs = leaves_of(lambda tensor: laid_out(tensor, LAYOUTS[next(turns) % 5]), inputs)
    grads = gradients_like(run(example.reference, inputs)[0])
    grads = [laid_out(grad, LAYOUTS[next(turns) % 5]) for grad in grads]
    assert_backend_accurate(example, backend, inputs, grads)


@pytest.mark.parametrize("offset", [1, 2, 3])
@each(of=of_floats, backends=("extension",))
def test_the_extension_takes_tensors_that_are_not_aligned(example, backend, offset):
    def call(**inputs):
        """On copies, which an operation in place may write: the n-th lies `offset` + n values behind an address."""
        places = itertools.count(offset)

        def placed(tensor):
            pad = next(places) % 4
            return torch.cat([tensor.new_zeros(pad), tensor.flatten()])[pad:].view(tensor.shape)

        return example.function(**map_tensors(placed, inputs), backend=backend)

    for form in example.forms:
        inputs = example.inputs(max(example.spec.odd_shapes, key=math.prod), form=form)
        assert_accurate(call, example.reference, inputs)


# Large enough for several threads, at seams of odd places.
THREADED = {"euler_step": (200_003,), "heun_step": (200_003,), "augment_view": (11, 33, 50, 3)}
THREADED |= {"resized_crop": (23, 120, 90, 20), "global_norm": (3, 150_007), "fused_adamw_ema": (3, 50_007)}


@pytest.mark.skipif(DEVICE == "cuda", reason="threads of the CPU")
@each(backends=("extension",))
def test_the_number_of_threads_changes_no_bit(example, backend):
    inputs = example.inputs(THREADED[example.name], list(example.dtypes)[-1])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(example.by(backend), inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)


@SLOW
@each(of=differentiable)
def test_each_result_alone_has_its_gradient(example, backend):
    inputs = small(example, backend)

    def alone(function, i):
        return lambda **inputs: (result if isinstance(result := function(**inputs), tuple) else (result,))[i]

    outputs = run(example.reference, inputs)[0]
    for i in [i for i, output in enumerate(outputs) if output.requires_grad and len(outputs) > 1]:
        assert_accurate(alone(example.by(backend), i), alone(example.reference, i), inputs)


@pytest.mark.parametrize("trained_part", [0, pytest.param(1, marks=SLOW)], ids=["even", "odd"])
@each(of=differentiable)
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(example, backend, trained_part):
    inputs = small(example, backend)
    for i, tensor in enumerate(trained(inputs)):
        tensor.requires_grad_(i % 2 == trained_part)
    if not trained(inputs):
        return
    assert_backend_accurate(example, backend, inputs)
    if example.name not in ("attention", "mlp_residual"):  # which recompute a product, and compute all gradients
        assert flops_of(example.by(backend), inputs) <= flops_of(example.reference, inputs)


def flops_of(function, inputs) -> int:
    with FlopCounterMode(display=False) as counter:
        run(function, inputs)
    return counter.get_total_flops()


@each(of=lambda example: example.name in ("attention", "linear_residual_norm", "mlp_residual", "skip_linear"))
def test_the_products_that_run_are_those_of_the_model(example, backend):
    spec, shape = example.spec, (1, *example.spec.odd_shapes[0][1:])
    counted = flops_of(example.by(backend), small(example, backend))
    assert counted == spec.flops(shape) + spec.flops(shape, backward=True)


@SLOW
@each(of=differentiable)
def test_autocast_gives_what_it_gives_in_plain_pytorch(example, backend):
    dtype = torch.bfloat16 if backend == "cuda" else torch.float16  # the interpreter truncates to bfloat16

    def under_autocast(name):
        def call(**inputs):
            with torch.autocast(DEVICE, dtype):
                return example.call(name, **inputs)

        return call

    plain = "any" if backend == "any" else "plain"
    assert_accurate(under_autocast(backend), under_autocast(plain), small(example, backend))


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=KERNELS)], ids=["", "dynamic"])
@each(forms=True)
def test_operators_pass_opcheck(example, backend, form, dynamic):
    if dynamic and backend == "cuda" and "triton" in example.backends:
        pytest.skip("its operators are those of backend triton, which have shown it")
    with Operators() as operators:
        run(example.by(backend), small(example, backend, form))
    assert operators.calls
    for operator, args, kwargs in operators.calls:
        has_gradient = not operator.name().endswith(("_bwd", "weight_gradient"))
        args = map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad and has_gradient), args)  # noqa: B023
        checks = ["test_autograd_registration", "test_faketensor", *["test_aot_dispatch_dynamic"] * dynamic]
        # which compares by arithmetic what was read
        checks += ["test_schema"] * all(t.dtype != torch.float8_e4m3fn for t in tensors_of(args))
        torch.library.opcheck(operator, args, kwargs, test_utils=checks)


@SLOW
@each(forms=True, of=of_floats)
def test_it_compiles_into_one_graph(example, backend, form):
    assert_compiles_into_one_graph(example.by(backend), small(example, backend, form))


@SLOW
@pytest.mark.parametrize("name", ["attention", "layer_norm_modulate", "patch_embed", "patch_loss"])
def test_inductor_compiles_the_plain_form_as_accurately(name, inductor):
    example = EXAMPLES[name]
    inputs = example.inputs(dtypes=list(example.dtypes)[1])
    compiled = torch.compile(example.reference, fullgraph=True)
    assert_accurate(compiled, example.reference, inputs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="what runs in parallel")
@each(of=of_floats)
def test_it_repeats_its_bits_and_a_captured_graph_computes_on_new_inputs(example, backend):
    shape = example.spec.shapes[-1]
    inputs = [example.inputs(shape, dtypes_of(example, backend)[-1], seed=seed) for seed in (0, 1)]
    call = example.by(backend)
    assert_same_bits(run(call, inputs[0]), run(call, inputs[0]))
    assert_capturable(call, *(map_tensors(torch.Tensor.detach, tensors) for tensors in inputs))


@each()
def test_an_empty_batch_gives_nothing_or_is_refused(example, backend):
    inputs = small(example, backend, batch=0)
    if backend in ("triton", "cuda"):
        with pytest.raises(ValueError, match="wanted (at least one value|no empty dimension)"):
            example.call(backend, **inputs)
    backends = ("extension", "plain") if backend == "extension" else ("plain",)
    if example.name not in ("attention", "attention_fp8", "linear"):
        for name in backends:
            outputs = run(example.by(name), inputs)[0]
            assert example.name == "global_norm" or all(output.numel() == 0 for output in outputs)


@each(backends=("triton",))
def test_the_kernel_without_a_gpu_says_how_to_run_without_it(example, backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = small(example, backend, device="cpu")
    assert_refused("on cpu, wanted one on a CUDA device.*use backend='plain'", example, backend, inputs)


@each(of=lambda example: example.differentiable and "fp64" not in example.dtypes, backends=("triton",))
def test_float64_is_left_to_plain_pytorch(example, backend):
    assert_refused(
        "torch.float64, wanted one of .*use backend='plain'", example, backend, in_double(small(example, backend))
    )


@each(of=lambda example: example.name != "linear_fp8", backends=("triton", "cuda"))
def test_without_triton_it_says_how_to_install_it(example, backend, monkeypatch):
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    assert_refused("Triton.*not installed; run `pip install 'triton>=3.6'`", example, backend, small(example, backend))


@each(of=differentiable, backends=("triton", "cuda"))
def test_a_transform_that_would_not_see_the_kernels_derivative_is_refused(example, backend):
    inputs = small(example, backend, grad=False)
    name = next(name for name, value in inputs.items() if torch.is_tensor(value))
    with pytest.raises(ValueError, match="got a tensor inside torch.func.jvp or torch.func.grad"):
        torch.func.grad(lambda x: run(example.by(backend), inputs | {name: x})[0][0].sum())(inputs[name])


@pytest.mark.parametrize(
    ("example", "wanting"), [(e, b) for e in EXAMPLES.values() for b in e.backends if b in ("cuda", "extension")]
)
def test_a_missing_extension_says_how_to_build_it(example, wanting, monkeypatch):
    monkeypatch.setattr(extension, "extension_status", lambda: (False, "not built: run `pip install .`"))
    inputs = small(example, wanting, grad=False)
    assert_refused("the extension.* is not built: run `pip install .*backend='plain'", example, wanting, inputs)


@pytest.mark.parametrize("example", [e for e in EXAMPLES.values() if e.name != "linear"], ids=lambda e: e.name)
def test_an_unknown_backend_is_answered_with_those_there_are(example):
    inputs = example.inputs(grad=False)
    assert_refused("got backend='cublas', wanted one of .*plain", example, "cublas", inputs)


@pytest.mark.parametrize(
    "name",
    ["layer_norm_modulate_fp8", "gate_residual_norm_modulate_fp8", "skip_norms_fp8", "quantize_rows", "linear_fp8"]
    + ["euler_step", "heun_step", "linear_residual", "norm_linear"],
)
def test_a_gradient_that_it_has_not_is_refused(name):
    example, backend = EXAMPLES[name], "extension" if name.endswith("step") else "plain"
    inputs = example.inputs()
    [t for t in tensors_of(inputs) if t.dtype.is_floating_point and t.itemsize > 1][-1].requires_grad_()
    assert_refused("requires a gradient, which .* has not; use torch.no_grad", example, backend, inputs)


@pytest.mark.parametrize(
    "example",
    [EXAMPLES["timestep_condition"], EXAMPLES["linear_fp8_dynamic"]]
    + [e for e in EXAMPLES.values() if e.backends[:1] == ("triton",) and e.name == e.spec.name],
    ids=lambda e: e.name,
)
def test_the_model_of_traffic_counts_every_input_and_output_at_least_once(example):
    shape, spec = example.spec.shapes[0], example.spec
    form = {"patch_loss": "denoising", "quantize_rows": "the MLP's middle"}.get(example.name)  # of its first shape
    with FakeTensorMode():
        inputs = example.inputs(shape, list(example.dtypes)[:2][-1], form, device="cpu")
        outputs, gradients = run(example.reference, inputs)
    read, written, returned = (sum(t.nbytes for t in tensors) for tensors in (tensors_of(inputs), outputs, gradients))
    assert 0.97 * (read + written) <= spec.bytes(shape, 2) <= 4 * (read + written)
    if gradients:
        assert 0.97 * (written + returned) <= spec.bytes(shape, 2, backward=True) <= 8 * (written + returned)


@SLOW
def test_importing_the_operations_loads_neither_triton_nor_the_extension():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, epg_fast.ops; "
        "assert 'epg_kernels' not in sys.modules; assert not torch.ops.loaded_libraries"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
