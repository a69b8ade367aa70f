"""Goals are reached, missed or not measured, by the rows that they name."""

import pytest

from bench.goals import GOALS, HEUN, LATENCY, ONE_STEP, goals_table
from bench.results import Row

H200 = "NVIDIA H200"


def _row(ladder, rung, value, dtype="bf16", mfu=0.5, memory=10, unit="images/s"):
    numbers = {"median": value, "p20": value, "p80": value} if value else {"note": "failed: out of memory"}
    return Row(
        job=ladder[0],
        shape=ladder[1],
        rung=rung,
        dtype=dtype,
        unit=unit,
        peak_memory_bytes=memory,
        details={"mfu": mfu},
        **numbers,
    )


def _rows(**changed):
    values = {"plain": 2.0, "half": 10.0, "compiled": 20.0, "ours": 23.0, "other": 22.0, "fp8": 33.0} | changed
    names = {"half": "plain, 16 bits", "compiled": "plain, torch.compile", "other": "ours, Triton kernels"}
    dtypes = {"plain": "fp32", "fp8": "fp8"}
    rows = [
        _row(
            HEUN,
            "ours, FP8" if name == "fp8" else names.get(name, name),
            value,
            dtypes.get(name, "bf16"),
            mfu=0.8 if name == "ours" else 0.7,
            memory=12 if name == "ours" else 10,
        )
        for name, value in values.items()
    ]
    rows.append(_row(LATENCY, "ours", 1.1, unit="ms"))
    rows.append(_row(LATENCY, "ours, slow", 1.5, unit="ms"))
    rows.append(_row(LATENCY, "plain, 16 bits", 0.1, unit="ms"))
    return [*rows, _row(ONE_STEP, "ours", 100.0, mfu=0.79)]


def _outcomes(rows, gpu=H200):
    lines = goals_table(rows, gpu).splitlines()[2:]
    return [tuple(cell.strip() for cell in line.split("|")[2:-1]) for line in lines]


def test_every_goal_is_judged_by_the_fastest_of_our_rows():
    found = _outcomes(_rows())
    assert len(found) == len(GOALS) == 8
    assert [row[1] for row in found] == ["80.0%", "11.50x", "2.30x", "1.15x", "1.43x", "1.20x", "1.10 ms", "79.0%"]
    assert [row[2] for row in found] == ["reached"] * 7 + ["not reached"]
    assert found[3][3] == "ours, against plain, torch.compile" and found[6][0] == "at most 1.20 ms"


def test_goals_that_are_missed_say_so_with_the_number():
    found = _outcomes(_rows(ours=22.2, fp8=24.0))
    assert found[3][1:3] == ("1.11x", "not reached") and found[4][1:3] == ("1.08x", "not reached")
    # the fastest is another one then, with its own memory and share
    found = _outcomes(_rows(ours=21.0))
    assert found[0][1:] == ("70.0%", "not reached", "ours, Triton kernels") and found[5][1] == "1.00x"


def test_a_goal_without_its_rows_is_not_measured_and_says_why():
    found = _outcomes(_rows(compiled=None))
    assert found[3][1:] == ("", "not measured", "plain, torch.compile: failed: out of memory")
    assert found[2][2] == "reached"
    assert {row[2] for row in _outcomes([])} == {"not measured"}
    without = [row for row in _rows() if row.dtype != "fp8"]
    assert _outcomes(without)[4][3] == "no measured row of sample-heun, epg_xl_16_256, batch 64, 32 levels, ours in fp8"


@pytest.mark.parametrize(
    "gpu, why", [("none", "has no GPU"), ("NVIDIA L40S", "no Hopper"), ("NVIDIA B200", "no Hopper")]
)
def test_rows_of_another_device_reach_nothing(gpu, why):
    assert all(row[2] == "not measured" and why in row[3] and row[1] == "" for row in _outcomes(_rows(), gpu))


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"])
def test_hoppers_are_known(gpu):
    assert _outcomes(_rows(), gpu)[0][2] == "reached"


def test_training_is_reported_without_a_goal():
    rows = [
        *_rows(),
        _row(("pretrain", "x, batch 1"), "plain", 9.0),
        _row(("pretrain", "x, batch 1"), "ours", 8.0, mfu=0.6),
    ]
    assert _outcomes(rows)[-1] == ("no goal is stated", "60.0% of the GEMM ceiling, 8.00 images/s", "", "ours")
