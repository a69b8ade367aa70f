"""Tuning: who wins, what becomes of candidates that are wrong, crash or hang, and a real plan made here."""

import contextlib
import pickle
from dataclasses import replace

import pytest
import torch

from epg_fast import training
from epg_fast.__main__ import main
from epg_fast.child import Failed
from epg_fast.config import ConsistencyConfig, DiffusionConfig, PretrainConfig, TunedSampleConfig
from epg_fast.flags import parse
from epg_fast.models import fused
from epg_fast.plans import SITES, Case, Variant, choose, read_plan, stored_plans
from epg_fast.tuning import candidates, command
from epg_fast.tuning.answers import Journal
from epg_fast.tuning.job import job_of
from epg_fast.tuning.tuner import Tuner, compared, table
from epg_fast.tuning.worker import Worker
from epg_fast.tuning.workloads import errors, worst

JOBS = {
    "sample": (TunedSampleConfig, None),
    "pretrain": (PretrainConfig, training.PretrainStage),
    "finetune-diffusion": (DiffusionConfig, training.DiffusionStage),
    "finetune-consistency": (ConsistencyConfig, training.ConsistencyStage),
}
TINY = ["--model.preset", "digits_32", "--model.embed_dim", "48", "--model.depth", "2", "--model.decoder_depth", "2"]
TINY += ["--model.num_heads", "2", "--model.decoder_embed_dim", "48", "--model.decoder_num_heads", "2"]
TINY += ["--device", "cpu"]


class FakeBench:
    """Seconds by what is in a variant; `fails`: {part of a variant's text: kind}. An answer takes `takes` seconds."""

    def __init__(self, gains, fails=(), noise=0.0, takes=0.0):
        self.gains, self.fails, self.noise, self.takes = gains, dict(fails), noise, takes
        self.asked, self.now = [], 0.0

    def __call__(self, kind, unit, variants):
        texts = [str(variant) for variant in variants]
        self.asked.append((kind, unit, texts))
        self.now += self.takes
        return self.times(unit, texts) if kind == "times" else self.check(unit, texts[0])

    def check(self, unit, text):
        for part, kind in self.fails.items():
            if part in text:
                raise Failed(kind, f"{part} is {kind}")

    def times(self, unit, texts):
        found = []
        for k, text in enumerate(texts):
            own = 1.0
            for part, gain in self.gains.items():
                own /= gain if part in text else 1.0
            found.append([own * (1 + self.noise * ((-1) ** i) * k) for i in range(9)])
        return found


@pytest.fixture
def make_tuner(tmp_path):
    """A tuner of a bench and sites; two of one test share no answers, unless they share the `journal`."""
    number = iter(range(9))

    def make(bench, sites, runs=(), seconds=600, plain=None, journal=None):
        listed = [(*site, None) if len(site) == 2 else site for site in sites]
        journal = Journal(bench, journal or tmp_path / f"{next(number)}.part", "options")
        return Tuner(journal, listed, plain or Variant(compile="blocks"), list(runs), seconds, clock=lambda: bench.now)

    return make


def outcomes(tuner):
    return {row.what: row.outcome for row in tuner.rows}


def test_sites_are_won_one_by_one_and_the_whole_with_them(make_tuner):
    bench = FakeBench({"decoder.mlp=triton": 1.2, "decoder.attention=cudnn": 1.1, "decoder.attention=triton": 1.05})
    sites = [("decoder.mlp", "triton"), ("decoder.attention", "triton"), ("decoder.attention", "cudnn")]
    tuner = make_tuner(bench, sites)
    assert tuner.best() == Variant({"decoder.mlp": "triton", "decoder.attention": "cudnn"}, "blocks")
    # cudnn was timed against what had won before it, not against plain code
    assert bench.asked[5][2][0].startswith("decoder.mlp=triton, decoder.attention=triton")
    assert tuner.speedup == pytest.approx(1.32, abs=0.01)


@pytest.mark.parametrize("kind", ["wrong", "crashed", "hung"])
def test_a_candidate_that_fails_is_named_and_the_rest_goes_on(kind, make_tuner):
    bench = FakeBench({"mlp=triton": 2.0, "attention=cudnn": 1.2}, fails={"mlp=triton": kind})
    tuner = make_tuner(bench, [("encoder.mlp", "triton"), ("encoder.attention", "cudnn")])
    assert tuner.best().ops == {"encoder.attention": "cudnn"}
    assert outcomes(tuner)["encoder.mlp=triton"] == kind
    assert any(f"mlp=triton is {kind}" in line for line in table(tuner.rows))


@pytest.mark.parametrize(
    ("gain", "noise", "wins"),
    [(1.019, 0.0, False), (1.03, 0.0, True), (1.03, 0.1, False), (1.3, 0.1, True), (0.5, 0.0, False)],
    ids=["less than 2%", "3%", "3% within the spread", "30% beyond it", "slower"],
)
def test_a_gain_counts_only_beyond_two_percent_and_beyond_its_spread(gain, noise, wins, make_tuner):
    tuner = make_tuner(FakeBench({"mlp=triton": gain}, noise=noise), [("encoder.mlp", "triton")])
    assert (tuner.best().ops != {}) == wins
    assert tuner.rows[0].outcome == ("won" if wins else "lost")


def test_sites_that_win_but_do_not_help_the_whole_give_the_plain_plan(make_tuner):
    class EndToEnd(FakeBench):
        def times(self, unit, texts):
            return [[1.0] * 9 for _ in texts] if unit == "whole" else super().times(unit, texts)

    tuner = make_tuner(EndToEnd({"mlp=triton": 1.035}), [("encoder.mlp", "triton")], [Variant(compile="network")])
    assert tuner.best() == tuner.plain and tuner.speedup == 1.0
    assert tuner.rows[0].outcome == "won"


def test_ways_to_run_the_whole_are_tried_with_and_without_what_the_sites_have_won(make_tuner):
    # fused operations win in blocks, and lose against plain code as one graph
    bench = FakeBench({"mlp=triton; compile blocks": 1.1, "plain; compile network": 1.5})
    tuner = make_tuner(bench, [("encoder.mlp", "triton")], [Variant(compile="network")])
    assert tuner.best() == Variant(compile="network")


def test_what_runs_without_a_plan_is_what_everything_is_measured_against(make_tuner):
    plain = Variant({"optimizer": "fused"})
    tuner = make_tuner(FakeBench({}), [("optimizer", "plain")], [replace(plain, compile="network")], plain=plain)
    assert tuner.best() == plain  # nothing is faster: the plan is what runs without one, the optimiser too
    faster = FakeBench({"optimizer=plain": 1.5})
    assert make_tuner(faster, [("optimizer", "plain")], plain=plain).best().ops == {"optimizer": "plain"}


def test_what_the_time_does_not_allow_is_said_and_the_whole_is_still_measured(make_tuner):
    sites = [("encoder.mlp", "triton"), ("encoder.attention", "cudnn"), ("encoder.proj", "triton")]
    tuner = make_tuner(FakeBench({"mlp=triton": 1.5}, takes=30.0), sites, [Variant(compile="network")], seconds=100)
    assert tuner.best().ops == {"encoder.mlp": "triton"}
    found = outcomes(tuner)
    assert found["encoder.attention=cudnn"] == found["encoder.proj=triton"] == "not tried"
    assert [row.outcome for row in tuner.rows if row.unit == "whole"][0] == "won"


def test_an_interrupted_tuning_asks_for_nothing_again(make_tuner, tmp_path, log):
    class Interrupted(FakeBench):
        def __call__(self, *question):
            if len(self.asked) == 4:
                raise KeyboardInterrupt
            return super().__call__(*question)

    gains, fails = {"mlp=triton": 1.5, "attention=flash": 1.2}, {"proj=triton": "hung"}
    sites = [("encoder.mlp", "triton"), ("encoder.proj", "triton"), ("encoder.attention", "flash")]
    first, again = Interrupted(gains, fails), FakeBench(gains, fails)
    with contextlib.suppress(KeyboardInterrupt):
        make_tuner(first, sites, journal=tmp_path / "kept").best()
    tuner = make_tuner(again, sites, journal=tmp_path / "kept")
    assert tuner.best().ops == {"encoder.mlp": "triton", "encoder.attention": "flash"}
    assert not set(map(str, first.asked)) & set(map(str, again.asked)) and len(first.asked) == 4
    assert outcomes(tuner)["encoder.proj=triton"] == "hung"
    assert log.messages == ["going on with 4 measurements of before"]
    assert not Journal(again, tmp_path / "kept", "other options").knows("check", "encoder", [Variant()])


def test_a_clock_that_wanders_is_reported(make_tuner):
    class Warming(FakeBench):
        def times(self, unit, texts):
            return [[t * (1.2 if len(texts) == 1 else 1) for t in own] for own in super().times(unit, texts)]

    tuner = make_tuner(Warming({"mlp=triton": 1.5}), [("encoder.mlp", "triton")])
    tuner.best()
    assert tuner.notes == ["clocks wandered: plain code took +20.0% of its first time at the end"]


def test_ratios_are_of_pairs_so_that_a_busy_moment_spoils_one():
    base, candidate = [1.0, 1.0, 9.0, 1.0, 1.0], [0.5, 0.5, 4.5, 5.0, 0.5]
    assert compared(base, candidate)[0] == 2.0


def test_results_are_judged_by_how_far_plain_code_is_off():
    generator = torch.Generator().manual_seed(0)
    exact = {name: torch.randn(4, 5, generator=generator) for name in ("loss", "a.weight", "b.weight")}
    plain = {name: value * 1.01 for name, value in exact.items()}
    fine = {"loss": exact["loss"] * 1.015, "a.weight": exact["a.weight"] * 0.98, "b.weight": exact["b.weight"]}
    assert worst(errors(fine, plain, exact), 1e-3) is None
    for name, factor in (("loss", 1.05), ("b.weight", 0), ("a.weight", float("nan"))):
        assert worst(errors(fine | {name: exact[name] * factor}, plain, exact), 1e-3)[0] == name


def tiny_job(name):
    """A job of a small network on this processor."""
    config_class, stage = JOBS[name]
    (config,) = parse([config_class], [*TINY, "--batch_size", "4", "--precision", "fp32"], name)
    return job_of(config, stage, 1, getattr(config, "model", None))


def tiny_worker(name):
    return Worker(tiny_job(name), 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_every_unit_of_every_job_can_be_checked_and_timed(name):
    worker = Worker(pickle.loads(pickle.dumps(tiny_job(name))), 0.1)
    for unit in ("encoder", "decoder", "ends", "whole", "optimizer"):
        if (unit, name) in (("decoder", "pretrain"), ("optimizer", "sample")):
            continue
        variant = Variant({"encoder.attention": "math"}, threads=1)
        assert worker.check(unit, [variant])  # raises for what is wrong
        base, own = worker.times(unit, [Variant(threads=1), variant])
        assert len(base) == len(own) >= 5 and min(base + own) > 0


@pytest.mark.slow
def test_kernels_are_checked_at_the_job_with_gradients():
    """Triton's kernels in its interpreter, as candidates."""
    pytest.importorskip("triton")
    assert tiny_worker("finetune-diffusion").check("decoder", [Variant({"decoder.mlp": "triton"})])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample", "finetune-diffusion"])
def test_a_wrong_kernel_is_found(name, monkeypatch):
    def wrong(*inputs):
        *tensors, backend, operands = inputs
        return mlp_residual(*tensors, "plain", operands) * (1.001 if backend == "triton" else 1)

    mlp_residual = fused.mlp_residual
    monkeypatch.setattr(fused, "mlp_residual", wrong)
    answer = tiny_worker(name)("check", "encoder", [Variant({"encoder.mlp": "triton"})])
    assert answer["failed"] == "wrong" and "is allowed" in answer["why"]


@pytest.mark.slow
def test_a_candidate_that_raises_is_out_and_the_worker_goes_on(monkeypatch):
    def raises(*_):
        raise RuntimeError("out of shared\nmemory")

    monkeypatch.setattr(fused, "mlp_residual", raises)
    worker = tiny_worker("sample")
    answer = worker("check", "encoder", [Variant({"encoder.mlp": "triton"})])
    assert answer == {"failed": "crashed", "why": "RuntimeError: out of shared memory"}
    assert "answer" in worker("check", "encoder", [Variant()])


@pytest.mark.slow
def test_where_memory_holds_one_network_they_are_timed_apart(monkeypatch):
    worker, new, math = tiny_worker("sample"), Worker._new, Variant({"encoder.attention": "math"})

    def one_at_a_time(self, *what):
        if self._made:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return new(self, *what)

    monkeypatch.setattr(Worker, "_new", one_at_a_time)
    base, other = worker.times("encoder", [Variant(), math])
    assert len(base) == len(other) >= 10
    assert worker.check("encoder", [math])  # beside the network that was timed last


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("site", "backend", "device", "why"),
    [
        ("encoder.mlp", "triton", CPU, "needs a CUDA device"),
        ("encoder.attention", "flash", CPU, None),
        ("encoder.attention", "cudnn", CUDA, None),
        ("encoder.attention", "flash_attn_3", CUDA, "flash_attn_interface is not installed"),
        ("decoder.norm", "prologue", CUDA, None),
    ],
)
def test_candidates_say_why_they_cannot_run_here(site, backend, device, why):
    assert candidates.obstacle(site, backend, Case("sample", {}, "bf16", 1), device) == why


def test_norms_within_products_are_no_candidate_where_gradients_are_needed():
    case = Case("finetune-diffusion", {}, "bf16", 1)
    assert candidates.obstacle("decoder.norm", "prologue", case, CUDA) == "has no gradient"


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_asked_for_the_sites_that_it_has(name):
    asked = candidates.sites_of_job(Case(name, {}, "bf16", 1))
    assert set(asked) <= set(SITES) and len(set(asked)) == len(asked)
    assert ("decoder.mlp" in asked) == (name != "pretrain")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EPG_FAST_PLANS", str(tmp_path / "plans"))
    return tmp_path / "plans"


@pytest.mark.slow
def test_a_plan_is_made_here_and_taken(folder, tmp_path, capsys):
    """With a compile of every block and of the network, which a small network gains much by."""
    flags = [*TINY, "--batch_size", "2", "--guidance", "2", "--seconds", "0.1", "--minutes", "0.3"]
    assert main(["tune", "--job", "sample", *flags, "--output", str(tmp_path / "mine.json")]) == 0
    text = capsys.readouterr().out
    assert "decoder.attention=flash" in text and "not here, needs a CUDA device: decoder.mlp=triton" in text
    ((where, plan),) = stored_plans()
    assert where.startswith(str(folder)) and read_plan(tmp_path / "mine.json") == plan
    assert plan.case.batch == 4 and plan.evidence["rows"]
    assert not list(folder.glob("*.part")) and not list(folder.glob("*.lock"))
    assert choose("auto", plan.case, CPU).plan == plan.name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["tune", "--job", "train"], "job"),
        (["tune", "--minutes", "0"], "minutes is 0"),
        (["tune", "--job", "finetune-diffusion", "--gpus", "3", "--batch_size", "16"], "does not divide over 3 ranks"),
        (["tune", "--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        (["tune", "--confg", "digits"], "confg"),
        (["tune", "--output", "."], "want a file"),
        (["sample", "--ops", "tune"], "--checkpoint and --outdir are needed"),
        (["finetune-diffusion", "--config", "digits_diffusion", "--ops", "tune"], "outdir is missing"),
    ],
)
def test_what_cannot_be_tuned_is_one_line_before_anything_is_measured(flags, message, folder, capsys):
    assert main(flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("epg-fast: error:") and message in error and not list(folder.glob("*"))


def test_a_folder_that_takes_no_plans_is_one_line_with_what_to_do(monkeypatch, capsys):
    monkeypatch.setenv("EPG_FAST_PLANS", "/proc/self")  # there, and not even root can write to it
    assert main(["tune", "--job", "sample", *TINY]) == 2
    assert "set EPG_FAST_PLANS to a folder" in capsys.readouterr().err


def test_when_the_whole_job_fails_it_is_tried_anew_and_nothing_is_locked(folder, monkeypatch, capsys):
    class FailingBench(FakeBench, contextlib.nullcontext):
        def ask(self, kind, unit="", variants=()):
            return [] if kind == "memory" else self(kind, unit, variants)

        def check(self, unit, text):
            if unit == "whole":
                raise Failed("crashed", "out of memory")

        def __enter__(self):
            return self

    monkeypatch.setattr(command, "Bench", lambda *_: FailingBench({}))
    assert main(["tune", "--job", "sample", *TINY]) == 1
    assert "out of memory" in capsys.readouterr().err
    (part,) = folder.iterdir()  # no lock
    assert part.suffix == ".part" and b"out of memory" not in part.read_bytes()
