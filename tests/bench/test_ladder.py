"""Variants that fail, die or hang cost their own row; what was measured is not measured again."""

import os
import time

import pytest
import torch

from bench import ladder, measure, results
from bench.ladder import Ladder, NotHere, Ready, Variant, attempt, chosen, climb, in_turns
from bench.measure import Ceilings
from bench.results import UNFINISHED, Results, read
from bench.roofline import Op, Work

HEADER = dict.fromkeys(results._SAME, "1")
CPU = torch.device("cpu")


class Toy(Ladder):
    """A ladder whose variants do what they are called."""

    job, shape, images, unit, seconds, device = "toy", "batch 4", 4, "images/s", 0.0, CPU
    work, ceilings, reference = Work(4, (Op("p", "products", (1,), 10**9, 10**6),)), Ceilings(1e12, 1e12), None

    def __init__(self, *names, unit="images/s"):
        self.variants = tuple(Variant(name, "fp32") for name in names)
        self.unit = unit

    def prepare(self, variant):
        if variant.name == "die":
            os._exit(5)
        if variant.name == "hang":
            time.sleep(60)
        if variant.name == "raise":
            raise RuntimeError("out of memory\nand more")
        if variant.name == "absent":
            raise NotHere("needs a device")
        return Ready(lambda: None, 0.5, details={"threads": torch.get_num_threads()})


def climbed(tmp_path, *names, seconds=60.0, each=30.0):
    done = climb(Toy(*names), Results.resume(tmp_path / "toy.json", HEADER), seconds=seconds, each=each)
    return done, {row.variant: row for row in read(tmp_path / "toy.json")[1]}


@pytest.mark.slow  # starts two processes
def test_variants_that_fail_and_die_are_rows_with_notes_and_the_others_are_measured(tmp_path):
    done, rows = climbed(tmp_path, "raise", "die", "absent", "good")
    assert done and list(rows) == ["raise", "die", "absent", "good"]
    notes = [rows[name].note for name in ("raise", "die", "absent")]
    assert notes == [
        "failed: RuntimeError: out of memory",
        "failed: exit code 5",
        "needs a device",
    ]
    assert rows["good"].median > 0 and rows["good"].details["threads"] == 1


@pytest.mark.slow
def test_a_variant_that_hangs_is_stopped_and_a_later_command_goes_on(tmp_path):
    done, rows = climbed(tmp_path, "hang", "good", each=3.0)
    assert done and rows["hang"].note == "failed: no answer in 3 s" and rows["good"].median > 0
    began = time.monotonic()
    done, rows = climbed(tmp_path, "hang", "good", "more", seconds=0.01)
    assert not done and time.monotonic() - began < 5
    assert "goes on" in rows["more"].note and rows["more"].details == {UNFINISHED: True}
    done, rows = climbed(tmp_path, "hang", "good", "more")
    assert done and rows["more"].median > 0 and "no answer" in rows["hang"].note


def test_when_time_is_up_the_variant_under_way_is_unfinished_not_failed(tmp_path):
    done, rows = climbed(tmp_path, "hang", seconds=0.5)
    assert not done and UNFINISHED in rows["hang"].details and "failed" not in rows["hang"].note


def test_a_fault_of_the_gpu_ends_the_process_behind_its_row(monkeypatch):
    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(measure, "start_afresh", lambda device: None)
    monkeypatch.setattr(measure, "synchronise", lost)
    # what it switches off in a process of its own is switched on again in this one
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    toy = Toy("raise")
    row, broken = ladder.Measuring(toy)(*toy.variants)
    assert row.variant == "raise" and broken


def test_rates_and_times_have_their_percentiles_the_right_way_round(monkeypatch):
    monkeypatch.setattr(measure, "rounds", lambda *_, **__: [0.01, 0.02, 0.04])
    rate = attempt(Toy(), Variant("good", "fp32"))
    assert rate.p20 < rate.median == 200 < rate.p80 < 400
    assert rate.details["mfu"] == pytest.approx(10**9 / 0.02 / 1e12)
    assert rate.details["floor"] == pytest.approx(1e-3 / 0.02) and rate.details["repetitions"] == 3
    late = attempt(Toy(unit="ms"), Variant("good", "fp32"))
    assert late.p20 < late.median == 20 < late.p80


def test_a_variant_that_is_none_is_refused():
    assert [variant.name for variant in chosen(Toy("a", "b").variants, ["b"])] == ["b"]
    with pytest.raises(ValueError, match="variant 'c': wanted one of 'a', 'b'"):
        chosen(Toy("a", "b").variants, ["c"])


class Turns(Toy):
    """The plain code takes twice as long, on a machine that gets slower all the time."""

    def __init__(self, now, error=1e-6):
        self.order, self.now, self.error = [], now, error

    def prepare(self, variant):
        def call():
            self.order.append(variant.name[0])
            self.now[0] += (0.004 if variant.name == "plain" else 0.002) * (1 + len(self.order) / 10)

        return Ready(call, self.error)


def test_ratios_are_those_of_turns_that_lie_beside_each_other(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ladder.time, "perf_counter", lambda: now[0])
    job = Turns(now)
    plain, ours = in_turns(job)
    assert "".join(job.order) == "poop" * 2 + "po"
    ratio = ours.details["ratio"]
    assert ratio["p20"] < ratio["median"] < ratio["p80"] and ratio["median"] == pytest.approx(2, rel=0.1)
    assert plain.unit == "ms" and plain.median > ours.median > 2 and ours.error == 1e-6 and plain.error is None


@pytest.mark.parametrize("error", [2e-3, float("nan")])
def test_what_differs_is_not_timed_in_turns(error):
    job = Turns([0.0], error)
    assert all("not timed: outputs differ" in row.note for row in in_turns(job)) and not job.order


def test_rounds_go_on_until_the_time_is_up_but_for_the_least_and_the_most():
    times, calls = iter(range(1000)), []
    # each reading of the clock is a second later: three per round
    found = measure.rounds(lambda: calls.append(0), CPU, 9.0, calls=2, clock=lambda: float(next(times)))
    assert len(found) == 4 and len(calls) == 8 and found[0] == 0.5
    assert len(measure.rounds(lambda: None, CPU, 0.0, least=5)) == 5
    assert len(measure.rounds(lambda: None, CPU, 1e9, most=7)) == 7


def test_percentiles_stay_within_the_values_and_ceilings_are_plausible():
    assert measure.percentiles([2.0]) == (2.0, 2.0, 2.0)
    assert measure.percentiles([1.0, 2.0, 3.0]) == (pytest.approx(1.4), 2.0, pytest.approx(2.6))
    assert 1e8 < measure.large_product(CPU) < 1e15 and 1e8 < measure.large_copy(CPU) < 1e13
    assert measure.start_afresh(CPU) is None


def test_kernels_that_overlap_count_once():
    spans = [("nvjet", 0.0, 1000.0), ("Memcpy HtoD", 500.0, 1500.0), ("nvjet", 1600.0, 1700.0), ("x", 550.0, 600.0)]
    assert measure.alone(spans) == {"nvjet": 1100.0, "Memcpy HtoD": 500.0, "x": 0.0}


def test_the_longest_kernels_of_a_call_are_named():
    a = torch.randn(256, 256)
    found = measure.longest_kernels(lambda: [a @ a for _ in range(20)], CPU, typical=100.0)
    name, milliseconds = found["kernels"][0]
    assert name == "aten::mm" and 0 < milliseconds < 1e5 and 0 <= found["idle"] <= found["milliseconds"] == 1e5
