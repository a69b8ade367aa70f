"""The ledger's arithmetic, its reader of Triton's code and its files: what needs neither CUDA nor a GPU."""

import json

import pytest
import torch

from bench import compare, parts, results, roofline
from bench.ledger import cost, device, report, triton_ir
from bench.ledger.__main__ import main
from bench.ledger.cost import ATTENTION, COPIES, ELEMENTWISE, NORMS, OPTIMISER, PRODUCTS, REDUCTIONS, Kernel, Tiles
from bench.ledger.count import extension_tiles, kind_of_operator, multi_tensor_launches
from bench.results import Row


def test_a_floor_is_the_longer_of_products_and_bytes():
    assert Kernel("copy", COPIES, 2_150_000_000, 2_150_000_000).seconds == pytest.approx(1e-3)
    product = Kernel("mm", PRODUCTS, 100, 100, flops=788_000_000_000)
    assert product.seconds == pytest.approx(1e-3)
    product.fp8 = True
    assert product.seconds == pytest.approx(0.5e-3)


def test_a_total_adds_launches_and_keeps_products_apart():
    kernels = [Kernel("mm", PRODUCTS, 0, 0, flops=788_000_000), Kernel("norms", NORMS, 4300, 0, launches=3)]
    found = cost.total(kernels)
    assert (found.kernels, found.bytes, found.flops) == (4, 4300, 788_000_000)
    assert (found.products, found.above) == (pytest.approx(1e-6), pytest.approx(1e-9))


@pytest.mark.parametrize(
    ("columns", "tiles", "unfilled", "idle"),
    [
        (3072, 129 * 24, 1.0, 12 / (129 * 24 / 264)),
        (6336, 129 * 50, 50 / 49.5, 25 / (129 * 50 / 264)),
        (1584, 129 * 13, 13 / 12.375, 7 / (129 * 13 / 264)),
    ],
)
def test_tiles_and_waves_of_a_triton_product_by_hand(columns, tiles, unfilled, idle):
    cut = Tiles(16512, columns, 128, 128, resident=2)  # 129 rows of tiles; 264 blocks at a time
    assert cut.count == tiles
    assert (cut.unfilled, cut.idle) == (pytest.approx(unfilled), pytest.approx(idle))


def test_clusters_and_ragged_rows_cost_tiles():
    assert Tiles(16512, 1584, 128, 256, cluster=2).count == 130 * 7
    assert Tiles(1, 1, 128, 128).unfilled == 128 * 128


def test_skip_linear_is_not_a_win_at_its_break_even():
    assert cost.break_even(24e-6, 156e-6) == pytest.approx(1.154, abs=1e-3)
    slowdown = Tiles(16512, 1584, 128, 128, resident=2).slowdown
    assert slowdown == pytest.approx(1.158, abs=1e-3)
    assert cost.verdict(slowdown, cost.break_even(24e-6, 156e-6)) == "not a win"
    assert cost.verdict(1.03, 1.23) != "not a win"


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [(166, 128, 98304, 2), (255, 128, 82000, 2), (255, 256, 20000, 1), (32, 128, 0, 16), (64, 256, 0, 4)],
)
def test_blocks_of_a_multiprocessor_by_hand(registers, threads, shared, blocks):
    assert cost.resident(registers, threads, shared) == blocks


def test_the_extensions_tiles_are_those_of_its_header():
    assert extension_tiles(16512, 1584) == Tiles(16512, 1584, 128, 256, resident=1, cluster=2)


CODE = """
  tt.func public @kernel(%a: !tt.ptr<bf16> loc(#1), %b: !tt.ptr<f32> loc(#1), %c: !tt.ptr<f32> loc(#1), %n: i32) {
    %r = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32> loc(#1)
    %p = tt.splat %a : !tt.ptr<bf16> -> tensor<64x!tt.ptr<bf16>> loc(#1)
    %q = tt.addptr %p, %r : tensor<64x!tt.ptr<bf16>>, tensor<64xi32> loc(#1)
    %v = tt.load %q : tensor<64x!tt.ptr<bf16>> loc(#1)
    %either = scf.if %cond -> (!tt.ptr<f32>) {
      scf.yield %b : !tt.ptr<f32> loc(#1)
    } else {
      scf.yield %c : !tt.ptr<f32> loc(#1)
    } loc(#1)
    %sum = scf.for %i = %zero to %n step %one iter_args(%at = %either) -> (!tt.ptr<f32>)  : i32 {
      %w = tt.load %at : !tt.ptr<f32> loc(#1)
      %next = tt.addptr %at, %one : !tt.ptr<f32>, i32 loc(#1)
      scf.yield %next : !tt.ptr<f32> loc(#1)
    } loc(#1)
    %out = tt.splat %c : !tt.ptr<f32> -> tensor<32x!tt.ptr<f32>> loc(#1)
    tt.store %out, %v : tensor<32x!tt.ptr<f32>> loc(#1)
    tt.return loc(#1)
  } loc(#1)
"""


def test_loads_and_stores_are_followed_through_branches_and_loops():
    found = triton_ir.read(CODE, ["x", "y", "z"])
    assert dict(found.loaded) == {"x": 64, "y": float("inf"), "z": float("inf")}
    assert dict(found.stored) == {"z": 32}
    assert not found.products
    assert triton_ir.read(CODE.replace("tt.make_range", "tt.dot"), ["x", "y", "z"]).products


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("addmm", PRODUCTS),
        ("_scaled_mm", PRODUCTS),
        ("skip_linear_out", PRODUCTS),
        ("_scaled_dot_product_cudnn_attention", ATTENTION),
        ("native_layer_norm_backward", NORMS),
        ("_to_copy", COPIES),
        ("clone", COPIES),
        ("sum", REDUCTIONS),
        ("gelu", ELEMENTWISE),
        ("_fused_adamw_", OPTIMISER),
        ("_foreach_lerp_", OPTIMISER),
        ("global_norm_out", OPTIMISER),
    ],
)
def test_kinds_of_operators(name, kind):
    assert kind_of_operator(name) == kind


@pytest.mark.parametrize(
    ("sizes", "launches"),
    [([], 0), ([1], 1), ([10] * 4, 2), ([10] * 5, 3), ([100], 4), ([35], 2), ([30, 1], 2), ([10, 35], 2)],
)
def test_lists_take_as_many_launches_as_fill_up(sizes, launches):
    # at most 3 blocks of 10 values, or 2 tensors, in a launch
    assert multi_tensor_launches(sizes, blocks=3, chunk=10, rows=2) == launches


def test_the_minimum_is_the_rooflines():
    job = parts.jobs_of("digits_32", 8)[0]
    ceilings = roofline.Ceilings(cost.FLOPS, cost.BANDWIDTH, "the ledger's")
    assert sum(report.least_seconds(job).values()) == pytest.approx(roofline.seconds(job, ceilings))
    assert sum(report.least_seconds(job, fp8=True).values()) <= roofline.seconds(job, ceilings)


def _rows(floor, kernels, problems=None):
    split = dict.fromkeys(cost.KINDS, 0.0) | {PRODUCTS: floor - 2.0, NORMS: 2.0}
    details = {"kernels": kernels, "gigabytes": 30.0, "teraflop": 16.0, "milliseconds": split, "above_products": 2.0}
    details |= {"problems": problems or {}, "phases": {}, "least": {PRODUCTS: 20.0}}
    identity = ("sample_xl", "ours-blocks", "epg_xl_16_256, batch 64", "bf16")
    return [Row(*identity, "ms", *[floor] * 3, details=details), _launches(identity, kernels)]


def _launches(identity, kernels):
    return Row("sample_xl, launches", *identity[1:], "kernels", *[kernels] * 3)


def _file(folder, rows):
    found = results.Results(folder / "ledger.json", {"device": "counted"})
    for row in rows:
        found.add(row)
    return found.path


def test_two_ledgers_are_compared(tmp_path, capsys):
    before = _file(tmp_path / "a", _rows(23.8, 211))
    after = _file(tmp_path / "b", _rows(22.4, 165))
    assert compare.main([str(before), str(after)]) == 0
    said = capsys.readouterr().out
    assert "2 faster" in said and "211.0 kernels" in said and "22.40 ms" in said
    assert compare.main([str(after), str(before)]) == 1


def test_the_report_begins_with_what_its_numbers_are_not(tmp_path):
    plain = Row("sample_xl", "auto-network", "epg_xl_16_256, batch 64", "bf16", "ms", note="failed: no memory")
    problems = {"host sync: a value of the GPU is read in Python": 3}
    report.write(tmp_path, {"device": "counted"}, [plain, *_rows(23.8, 211, problems)])
    text = (tmp_path / "README.md").read_text()
    assert text.splitlines()[0].startswith("These are floors, counted and not measured")
    assert "ours-blocks: 23.80" in text and "failed: no memory" in text
    assert "read in Python (3 times)" in text
    assert (tmp_path / "ledger.png").read_bytes().startswith(b"\x89PNG")


def test_schemas_of_the_extension_are_read_from_its_sources():
    found = {schema.partition("(")[0] for schema in device.schemas()}
    assert {"fused_adamw_ema_", "global_norm_out", "skip_linear_out", "linear_gelu_out"} <= found


@pytest.mark.skipif(torch.version.cuda is not None, reason="is about a build of PyTorch without CUDA")
def test_without_a_cuda_build_one_line_says_what_to_do(capsys):
    assert main(["--job", "sample_xl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no CUDA" in line and "make ledger" in line


@pytest.mark.parametrize(("missing", "wanted"), [("_compiler", "gcc"), ("_headers", "CUDA_HOME")])
def test_without_a_compiler_or_headers_one_line_says_what_to_do(monkeypatch, capsys, missing, wanted):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "_compiler", lambda: "/usr/bin/cc")
    monkeypatch.setattr(device, "_headers", lambda: "/usr/include")
    monkeypatch.setattr(device, missing, lambda: None)
    monkeypatch.setenv("LD_PRELOAD", "")
    assert main(["--job", "sample_xl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert wanted in line


def test_the_committed_ledger_is_read():
    for path in (results.ROOT / "bench" / "results").glob("*-ledger/ledger.json"):
        run = results.read(path)
        assert run.rows and json.loads(path.read_text())["schema"] == results.SCHEMA
