"""The ladder of sampling: every rung draws the same images, and what is timed in part says so."""

import pytest
import torch

from bench import bench_sample
from bench.bench_sample import RUNGS, Sampling
from bench.ladder import NotHere, attempt
from bench.results import Results
from epg_fast.models import create_model
from epg_fast.models.pretrained import save_weights
from epg_fast.sampling import image_error


def _ladder(kind="heun", batch=2, **options):
    return Sampling("digits_32", kind, batch, **({"steps": 18, "seconds": 0, "device": "cpu"} | options))


def _rung(name):
    return next(rung for rung in RUNGS if rung.name == name)


@pytest.fixture(scope="module")
def heun():
    return _ladder()


@pytest.mark.parametrize("kind", ["heun", "onestep"])
def test_the_package_draws_the_images_of_the_plain_code(kind):
    ladder = _ladder(kind)
    engine = bench_sample.SamplingEngine
    images = engine(
        ladder.model,
        sampler=kind,
        steps=18,
        guidance=2.5 if kind == "heun" else 1.0,
        parameterization="x0" if kind == "heun" else "edm",
        normalization="imagenet",
    )(ladder.start[1], noise=ladder.start[0])
    assert image_error(images, ladder.reference)["relative_l2"] < 1e-4


def test_random_weights_leave_images_that_differ_and_stay_in_range(heun):
    images = heun.reference
    outside = ((images == 0) | (images == 1)).float().mean()
    assert images.std() > 0.1 and outside < 0.1 and (images[0] - images[1]).std() > 0.02
    guided = heun.plain_sampler(None)
    guided.denoiser.scale = 1.0
    assert image_error(guided(*heun.start), images)["relative_l2"] > 0.03


def test_rungs_have_speed_error_and_share_of_the_ceiling(heun):
    plain, ours = (attempt(heun, _rung(name)) for name in ("plain", "ours"))
    assert plain.error == 0 and "errors are measured against" in plain.note
    assert 1e-4 < ours.error < 0.05 and ours.details["psnr_db"] > 30 and not ours.note
    assert ours.unit == "images/s" and ours.shape == "digits_32, batch 2, 18 levels"
    products = ours.details["mfu"] * ours.details["ceiling_tflops"] * 1e12
    assert products == pytest.approx(ours.median / 2 * heun.plan.products)
    assert ours.details["repetitions"] == 3 and ours.peak_memory_bytes is None


def test_a_trajectory_that_takes_too_long_is_timed_in_part_and_says_so(heun, monkeypatch):
    calls = []
    sampler = heun.plain_sampler(None)
    count = sampler.network_calls
    monkeypatch.setattr(type(sampler), "__call__", lambda self, x, y, sigmas=None: calls.append(sigmas))
    monkeypatch.setattr(bench_sample.measure, "rounds", lambda call, *_, **__: [call() or 2.0] * 3)
    # two seconds for one interval, of which 13.5 seconds pay two in each of three repetitions
    heun_seconds, heun.seconds = heun.seconds, 13.5
    timed, _, notes = heun._timed_in_part(sampler)
    heun.seconds = heun_seconds
    made, all_calls = count(calls[-1]), count(sampler.levels)
    assert len(calls[-1]) == 3 and notes == [f"timed 2 of 17 intervals, {made} of {all_calls} network calls"]
    assert timed == [pytest.approx(2.0 * all_calls / made)] * 3 and timed[0] > 2.0 * 6


def test_a_trajectory_that_fits_is_timed_whole(heun, monkeypatch):
    monkeypatch.setattr(heun, "seconds", 1e3)
    monkeypatch.setattr(bench_sample.measure, "rounds", lambda call, *_, **__: [1.0])
    assert heun._timed_in_part(heun.plain_sampler(None))[0::2] == ([1.0], [])


def test_a_part_has_the_share_of_guided_calls_of_the_whole():
    sampler = _ladder(steps=32).plain_sampler(None)
    assert sampler.network_calls(sampler.levels) == 74
    for intervals in (1, 3, 10):
        part = sampler.part(intervals)
        assert len(part) == intervals + 1
        assert sampler.network_calls(part) == pytest.approx(74 / 31 * intervals, abs=1)
    assert torch.equal(sampler.part(31), sampler.levels)


@pytest.mark.parametrize("name", [rung.name for rung in RUNGS if rung.options.get("cuda_graphs")])
def test_what_needs_a_gpu_is_a_row_that_says_so(heun, name, monkeypatch):
    monkeypatch.setattr(heun, "reference", None)
    row = attempt(heun, _rung(name))
    assert row.median is None and row.note == "needs a CUDA device"


def test_one_step_has_no_steps_of_a_sampler_to_replace():
    with pytest.raises(NotHere, match="no step of a sampler"):
        _ladder("onestep")._ours(_rung("ours, extension's steps, CUDA graphs"))


def test_a_precision_that_gives_way_is_not_reported_as_what_was_asked_for(heun, monkeypatch):
    class Engine:
        precision = "bf16"

        def __init__(self, *arguments, **options):
            pass

    monkeypatch.setattr(bench_sample, "SamplingEngine", Engine)
    rung = bench_sample.Rung("ours, FP8", "fp8", {"compile": "off", "cuda_graphs": False})
    assert attempt(heun, rung).note == "this device has no fp8; the engine computes in bf16"


def test_of_one_image_the_latency_is_reported():
    row = attempt(_ladder("onestep", 1), _rung("ours"))
    assert row.unit == "ms" and row.shape == "digits_32, batch 1" and 0.1 < row.median < 1e3


def test_a_checkpoint_takes_the_place_of_random_weights(tmp_path):
    torch.manual_seed(7)
    model = create_model("digits_32")
    save_weights(tmp_path / "model.safetensors", model.state_dict(), {"preset": "digits_32"})
    ladder = _ladder(checkpoint=str(tmp_path / "model.safetensors"))
    assert torch.equal(ladder.model.class_embed.weight, model.class_embed.weight)
    # a fresh network's output is zero: grey images
    assert ladder.reference.std(dim=(2, 3)).max() < 1e-3


def test_a_profiled_rung_is_split_by_classes_of_kernels(heun):
    row = attempt(heun, _rung("plain, 16 bits"))
    assert row.details["split"]["of"] == "one interval"
    assert row.details["split"]["milliseconds"]["matrix products"] > 0


@pytest.mark.slow
def test_the_command_writes_rows_prints_a_table_and_goes_on(tmp_path, capsys, monkeypatch):
    arguments = [
        "--preset",
        "digits_32",
        "--job",
        "onestep",
        "--batch",
        "2",
        "--seconds",
        "0",
        "--output",
        str(tmp_path),
    ]
    assert bench_sample.main([*arguments, "--rungs", "plain", "ours"]) == 0
    out = capsys.readouterr().out
    assert "| plain" in out and "| ours" in out and (tmp_path / "sampling.json").is_file()
    monkeypatch.setattr(Results, "add", lambda self, row: pytest.fail("measured again"))
    assert bench_sample.main([*arguments, "--rungs", "plain", "ours"]) == 0


def test_mistakes_are_named_in_a_line(tmp_path, capsys):
    for flags, message in ((["--preset", "digits"], "did you mean"), (["--rungs", "our"], "wanted one of 'plain'")):
        assert bench_sample.main([*flags, "--output", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
