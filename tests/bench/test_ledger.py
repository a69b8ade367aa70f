"""The ledger's arithmetic, its reader of Triton's code and its files: what needs neither CUDA nor a GPU."""

import pytest
import torch

from bench.ledger import cost, device, triton_ir
from bench.ledger.__main__ import main
from bench.ledger.cost import Kernel, Product, Tiles
from bench.ledger.count import kind_of_operator, multi_tensor_launches


def test_a_floor_is_the_longer_of_products_and_bytes():
    assert Kernel("copy", cost.COPIES, 2_150_000_000, 2_150_000_000).seconds == pytest.approx(1e-3)
    product = Kernel("mm", cost.PRODUCTS, 100, 100, flops=788_000_000_000)
    assert product.seconds == pytest.approx(1e-3)
    product.fp8 = True
    assert product.seconds == pytest.approx(0.5e-3)


def test_a_total_adds_launches_and_keeps_products_apart():
    kernels = [Kernel("mm", cost.PRODUCTS, 0, 0, flops=788_000_000), Kernel("norms", cost.NORMS, 4300, 0, launches=3)]
    found = cost.total(kernels)
    assert (found.kernels, found.bytes, found.flops) == (4, 4300, 788_000_000)
    assert (found.floor, found.above) == (pytest.approx(1.001e-6), pytest.approx(1e-9))


@pytest.mark.parametrize(
    ("columns", "across", "exact", "waves"), [(3072, 24, 24, 12), (6336, 50, 49.5, 25), (1584, 13, 12.375, 7)]
)
def test_tiles_and_waves_by_hand(columns, across, exact, waves):
    cut = Tiles(16512, columns, 128, 128, resident=2)  # 129 rows of tiles; 264 blocks at a time
    assert (cut.count, cut.unfilled) == (129 * across, pytest.approx(across / exact))
    assert cut.idle == pytest.approx(waves / (cut.count / 264))


def test_clusters_and_ragged_rows_cost_tiles():
    from bench.ledger.products import cutlass_tiles  # not before the other tests have a GPU to import it with

    assert cutlass_tiles(Tiles(16512, 1584, 128, 128, resident=2)) == Tiles(16512, 1584, 128, 256, cluster=2)
    assert Tiles(16512, 1584, 128, 256, cluster=2).count == 130 * 7
    assert Tiles(1, 1, 128, 128).unfilled == 128 * 128


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [(166, 4, 98304, 2), (255, 4, 82000, 2), (255, 8, 20000, 1), (32, 4, 0, 16), (64, 8, 0, 4)],
)
def test_blocks_of_a_multiprocessor_by_hand(registers, warps, shared, blocks):
    assert cost.resident(registers, warps, shared) == blocks


def test_skip_linear_is_not_a_win_at_its_break_even():
    product = Product(156e-6, 156e-6, 24e-6, Tiles(16512, 1584, 128, 128, resident=2))
    assert product.break_even == pytest.approx(1.154, abs=1e-3) and product.slowdown == pytest.approx(1.158, abs=1e-3)
    assert product.outcome == "not a win"
    assert Product(156e-6, 156e-6, 36e-6, product.tiles).outcome != "not a win"


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


def test_kinds_of_operators():
    kinds = {"addmm": cost.PRODUCTS, "_scaled_mm": cost.PRODUCTS, "skip_linear_out": cost.PRODUCTS}
    kinds |= {"_scaled_dot_product_cudnn_attention": cost.ATTENTION, "native_layer_norm_backward": cost.NORMS}
    kinds |= {"_to_copy": cost.COPIES, "clone": cost.COPIES, "sum": cost.REDUCTIONS, "gelu": cost.ELEMENTWISE}
    kinds |= dict.fromkeys(("_fused_adamw_", "_foreach_lerp_", "global_norm_out"), cost.OPTIMISER)
    assert {name: kind_of_operator(name) for name in kinds} == kinds


@pytest.mark.parametrize(
    ("sizes", "launches"),
    [([], 0), ([1], 1), ([10] * 4, 2), ([10] * 5, 3), ([100], 4), ([35], 2), ([30, 1], 2), ([10, 35], 2)],
)
def test_lists_take_as_many_launches_as_fill_up(sizes, launches):
    # at most 3 blocks of 10 values, or 2 tensors, in a launch
    assert multi_tensor_launches(sizes, blocks=3, chunk=10, rows=2) == launches


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
