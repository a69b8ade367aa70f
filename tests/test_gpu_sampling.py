"""What only a GPU can show of sampling: recorded trajectories, its precisions, and that nobody waits."""

import copy
import itertools

import pytest
import torch
from torch.testing import assert_close

from epg_fast import SamplingEngine
from epg_fast.diffusion import SAMPLERS
from epg_fast.models import EPGViT
from epg_fast.sampling import image_error
from tests.golden_data import Case
from tests.ops.kernel_checks import gemms_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LABELS = [0, 1, 2, 3, 4, 5, 6]
GUIDED = {"guidance": 2.5, "interval": (0.1, 20.0)}


@pytest.fixture(scope="module")
def model():
    """Widths that FP8 takes, weights that leave images inside the range of colours."""
    torch.manual_seed(0)
    model = EPGViT(32, 8, 3, 64, 2, 2, decoder_depth=2, decoder_embed_dim=128, decoder_num_heads=2, num_classes=10)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model.cuda().eval()


def engine_of(model, sampler="heun", **options):
    options = (GUIDED if sampler in ("heun", "euler") else {}) | options
    if sampler == "edm_sde":
        options["s_churn"] = 20.0
    return SamplingEngine(model, sampler=sampler, steps=6, batch_size=3, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_recorded_trajectory_gives_the_images_of_single_launches(model, sampler, precision):
    plain = engine_of(model, sampler, compile="off", cuda_graphs=False, precision=precision)
    graphed = engine_of(model, sampler, compile="off", precision=precision)
    for seed in (0, 1):
        want = plain(LABELS, seed=seed)
        assert_close(graphed(LABELS, seed=seed), want, rtol=0, atol=1e-3 if precision == "fp32" else 2e-2)
    assert list(graphed._recorded) == [(3, False)]
    assert_close(graphed([1], [1]), plain([1], [1]), rtol=0, atol=1e-3 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_trajectory_is_shown_of_the_images_that_are_drawn(model, sampler):
    plain, graphed = (engine_of(model, sampler, compile="off", cuda_graphs=graphs) for graphs in (False, True))
    labels = LABELS[:3]
    images, estimates = plain.trajectory(labels)
    assert torch.equal(images, plain(labels))
    shown, others = graphed.trajectory(labels)
    assert_close(shown, graphed(labels), rtol=0, atol=1e-3)
    assert list(estimates) == list(others) and all(x.device.type == "cpu" for x in estimates.values())


def test_engines_of_one_network_record_one_after_the_other_and_keep_their_memory_apart(model):
    base = engine_of(model, compile="off")
    for guidance in (1.0, 2.0, 3.0, 2.0):
        recorded = base.with_settings(guidance=guidance)
        assert_close(
            recorded(LABELS),
            engine_of(model, compile="off", cuda_graphs=False, guidance=guidance)(LABELS),
            rtol=0,
            atol=1e-3,
        )
        assert recorded.cuda_graphs and len(recorded._recorded) == 1
    both = [base.with_settings(guidance=guidance) for guidance in (1.5, 2.5)]
    want = [engine(LABELS) for engine in both]
    assert all(torch.equal(engine(LABELS), images) for engine, images in zip(both, want, strict=True))


ALLOWED = {"fp32": 1e-3, "tf32": 5e-3, "bf16": 2e-2, "fp16": 5e-3, "fp8": 1e-1}
CASES = [*itertools.product(["blocks", "network"], ["fp32", "bf16", "fp8"])]
CASES += [("off", precision) for precision in ("tf32", "bf16", "fp16", "fp8")]


@pytest.mark.parametrize("compile, precision", CASES)
def test_compiled_recorded_and_of_less_precision_images_move_as_little_as_on_a_cpu(model, compile, precision):
    want = engine_of(model, compile="off", cuda_graphs=False)(LABELS)
    engine = engine_of(model, compile=compile, precision=precision)
    error = image_error(engine(LABELS), want)["relative_l2"]
    assert engine.precision == precision or torch.cuda.get_device_capability() < (9, 0)
    assert len(engine._recorded) == 1
    assert error < ALLOWED[precision] and (error > 0 or precision == "fp32")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("compile", ["off", "blocks", "network"])
def test_fp8_on_the_kernels_that_quantise_errs_as_on_pytorchs_operators(model, compile, backend):
    if torch.cuda.get_device_capability() < (9, 0) or (backend == "cuda" and not gemms_run()):
        pytest.skip("needs compute capability 9.0, and for backend cuda the extension built with CUTLASS")
    want = engine_of(model, compile="off", cuda_graphs=False)(LABELS)
    errors = []
    for ops in ("plain", backend):
        engine = engine_of(copy.deepcopy(model).use_ops({"fp8": ops}), compile=compile, precision="fp8")
        errors.append(image_error(engine(LABELS), want)["relative_l2"])
    # as many roundings, of other values
    assert 0 < errors[1] < 1.25 * errors[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_host_waits_for_nothing_in_a_trajectory(model, sampler, precision):
    engine = engine_of(model, sampler, compile="off", cuda_graphs=False, precision=precision, clamp="data")
    inputs = [x.cuda() for x in (torch.arange(3), torch.tensor([0]), torch.tensor([1, 2, 3]))]
    engine._draw(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine._draw(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_that_stream_are_not_overwritten_by_the_next(model):
    engine = engine_of(model)
    kept = list(engine.stream(LABELS))
    assert torch.equal(torch.cat([images for _, images in kept]), engine(LABELS))


def test_the_official_samples_come_out_of_a_recorded_trajectory():
    case = Case("samplers")
    network = EPGViT(**case.config["model"])
    network.load_state_dict(case.weights())
    cfg = case.config["interval_cfg"]
    options = {"steps": case.config["steps"], "guidance": cfg["scale"], "interval": (cfg["low"], cfg["high"])}
    want = SamplingEngine(network, **options)(case["y"], noise=case["initial_noise"])
    got = SamplingEngine(network.cuda(), **options)(case["y"], noise=case["initial_noise"])
    assert_close(got, want, rtol=0, atol=1e-3)
