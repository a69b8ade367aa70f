"""The comparison on a CPU: turns, ratios of neighbours, and nothing timed that is wrong."""

import pytest

from bench import cpu_compare
from bench.cpu_compare import Pair, compare, pairs, table
from bench.train_jobs import JOBS


def test_ratios_are_those_of_turns_that_lie_beside_each_other(monkeypatch):
    order, now = [], [0.0]
    monkeypatch.setattr(cpu_compare.time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds * (1 + len(order) / 10)  # a machine that gets slower all the time

        return run

    plain, ours = compare(Pair("job", "shape", call("p", 0.004), call("o", 0.002), 1e-6), seconds=0)
    assert "".join(order) == "po" + "poop" * 2 + "po"
    ratio = ours.details["ratio"]
    assert ratio["p20"] < ratio["median"] < ratio["p80"] and ratio["median"] == pytest.approx(2, rel=0.1)
    assert plain.unit == "ms" and plain.median > ours.median > 2 and ours.error == 1e-6 and plain.error is None
    assert ours.details["repetitions"] == 5


@pytest.mark.parametrize("error", [2e-3, float("nan")])
def test_what_differs_is_not_timed(error):
    rows = compare(Pair("job", "shape", pytest.fail, pytest.fail, error), seconds=0)
    assert all(row.median is None and "not timed: outputs differ" in row.note for row in rows)
    assert "not timed" in table(list(rows))


def test_all_jobs_of_the_digits_agree_with_the_plain_code():
    found = {pair.job: pair for pair in pairs("digits_32", 8, 4)}
    assert list(found) == ["forward", "sample-heun", *JOBS]
    assert all(pair.error < 1e-4 for pair in found.values())
    for pair in found.values():
        pair.plain()
        pair.ours()


def test_an_unknown_preset_is_named_in_a_line(tmp_path, capsys):
    assert cpu_compare.main(["--preset", "digits", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
