"""Rungs that fail, die or hang cost their own row; what was measured is not measured again."""

import os
import time

import pytest
import torch

from bench import ladder, measure
from bench.ladder import UNFINISHED, Ladder, NotHere, Rung, attempt, chosen, climb, open_results
from bench.parts import Job, Part
from bench.results import Results, read
from bench.roofline import Ceilings

HEADER = dict.fromkeys(ladder._SAME, "1")


class Toy(Ladder):
    """A ladder whose rungs do what they are called."""

    job, shape, images, unit, device, threads = "toy", "batch 4", 4, "images/s", torch.device("cpu"), 1
    plan = Job("toy", 4, (Part("p", (1,), "forward", 10**9, 10**6),))
    ceilings = Ceilings(1e12, 1e12, "made up")

    def __init__(self, *names, unit="images/s"):
        self.rungs, self.unit = tuple(Rung(name, "fp32", later=name.startswith("late")) for name in names), unit

    def measure(self, rung):
        if rung.name == "die":
            os._exit(5)
        if rung.name == "hang":
            time.sleep(60)
        if rung.name == "raise":
            raise RuntimeError("out of memory\nand more")
        if rung.name == "absent":
            raise NotHere("needs a device")
        return self.row(rung, [0.01, 0.02, 0.04], 0.5, threads=torch.get_num_threads())


def _climb(tmp_path, *names, limit=60.0, rung_limit=30.0):
    found = open_results(tmp_path / "toy.json", HEADER)
    done = climb(Toy(*names), found, limit=limit, rung_limit=rung_limit)
    return done, {row.rung: row for row in read(tmp_path / "toy.json").rows}


def test_rungs_that_fail_and_die_are_rows_with_notes_and_the_others_are_measured(tmp_path):
    done, rows = _climb(tmp_path, "late", "raise", "die", "absent", "good")
    assert done and list(rows) == ["raise", "die", "absent", "good", "late"]
    assert rows["raise"].note == "failed: RuntimeError: out of memory"
    assert rows["die"].note == "failed: its process ended with exit code 5"
    assert rows["absent"].note == "needs a device"
    assert rows["good"].median == 200 and rows["late"].median == 200
    assert rows["good"].details["threads"] == 1


@pytest.mark.slow
def test_a_rung_that_hangs_is_stopped_and_a_later_command_goes_on(tmp_path):
    done, rows = _climb(tmp_path, "hang", "good", rung_limit=15.0)
    assert done and rows["hang"].note == "failed: stopped after 15 s" and rows["good"].median == 200
    began = time.monotonic()
    done, rows = _climb(tmp_path, "hang", "good", "more", limit=0.01)
    assert not done and time.monotonic() - began < 5
    assert "goes on" in rows["more"].note and rows["more"].details == {UNFINISHED: True}
    done, rows = _climb(tmp_path, "hang", "good", "more")
    assert done and rows["more"].median == 200 and "stopped" in rows["hang"].note


def test_when_time_is_up_the_rung_under_way_is_unfinished_not_failed(tmp_path):
    done, rows = _climb(tmp_path, "hang", limit=0.5, rung_limit=30.0)
    assert not done and UNFINISHED in rows["hang"].details and "failed" not in rows["hang"].note


def test_a_fault_of_the_gpu_ends_the_process_behind_its_row(monkeypatch):
    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    class Connection(list):
        send = list.append

    monkeypatch.setattr(measure, "synchronise", lost)
    sent = Connection()
    # what it switches off in a process of its own is switched on again in this one
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    ladder._work(Toy("raise", "good"), list(Toy("raise", "good").rungs), sent)
    assert [(row.rung, broken) for row, broken in sent] == [("raise", True)]


def test_rates_and_times_have_their_percentiles_the_right_way_round():
    rate = attempt(Toy("good"), Rung("good", "fp32"))
    assert rate.p20 < rate.median == 200 < rate.p80 and rate.p80 < 400
    assert rate.details["mfu"] == pytest.approx(10**9 / 0.02 / 1e12)
    assert rate.details["floor_ms"] == pytest.approx(1.0) and rate.details["repetitions"] == 3
    late = attempt(Toy("good", unit="ms"), Rung("good", "fp32"))
    assert late.p20 < late.median == 20 < late.p80


def test_results_of_another_machine_or_commit_are_not_continued(tmp_path):
    Results(tmp_path / "x.json", HEADER).add(attempt(Toy("good"), Rung("good", "fp32")))
    assert len(open_results(tmp_path / "x.json", HEADER).rows) == 1
    with pytest.raises(ValueError, match="measured with commit 1, now it is 2; give another folder"):
        open_results(tmp_path / "x.json", HEADER | {"commit": "2"})


def test_a_rung_that_is_none_is_refused():
    assert [rung.name for rung in chosen(Toy("a", "b").rungs, ["b"])] == ["b"]
    with pytest.raises(ValueError, match="rung 'c': wanted one of 'a', 'b'"):
        chosen(Toy("a", "b").rungs, ["c"])


def test_rounds_go_on_until_the_time_is_up_but_for_the_least_and_the_most():
    times = iter(range(1000))
    cpu, calls = torch.device("cpu"), []
    # each reading of the clock is a second later: three per round
    found = measure.rounds(lambda: calls.append(0), cpu, 9.0, calls=2, clock=lambda: float(next(times)))
    assert len(found) == 4 and len(calls) == 8 and found[0] == 0.5
    assert len(measure.rounds(lambda: None, cpu, 0.0, least=5)) == 5
    assert len(measure.rounds(lambda: None, cpu, 1e9, most=7)) == 7


def test_percentiles_stay_within_the_values():
    assert measure.percentiles([2.0]) == (2.0, 2.0, 2.0)
    assert measure.percentiles([1.0, 2.0, 3.0]) == (pytest.approx(1.4), 2.0, pytest.approx(2.6))


def test_ceilings_are_those_of_a_product_and_a_copy():
    cpu = torch.device("cpu")
    assert 1e8 < measure.large_product(cpu) < 1e15 and 1e8 < measure.large_copy(cpu) < 1e13
    assert measure.start_afresh(cpu) is None and measure.peak_memory(cpu) is None
