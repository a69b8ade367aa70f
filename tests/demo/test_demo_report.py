import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

_SPEC = importlib.util.spec_from_file_location("demo_report", Path(__file__).parents[2] / "demo" / "report.py")
report = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(report)

BASELINES = {
    "num_images": 500,
    "real_frechet_distance": 0.071,
    "real_resized_frechet_distance": 0.212,
    "class_means_frechet_distance": 1.44,
    "class_means_accuracy": 1.0,
}


def samples(accuracy, distance, **sampling):
    return {
        "accuracy": accuracy,
        "frechet_distance": distance,
        "classifier_accuracy": 0.991,
        "baselines": BASELINES,
        "protocol": {
            "text": "500 samples compared as 8x8 grayscale.",
            "sampling": {"sampler": None, "steps": None, "guidance": None} | sampling,
        },
    }


def probe(*accuracy):
    levels = dict(zip(("0.002", "0.5", "2", "5"), accuracy, strict=True))
    return {"accuracy": levels, "protocol": {"text": "Logistic regression."}}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def run(tmp_path):
    """A finished demo with made-up figures that reach every goal."""
    run = tmp_path / "runs" / "demo"
    for name, ends in {"pretrain": (8.5, 4.0), "diffusion": (900, 25), "consistency": (60, 9)}.items():
        rows = [
            {"step": 20 * (i + 1), "loss": loss, "images_per_second": 900.0, "elapsed_s": i * 0.7}
            for i, loss in enumerate(np.geomspace(*ends, 150).tolist())
        ]
        write(run / name / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(run / "eval" / "diffusion.json", samples(0.982, 0.16, sampler="heun", steps=18, guidance=1.5))
    write(run / "eval" / "diffusion_unguided.json", samples(0.942, 0.159, sampler="heun", steps=18, guidance=1.0))
    write(run / "eval" / "consistency.json", samples(0.916, 0.349, sampler="onestep", steps=1))
    write(run / "eval" / "diffusion_fp8.json", samples(0.98, 0.17))
    write(run / "samples_diffusion_bf16" / "precision.json", {"psnr_db": 55.2, "relative_l2": 0.0034})
    write(run / "samples_diffusion_fp8" / "precision.json", {"psnr_db": 38.1, "relative_l2": 0.024})
    write(run / "eval" / "probe_before.json", probe(0.76, 0.7, 0.5, 0.3))
    write(run / "eval" / "probe_after.json", probe(0.95, 0.94, 0.85, 0.5))
    write(run / "timings.json", {"pretrain": 60.4, "diffusion": 115.0, "consistency": 110.2})
    for name in report.SHOWN:
        (run / f"samples_{name}").mkdir()
        Image.new("RGB", (40, 40)).save(run / f"samples_{name}" / "grid.png")
    return run


def test_a_finished_demo_gives_pictures_figures_and_a_report(run, capsys):
    assert report.main([str(run)]) == 0
    for name in ("curves.png", "probe.png"):
        pixels = np.asarray(Image.open(run / name).convert("L"))
        assert pixels.shape[1] > 500 and pixels.std() > 10
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["goals_reached"] is True and sum(bool(goal["relation"]) for goal in metrics["goals"]) == 6
    assert metrics["total_s"] == pytest.approx(285.6)
    assert metrics["training"]["diffusion"]["steps"] == 3000
    assert "all goals reached" in capsys.readouterr().out
    made = sorted(path.name for path in run.iterdir() if path.is_file())
    assert made == ["curves.png", "metrics.json", "probe.png", "report.md", "timings.json"]
    text = (run / "report.md").read_text()
    for line in (
        "| Diffusion, guided | accuracy | 98.2% | at least 95.0% | yes |",
        "| Consistency, one step | Frechet distance | 0.349 | at most 0.500 | yes |",
        "| Diffusion, guided, bf16 | PSNR against fp32, dB | 55.2 | at least 35.0 | yes |",
        "| Diffusion, guided, fp8 | accuracy lost against fp32 | 0.2% | at most 1.0% | yes |",
        "| Diffusion, guided, fp8 | relative L2 error against fp32 | 0.024 | none set |  |",
        "| before pre-training | 76.0% | 70.0% | 50.0% | 30.0% |",
        "| total | 286 |",
        *("500 samples compared as 8x8", "0.071", "0.212", "100% accuracy", "1.44", "guidance 1.5", "torch 2"),
    ):
        assert line in text, line
    for picture in re.findall(r"\]\((.*?)\)", text):
        assert (run / picture).is_file()


@pytest.fixture
def _no_pictures(monkeypatch):
    monkeypatch.setattr(report.page, "drawn", lambda *_, **__: b"")


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize(
    ("file", "content", "missed"),
    [
        ("eval/diffusion.json", samples(0.95, 0.30), []),
        ("eval/diffusion.json", samples(0.949, 0.301), ["accuracy", "frechet_distance"]),
        ("eval/consistency.json", samples(0.849, 0.51), ["accuracy", "frechet_distance"]),
        ("samples_diffusion_bf16/precision.json", {"psnr_db": 34.9, "relative_l2": 0.05}, ["psnr_db"]),
        ("eval/diffusion_fp8.json", samples(0.971, 0.17), ["accuracy_lost"]),
    ],
)
def test_every_figure_is_judged(run, capsys, file, content, missed):
    write(run / file, content)
    report.main([str(run)])
    metrics = json.loads((run / "metrics.json").read_text())
    assert [goal["figure"] for goal in metrics["goals"] if not goal["reached"]] == missed
    assert ("NOT every goal" in capsys.readouterr().out) == bool(missed) == (not metrics["goals_reached"])
    assert ("**no**" in (run / "report.md").read_text()) == bool(missed)


def test_an_input_that_is_missing_or_unreadable_is_named_with_the_remedy(run):
    for file, content, message in (
        ("pretrain/metrics.jsonl", None, "is missing; run the whole demo with: make demo"),
        ("eval/consistency.json", None, "is missing"),
        ("timings.json", None, "is missing"),
        ("samples_diffusion_unguided/grid.png", None, "is missing"),
        ("samples_diffusion_bf16/precision.json", None, "is missing"),
        ("eval/diffusion.json", "{", r"diffusion\.json is not valid JSON"),
        ("eval/diffusion.json", {"accuracy": 1.0}, "lacks 'frechet_distance'"),
        ("pretrain/metrics.jsonl", "\n", r"metrics\.jsonl holds no line"),
    ):
        before = (run / file).read_bytes()
        if content is None:
            (run / file).unlink()
        else:
            write(run / file, content)
        with pytest.raises(SystemExit, match=message):
            report.main([str(run)])
        assert not (run / "report.md").exists()
        (run / file).write_bytes(before)


def test_metrics_of_a_killed_and_resumed_run_are_read(run, capsys):
    path = run / "pretrain" / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 3}\n{"step": 20, "loss": 9}\n{"step": 30, "lo\n{"step": 20, "loss": 2}\n')
    assert report.read_metrics(path) == [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}]
    assert "line 3" in capsys.readouterr().err


def test_losses_that_are_not_finite_leave_gaps_and_valid_json(run):
    write(run / "consistency" / "metrics.jsonl", '{"step": 1, "loss": NaN}\n{"step": 2, "loss": NaN}\n')
    write(run / "diffusion" / "metrics.jsonl", '{"step": 1, "loss": 5.0}\n{"step": 2, "loss": NaN}\n')
    report.main([str(run)])
    text = (run / "metrics.json").read_text()
    training = json.loads(text)["training"]
    assert training["consistency"]["last_loss"] is None and training["diffusion"]["last_loss"] == 5
    assert "NaN" not in text


def test_the_running_mean_covers_a_tenth_and_averages_what_there_is_at_the_ends():
    line = [3.0 + 2 * i for i in range(60)]
    smoothed = report.running_mean(line)
    assert smoothed[3:-3] == pytest.approx(line[3:-3])
    assert smoothed[0] == pytest.approx(sum(line[:4]) / 4) and smoothed[-1] == pytest.approx(sum(line[-4:]) / 4)
    assert report.running_mean([4.0]) == [4.0]


@pytest.mark.usefixtures("_no_pictures")
def test_what_evaluation_returns_is_what_the_report_reads(run, digits):
    pytest.importorskip("sklearn")
    from epg_fast.config import EvaluateConfig
    from epg_fast.evaluation import evaluate_images

    config = EvaluateConfig(samples=f"{digits}/test", train=f"{digits}/train", test=f"{digits}/test")
    found = evaluate_images(config)
    for name in ("diffusion", "diffusion_fp8"):
        write(run / "eval" / f"{name}.json", found)
    report.main([str(run)])
    assert json.loads((run / "metrics.json").read_text())["goals_reached"] is True
    assert "450 held-out real images" in (run / "report.md").read_text()
