"""Access to tests/golden: tensors recorded from the official implementation, with a tolerance for each."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"

# Every backend of the operations must reproduce what was recorded; the Triton kernels do not compute in float64.
_TRITON = pytest.param(
    "triton", marks=[pytest.mark.slow, pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")]
)
each_backend = pytest.mark.parametrize("ops", ["plain", _TRITON])
each_backend_and_dtype = pytest.mark.parametrize(
    ("ops", "dtype"),
    [
        pytest.param("plain", torch.float32, id="plain-float32"),
        pytest.param("plain", torch.float64, id="plain-float64"),
        pytest.param("triton", torch.float32, id="triton-float32", marks=_TRITON.marks),
    ],
)


def interpret_only(ops: str, wanted: bool) -> None:
    """Skip a case of `triton` that is not `wanted` in Triton's interpreter, where it takes many seconds.

    For cases that run the same kernels on other values; a GPU runs them all.
    """
    if ops == "triton" and not wanted and not torch.cuda.is_available():
        pytest.skip("the interpreter runs these kernels in a neighbouring case")


@cache
def _cases() -> dict[str, dict]:
    return {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]}


def names(prefix: str) -> list[str]:
    return [name for name in _cases() if name.startswith(prefix)]


class Case:
    """One recorded case: `config`, input tensors by `case[name]`, weights, and `check` against the recorded output."""

    def __init__(self, name: str):
        self.spec = _cases()[name]
        self.config = self.spec["config"]
        self.tensors = load_file(GOLDEN / self.spec["file"])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def weights(self, part: str = "") -> dict[str, torch.Tensor]:
        files = self.spec["weights"]
        files = [files] if isinstance(files, str) else files
        (match,) = [f for f in files if part in f]
        return load_file(GOLDEN / match)

    def check(self, name: str, got: torch.Tensor) -> None:
        """Relative L2 error within the case's tolerance; element-wise where the case says so; integers exactly."""
        want, spec = self.tensors[name], self.spec["outputs"][name]
        assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, want {list(want.shape)}"
        if not want.is_floating_point():
            assert torch.equal(got, want), f"{name}: {got} is not {want}"
            return
        got, want = got.detach().double(), want.double()
        norm = want.norm()
        error = (got - want).norm() / (norm if norm > 0 else 1)
        tolerance = spec["suggested_rel_l2_tol"]
        assert error <= tolerance, f"{name}: relative L2 error {error:.2e} above {tolerance:.2e}"
        if "suggested_elementwise_rtol" in spec:
            bound = spec["suggested_elementwise_atol"] + spec["suggested_elementwise_rtol"] * want.abs()
            assert ((got - want).abs() <= bound).all(), f"{name}: an element is off by more than its tolerance"

    def check_gradients(self, module: torch.nn.Module, prefix: str = "") -> None:
        """Every recorded `<prefix>grad.<parameter>` against the gradients of `module`."""
        start = f"{prefix}grad."
        found = [name for name in self.spec["outputs"] if name.startswith(start)]
        assert found
        parameters = dict(module.named_parameters())
        for name in found:
            if name.removeprefix(start) in parameters:
                self.check(name, parameters[name.removeprefix(start)].grad)
