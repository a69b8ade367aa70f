"""One command makes the folder; parts share the time, fail alone and are not repeated; one report shows it all."""

import json
import sys
from importlib.util import find_spec

import pytest
import torch

from bench import __main__ as bench
from bench import report
from bench.__main__ import COMPLETE, CUT_SHORT, Part
from bench.ledger import cost
from bench.ledger.cost import NORMS, PRODUCTS
from bench.results import Results, Row, header, read
from bench.roofline import STAGES

SHAPE = "digits_32, batch 2"


def counted(variant, floor, kernels, problems=None):
    """A count of the ledger."""
    split = dict.fromkeys(cost.KINDS, 0.0) | {PRODUCTS: floor - 2.0, NORMS: 2.0}
    details = {"kernels": kernels, "gigabytes": 30.0, "teraflop": 16.0, "milliseconds": split, "above_products": 2.0}
    details |= {"problems": problems or {}, "phases": {}, "least": {PRODUCTS: 20.0}}
    details["resources"] = [["_norm_kernel", "sm_90", "BLOCK=1024", "bf16", "4", 72, 0, 64, "none", "12/14", 0, 7]]
    return Row("sample_xl", variant, SHAPE, "bf16", "ms", floor, floor, floor, details=details)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with results of all kinds, on a made-up GPU."""
    folder, about = tmp_path_factory.mktemp("results"), header() | {"device": "NVIDIA H200", "gpu": "NVIDIA H200"}

    def written(name, *rows):
        results = Results(folder / f"{name}.json", about)
        for row in rows:
            results.add(row)

    def measured(job, variant, median, unit="images/s", **more):
        shape, numbers = more.pop("shape", SHAPE), (median, 0.99 * median, 1.01 * median)
        return Row(job, variant, shape, "bf16", unit, *numbers, **more)

    longest = {"milliseconds": 4.0, "idle": 1.0, "kernels": [["nvjet_128x256", 3.0]]}
    for name, job in (("sampling", "sample-heun"), ("training", "pretrain")):
        details = {"mfu": 0.5, "floor": 0.6}
        written(
            name,
            measured(job, "plain", 100.0, details=details),
            measured(job, "ours", 120.0, error=1e-3, details=details | {"longest": longest}),
            Row(job, "ours, FP8, CUDA graphs", SHAPE, "fp8", "images/s", note="failed: out of memory"),
        )
    ratio = {"ratio": {"median": 1.25, "p20": 1.2, "p80": 1.3}}
    written("turns", measured("pretrain", "plain", 5.0, "ms"), measured("pretrain", "ours", 4.0, "ms", details=ratio))
    roof = {"percent_of_copy": 80.0, "percent_of_gemm": 10.0}
    written(
        "ops",
        *(measured("attention", name, t, "us", details=roof) for name, t in (("triton", 5.0), ("eager", 20.0))),
        measured("attention", "compile", 10.0, "us"),
    )
    written(
        "data", *(measured("data", name, r, details={"levels": 0.5}) for name, r in (("pillow", 10.0), ("dali", 20.0)))
    )
    product = cost.Product(156e-6, 156e-6, 24e-6, cost.Tiles(16512, 1584, 128, 128, resident=2))
    written(
        "ledger",
        counted("auto-network", 25.0, 227),
        counted("ours-blocks", 23.8, 187, {"host sync: a value": 3}),
        measured(report.OWN_PRODUCTS, "decoder.skip", 181.0, "us", details=product.as_json()),
    )
    return folder


def lines(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_the_report_begins_with_what_a_floor_is_not_and_has_a_table_of_everything(folder):
    text = report.write(folder)
    assert text == (folder / "README.md").read_text() and text.startswith("These are floors, counted and not measured")
    ladder = text[text.index("### sample-heun") :]
    assert ladder.index("| plain ") < ladder.index("| ours ") < ladder.index("| ours, FP8")
    (ours, _) = lines(ladder, "| ours ")[:2]
    assert "1.20x" in ours and "50.0% | 60.0%" in ours and "1.0e-03" in ours
    assert "failed: out of memory" in ladder and "| nvjet_128x256 | 3.00 |   75% |" in ladder
    (turns,) = lines(text[text.index("in turns") :], "| pretrain ")
    assert "1.25x | 1.20x to 1.30x" in turns
    (operation,) = lines(text, "| attention ")
    assert "5.00 (triton) | 10.0 (compile)" in operation and "2.00x" in operation and "80%" in operation
    assert "2.00x" in lines(text, "| dali ")[0]
    (ledger,) = lines(text, "| sample_xl | digits")
    assert "auto-network: 25.00" in ledger and "ours-blocks: 23.80" in ledger and "4.8%" in ledger and "20.00" in ledger
    assert "- sample_xl, ours-blocks: host sync: a value (3 times)" in text
    (product,) = lines(text, "| decoder.skip ")
    assert "+5.1% |    +10.2% |           181 | 1.158 |      1.154 | not a win" in product
    (used,) = lines(text, "| _norm_kernel ")  # of both counts
    assert used.endswith(" 7 |")
    for name in ("sampling", "training", "ledger") if find_spec("matplotlib") else ():
        png = (folder / f"{name}.png").read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") == 1200  # pixels wide
        assert f"![{name}]({name}.png)" in text


def test_a_report_without_matplotlib_has_its_tables_and_names_the_remedy(folder, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = report.write(folder)
    assert ".png" not in text and "| plain " in text and "pip install 'epg_fast[demo]'" in capsys.readouterr().err


def test_an_empty_folder_is_no_report(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        report.write(tmp_path)


def part(name, outcome=COMPLETE, seconds=10, calls=None):
    def work(folder, share):
        if calls is not None:
            calls.append((name, round(share)))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return Part(name, seconds, work)


def test_parts_get_their_share_and_what_others_leave(tmp_path):
    calls = []
    parts = [part("a", seconds=10, calls=calls), part("b", seconds=30, calls=calls)]
    assert bench.run(parts, tmp_path, 100) == {"a": COMPLETE, "b": COMPLETE}
    assert calls == [("a", 25), ("b", 100)]


def test_a_part_that_fails_or_is_cut_short_is_done_again_and_the_others_are_not(tmp_path):
    Results(tmp_path / "ops.json", header()).add(Row("attention", "eager", SHAPE, "bf16", "us", 1.0, 1.0, 1.0))
    calls = []
    first = [
        part("a", calls=calls),
        part("b", ValueError("two\nlines"), calls=calls),
        part("c", CUT_SHORT, calls=calls),
    ]
    assert bench.run(first, tmp_path, 100) == {"a": COMPLETE, "b": "failed: ValueError: two", "c": CUT_SHORT}
    assert "- b: failed: ValueError: two" in (tmp_path / "README.md").read_text()
    calls.clear()
    again = [part(name, calls=calls) for name in "abc"]
    assert set(bench.run(again, tmp_path, 100).values()) == {COMPLETE}
    assert calls == [("b", 50), ("c", 100)]  # all the time is theirs
    assert "All parts are complete" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("outcome, code", [(COMPLETE, 0), ("not here: x", 0), ("failed: x", 1), (CUT_SHORT, 3)])
def test_exit_codes_say_how_it_ended(tmp_path, monkeypatch, outcome, code):
    for parts in ("gpu_parts", "cpu_parts"):
        monkeypatch.setattr(bench, parts, lambda: [part("a", outcome)])
    assert bench.main(["--output", str(tmp_path)]) == code
    assert json.loads((tmp_path / "progress.json").read_text()) == {"a": outcome}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--job", "pretrain", "--preset", "epg_xl_16_25"], "did you mean 'epg_xl_16_256'"),
        (["--job", "pretrain", "--preset", "digits_32", "--variants", "our"], "variant 'our': wanted one of 'plain'"),
    ],
)
def test_mistakes_are_named_in_a_line_before_anything_runs(flags, message, tmp_path, capsys):
    assert bench.main([*flags, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--parts", "huen"])


def test_gpu_parts_have_all_presets_and_stay_below_ten_minutes():
    parts = {one.name: one for one in bench.gpu_parts()}
    assert sum(one.seconds for one in parts.values()) <= 600
    ladders = {name: one.work.args[0] for name, one in parts.items() if one.work.func is bench.ladder}
    shapes = {name: ladder.shape for name, ladder in ladders.items()}
    assert shapes["heun"] == "epg_xl_16_256, batch 64, 32 levels" and shapes["latency"] == "epg_l_16_256, batch 1"
    assert shapes["onestep"] == "epg_l_16_256, batch 64" and {"diffusion", "pretrain", "consistency"} <= set(shapes)
    assert all(ladder.work.flops for ladder in ladders.values())


def test_a_command_that_takes_too_long_is_stopped(tmp_path):
    log = tmp_path / "x.log"
    assert bench._command(["-c", "import time; time.sleep(60)"], log, 1.0) == CUT_SHORT
    assert bench._command(["-c", "print('why'); raise SystemExit(4)"], log, 30.0) == "failed: exit code 4, see x.log"
    assert log.read_text() == "why\n"
    assert bench._command(["-c", "pass"], log, 30.0) == COMPLETE and not log.exists()


def test_all_jobs_take_turns_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "in_turns", lambda job: [Row(job.job, "ours", job.shape, "fp32", "ms", 1.0, 1.0, 1.0)])
    assert bench.turns("digits_32", 4, 3, tmp_path, 0.0) == COMPLETE
    assert [row.job for row in read(tmp_path / "turns.json")[1]] == ["sample-heun", *STAGES]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a CPU")
def test_a_ladder_makes_the_folder_and_repeats_nothing(tmp_path, capsys):
    flags = ["--output", str(tmp_path), "--job", "sample-onestep", "--preset", "digits_32", "--batch", "2"]
    assert bench.main([*flags, "--variants", "plain", "ours"]) == 0
    assert "| ours " in (tmp_path / "README.md").read_text()
    stamp = (tmp_path / "sampling.json").stat().st_mtime_ns
    assert bench.main([*flags, "--variants", "plain", "ours"]) == 0
    assert (tmp_path / "sampling.json").stat().st_mtime_ns == stamp
