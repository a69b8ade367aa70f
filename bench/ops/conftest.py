"""How one operation is measured: `pytest bench/ops --benchmark-only`.

On CUDA a CUDA graph holds one call per set of inputs, and the sets together exceed the L2 cache several times: each
call starts cold, and launches cost nothing. On a CPU one call is timed, at a reduced shape. `measure` adds to each
result the median and the 20th and 80th percentile of one call in microseconds, GB/s and TFLOP/s by the operation's
traffic model and FLOP count, and their shares of what a large copy and a large matrix product reached in the same
session.
"""

import statistics

import pytest
import torch

from bench.measure import large_copy, large_product
from bench.results import header

_CUDA = torch.cuda.is_available()
_DEVICE = torch.device("cuda" if _CUDA else "cpu")
_COLD_BYTES = 512 << 20  # inputs touched before any is touched again: several times the L2 cache of an H200


def pytest_addoption(parser):
    parser.addoption("--main-shapes", action="store_true", help="on a GPU, only the first shape of each operation")


def pytest_collection_modifyitems(config, items):
    if _CUDA and config.getoption("--main-shapes"):
        left_out = [item for item in items if item.callspec.params["shape"] != item.module.SPEC.shapes[0]]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def device() -> str:
    return _DEVICE.type


@pytest.fixture(scope="session")
def copy_gbps() -> float:
    return large_copy(_DEVICE) / 1e9


@pytest.fixture(scope="session")
def gemm_tflops() -> float:
    return large_product(_DEVICE) / 1e12


@pytest.fixture
def measure(benchmark, copy_gbps, gemm_tflops):
    def run(call, make_inputs, traffic: int, flops: int = 0, **labels) -> None:
        """Time call(*make_inputs(seed)), which moves `traffic` bytes and computes `flops` operations."""
        calls = max(1, _COLD_BYTES // traffic) if _CUDA else 1
        inputs = [make_inputs(seed) for seed in range(calls)]
        target = _graph(call, inputs) if _CUDA else lambda: call(*inputs[0])
        benchmark.pedantic(target, rounds=50 if _CUDA else 10, warmup_rounds=3)
        low, *_, high = statistics.quantiles(benchmark.stats.stats.data, n=5)
        median = benchmark.stats.stats.median
        gbps, tflops = traffic * calls / median / 1e9, flops * calls / median / 1e12
        benchmark.extra_info |= labels | {
            "median_us": 1e6 * median / calls,
            "p20_us": 1e6 * low / calls,
            "p80_us": 1e6 * high / calls,
            "gbps": gbps,
            "percent_of_copy": 100 * gbps / copy_gbps,
            "tflops": tflops,
            "percent_of_gemm": 100 * tflops / gemm_tflops,
        }

    return run


def _graph(call, inputs):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for arguments in inputs[:3]:
            call(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for arguments in inputs:
            call(*arguments)

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    return replay


def pytest_benchmark_update_machine_info(config, machine_info):
    # "cpu" is pytest-benchmark's own, and more
    machine_info |= {name: value for name, value in header().items() if name != "cpu"}
