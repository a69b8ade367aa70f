"""One operation, one stem: an operation has its example and kernel, and no kernel lacks its operation."""

import importlib
from pathlib import Path

import pytest

from epg_fast import ops
from tests.ops.examples import EXAMPLES

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(path.stem for path in (ROOT / "epg_fast/ops").glob("*.py") if "SPEC = OpSpec(" in path.read_text())
SHARED = {"__init__", "backends", "checks", "extension", "fp8", "registration", "spec"}
WITHOUT_KERNEL = {"philox"}  # plain PyTorch alone


def test_the_operations_are_found():
    assert {"euler_step", "layer_norm_modulate"} <= set(OPS)


def test_every_file_in_ops_is_an_operation_or_shared_by_them():
    assert {path.stem for path in (ROOT / "epg_fast/ops").glob("*.py")} == {*OPS, *SHARED, *WITHOUT_KERNEL}


@pytest.mark.parametrize("stem", OPS)
def test_an_operation_is_public_with_its_reference_and_has_its_example_and_its_kernel(stem):
    """The example is what it is tested and measured with: tests/ops/test_every_op.py and bench/ops.py read all."""
    public = set(ops.__all__)
    assert f"{stem}_ref" in public and public & {stem, f"{stem}_"}
    assert EXAMPLES[stem].spec.name == stem
    kernels = [ROOT / f"kernels/epg_kernels/{stem}.py", *(ROOT / "kernels/csrc").glob(f"{stem}.c*")]
    built_from = importlib.import_module(f"epg_fast.ops.{stem}").SPEC.built_from
    assert any(kernel.is_file() for kernel in kernels) != bool(built_from)
    assert set(built_from) <= set(OPS)


def test_every_kernel_belongs_to_an_operation():
    # A file whose name starts with an underscore holds what several kernels share.
    triton = {path.stem for path in (ROOT / "kernels/epg_kernels").glob("[!_]*.py")}
    shared = {"common", "gemm_sm90", "launch", "register", "tensor_list"}
    native = {path.stem for path in (ROOT / "kernels/csrc").iterdir()} - shared
    assert triton | native <= set(OPS)


def test_every_native_source_is_in_cmake_lists():
    listed = (ROOT / "CMakeLists.txt").read_text()
    for source in (ROOT / "kernels/csrc").iterdir():
        assert source.suffix in (".h", ".cuh") or f"kernels/csrc/{source.name}" in listed
