"""The ladders' jobs: every variant makes the same images, or has the same losses, from the same start."""

import pytest
import torch

from bench import measure, sample
from bench.ladder import OURS, PLAIN, NotHere, Variant, attempt
from bench.measure import Ceilings
from bench.roofline import STAGES
from bench.sample import Sampling
from bench.train import OurTraining, PlainTraining, Problem, Training
from epg_fast.ops import extension
from epg_fast.sampling import image_error

CPU = torch.device("cpu")


def sampling(job="sample-heun", batch=2, **options):
    ladder = Sampling(job, "digits_32", batch, **({"steps": 8, "seconds": 0, "device": "cpu"} | options))
    ladder.ceilings = Ceilings(1e12, 1e10)
    return ladder


def training(job, **options):
    ladder = Training(job, "digits_32", 8, **({"seconds": 0, "compared": 2, "device": "cpu"} | options))
    ladder.ceilings = Ceilings(1e12, 1e10)
    return ladder


def variant(name, variants=sample.VARIANTS):
    return next(one for one in variants if one.name == name)


@pytest.fixture(scope="module")
def heun():
    return sampling(steps=18)


@pytest.mark.parametrize("job", ["sample-heun", "sample-onestep"])
def test_the_package_draws_the_images_of_the_plain_code(job):
    assert sampling(job).prepare(OURS).error < 1e-4


@pytest.mark.parametrize("job", STAGES)
def test_losses_of_the_first_updates_are_those_of_the_plain_code(job):
    ladder = training(job, compared=3)
    ready = ladder.prepare(OURS)
    assert ready.error < 1e-5 and len(set(ready.details["first_losses"])) == 3
    # the reference computes blocks again to save memory
    assert ladder.prepare(PLAIN).error < 1e-5


def test_random_weights_leave_images_that_differ_and_stay_in_range(heun):
    images = heun.reference
    outside = ((images == 0) | (images == 1)).float().mean()
    assert images.std() > 0.1 and outside < 0.1 and (images[0] - images[1]).std() > 0.02
    guided = heun.plain_sampler(None)
    guided.denoiser.scale = 1.0
    assert image_error(guided(*heun.start), images)["relative_l2"] > 0.03


@pytest.mark.slow
def test_sampling_has_speed_error_and_shares_of_the_ceilings(heun):
    plain, ours = (attempt(heun, variant(name)) for name in ("plain", "ours"))
    assert plain.error == 0 < 1e-4 < ours.error < 0.05 and ours.details["psnr_db"] > 30 and not ours.note
    assert ours.unit == "images/s" and ours.shape == "digits_32, batch 2, 18 levels"
    products = ours.details["mfu"] * ours.details["ceiling_tflops"] * 1e12
    assert products == pytest.approx(ours.median / 2 * heun.work.flops)
    assert ours.details["repetitions"] == 3 and ours.peak_memory_bytes is None


@pytest.mark.slow
def test_training_has_speed_the_error_of_its_losses_and_its_longest_operators():
    ladder = training("finetune-diffusion")
    row = attempt(ladder, variant("plain, 16 bits", ladder.variants))
    assert row.unit == "images/s" and row.median > 0 and 0 < row.error < 0.05 and row.details["mfu"] > 0
    assert len(row.details["first_losses"]) == 2 and "aten::mm" in dict(row.details["longest"]["kernels"])


@pytest.mark.parametrize("seconds, scale", [(13.5, 6.0), (1e3, 1.0)])
def test_a_trajectory_that_takes_too_long_is_timed_in_part_and_says_so(monkeypatch, seconds, scale):
    # two seconds for an interval, of which 13.5 seconds pay two in each of three repetitions
    monkeypatch.setattr(measure, "rounds", lambda *_, **__: [2.0])
    ladder = sampling(steps=18, seconds=seconds)
    sampler = ladder.plain_sampler(None)
    monkeypatch.setattr(type(sampler), "__call__", lambda self, x, y, sigmas=None: None)
    ready, calls = ladder.prepare(PLAIN), sampler.network_calls(sampler.levels)
    if scale == 1:
        assert ready.scale == 1 and not ready.notes
    else:
        made = round(calls / ready.scale)
        assert ready.scale > scale and ready.notes == [f"timed 2 of 17 intervals, {made} of {calls} network calls"]


def test_a_part_has_the_share_of_guided_calls_of_the_whole():
    sampler = sampling(steps=32).plain_sampler(None)
    assert sampler.network_calls(sampler.levels) == 74
    for intervals in (1, 3, 10):
        part = sampler.part(intervals)
        assert len(part) == intervals + 1
        assert sampler.network_calls(part) == pytest.approx(74 / 31 * intervals, abs=1)
    assert torch.equal(sampler.part(31), sampler.levels)


def test_of_one_image_the_latency_is_reported():
    row = attempt(sampling("sample-onestep", 1), variant("ours"))
    assert row.unit == "ms" and row.shape == "digits_32, batch 1" and row.median > 0.1


def test_what_needs_a_gpu_is_a_row_that_says_so():
    sample, train = sampling(), training("pretrain")
    sample.reference = train.reference = None
    gpu = ("ours, network, CUDA graphs", "ours, blocks, Triton kernels", "ours, blocks, FP8")
    rows = [attempt(sample, one) for one in sample.variants if one.options.get("cuda_graphs")]
    rows += [attempt(train, variant(name, train.variants)) for name in gpu]
    assert len(rows) == 9 and {row.note for row in rows} == {"needs a CUDA device"}


def test_what_a_job_cannot_have_says_why(monkeypatch):
    assert not any("steps" in one.name for one in sampling("sample-onestep").variants)
    with monkeypatch.context() as patch, pytest.raises(NotHere, match="the extension, which is not built"):
        patch.setattr(extension, "extension_status", lambda: (False, "not built"))
        training("pretrain")._made(Variant("x", "bf16", {"optimizer": "fused", "compile": "off"}))
    for made in (lambda: sampling()._engine, lambda: training("pretrain")._made):
        with pytest.raises(NotHere, match="plan"):
            made()(variant("ours, planned"))


def test_a_precision_that_gives_way_is_not_reported_as_what_was_asked_for(heun, monkeypatch):
    class Engine:
        precision = "bf16"

        def __init__(self, *arguments, **options):
            pass

    monkeypatch.setattr(sample, "SamplingEngine", Engine)
    row = attempt(heun, Variant("ours, FP8", "fp8", {"compile": "off", "cuda_graphs": False}))
    assert row.note == "this device has no fp8; the engine computes in bf16"


@pytest.mark.parametrize("job, exempt", [("pretrain", 0), ("finetune-diffusion", 2), ("finetune-consistency", 2)])
def test_the_plain_code_decays_the_weights_that_the_package_does(job, exempt):
    problem = Problem(job, "digits_32", 8, CPU)
    groups = PlainTraining(problem, None).trainer.optimizer.param_groups
    ours = OurTraining(problem, "torch", precision="fp32").state.optimizer.param_groups
    wanted = {group["weight_decay"]: len(group["params"]) for group in ours}
    assert {group["weight_decay"]: len(group["params"]) for group in groups if group["params"]} == wanted
    assert len(groups[1]["params"]) == exempt == wanted.get(0.0, 0)


@pytest.mark.parametrize("job", STAGES)
def test_the_lowest_variant_is_in_the_released_precision(job):
    ladder = training(job)
    trainer = ladder._made(ladder.variants[0]).trainer
    wanted = torch.float16 if job == "pretrain" else None
    assert trainer.dtype == wanted and trainer.scaler.is_enabled() == (wanted is not None)
