"""Tuning: who wins, what becomes of candidates that are wrong, crash or hang, and a real plan made here."""

import contextlib
import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch

from epg_fast.__main__ import main
from epg_fast.plans import SITES, choose, read_plan, stored_plans
from epg_fast.tuning import candidates, command, worker
from epg_fast.tuning.candidates import Variant
from epg_fast.tuning.client import Client
from epg_fast.tuning.tuner import Failed, Tuner, compared, table
from epg_fast.tuning.worker import Job, Worker
from epg_fast.tuning.workloads import errors, worst


class FakeBench:
    """Milliseconds by what is in a variant; `fails`: {part of a variant's text: kind}."""

    def __init__(self, gains, fails=(), noise=0.0, seconds=0.0, clock=None):
        self.gains, self.fails, self.noise, self.asked = gains, dict(fails), noise, []
        self.seconds, self.clock = seconds, clock

    def _pass_time(self):
        if self.clock is not None:
            self.clock.now += self.seconds

    def check(self, unit, variant, seconds):
        self.asked.append(("check", unit, str(variant)))
        self._pass_time()
        for part, kind in self.fails.items():
            if part in str(variant):
                raise Failed(kind, f"{part} is {kind}")
        return {}

    def times(self, unit, variants, seconds):
        self.asked.append(("times", unit, [str(variant) for variant in variants]))
        self._pass_time()
        found = []
        for k, variant in enumerate(variants):
            own = 1.0
            for part, gain in self.gains.items():
                own /= gain if part in str(variant) else 1.0
            found.append([own * (1 + self.noise * ((-1) ** i) * k) for i in range(9)])
        return found


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def make_tuner(bench, sites, runs=(), seconds=600, plain=None, **changes):
    listed = [(*site, None) if len(site) == 2 else site for site in sites]
    return Tuner(bench, listed, plain or Variant(compile="blocks"), list(runs), seconds, **changes)


def outcomes(tuner):
    return {row.what: row.outcome for row in tuner.rows}


def test_sites_are_won_one_by_one_and_the_whole_with_them():
    bench = FakeBench({"decoder.mlp=triton": 1.2, "decoder.attention=cudnn": 1.1, "decoder.attention=triton": 1.05})
    sites = [("decoder.mlp", "triton"), ("decoder.attention", "triton"), ("decoder.attention", "cudnn")]
    tuner = make_tuner(bench, sites)
    assert tuner.best() == Variant({"decoder.mlp": "triton", "decoder.attention": "cudnn"}, "blocks")
    # cudnn was timed against what had won before it, not against plain code
    assert bench.asked[5][2][0].startswith("decoder.mlp=triton, decoder.attention=triton")
    assert tuner.speedup == pytest.approx(1.32, abs=0.01)


@pytest.mark.parametrize("kind", ["wrong", "crashed", "hung"])
def test_a_candidate_that_fails_is_named_and_the_rest_goes_on(kind):
    bench = FakeBench({"mlp=triton": 2.0, "attention=cudnn": 1.2}, fails={"mlp=triton": kind})
    tuner = make_tuner(bench, [("encoder.mlp", "triton"), ("encoder.attention", "cudnn")])
    assert tuner.best().ops == {"encoder.attention": "cudnn"}
    assert outcomes(tuner)["encoder.mlp=triton"] == kind
    assert any("encoder.mlp=triton is" in line or f"mlp=triton is {kind}" in line for line in table(tuner.rows))


@pytest.mark.parametrize(
    ("gain", "noise", "wins"),
    [(1.019, 0.0, False), (1.03, 0.0, True), (1.03, 0.1, False), (1.3, 0.1, True), (0.5, 0.0, False)],
    ids=["less than 2%", "3%", "3% within the spread", "30% beyond it", "slower"],
)
def test_a_gain_counts_only_beyond_two_percent_and_beyond_its_spread(gain, noise, wins):
    tuner = make_tuner(FakeBench({"mlp=triton": gain}, noise=noise), [("encoder.mlp", "triton")])
    assert (tuner.best().ops != {}) == wins
    assert tuner.rows[0].outcome == ("won" if wins else "lost")


def test_sites_that_win_but_do_not_help_the_whole_give_the_plain_plan():
    class EndToEnd(FakeBench):
        def times(self, unit, variants, seconds):
            found = super().times(unit, variants, seconds)
            return [[1.0] * 9 for _ in found] if unit == "whole" else found

    tuner = make_tuner(EndToEnd({"mlp=triton": 1.035}), [("encoder.mlp", "triton")], [Variant(compile="network")])
    assert tuner.best() == tuner.plain and tuner.speedup == 1.0
    assert tuner.rows[0].outcome == "won"


def test_ways_to_run_the_whole_are_tried_with_and_without_what_the_sites_have_won():
    # fused operations win in blocks, and lose against plain code as one graph
    bench = FakeBench({"mlp=triton; compile blocks": 1.1, "plain; compile network": 1.5})
    tuner = make_tuner(bench, [("encoder.mlp", "triton")], [Variant(compile="network")])
    assert tuner.best() == Variant(compile="network")


def test_what_runs_without_a_plan_is_what_everything_is_measured_against():
    plain = Variant({"optimizer": "fused"})
    tuner = make_tuner(FakeBench({}), [("optimizer", "plain")], [replace(plain, compile="network")], plain=plain)
    assert tuner.best() == plain  # nothing is faster: the plan is what runs without one, the optimiser too
    faster = FakeBench({"optimizer=plain": 1.5})
    assert make_tuner(faster, [("optimizer", "plain")], plain=plain).best().ops == {"optimizer": "plain"}


def test_what_the_time_does_not_allow_is_said_and_the_whole_is_still_measured():
    clock = Clock()
    bench = FakeBench({"mlp=triton": 1.5}, seconds=30.0, clock=clock)
    sites = [("encoder.mlp", "triton"), ("encoder.attention", "cudnn"), ("encoder.proj", "triton")]
    tuner = make_tuner(bench, sites, [Variant(compile="network")], seconds=100, clock=clock)
    assert tuner.best().ops == {"encoder.mlp": "triton"}
    found = outcomes(tuner)
    assert found["encoder.attention=cudnn"] == found["encoder.proj=triton"] == "not tried"
    assert [row.outcome for row in tuner.rows if row.unit == "whole"][0] == "won"


def test_an_interrupted_tuning_asks_for_nothing_again():
    kept = {}
    bench = FakeBench({"mlp=triton": 1.5, "attention=flash": 1.2}, fails={"proj=triton": "hung"})
    sites = [("encoder.mlp", "triton"), ("encoder.proj", "triton"), ("encoder.attention", "flash")]

    class Interrupted(Exception):
        pass

    def keep(measured):
        kept.update(json.loads(json.dumps(measured)))
        if len(kept) == 4:
            raise Interrupted

    with contextlib.suppress(Interrupted):
        make_tuner(bench, sites, keep=keep).best()
    before = list(bench.asked)
    again = make_tuner(bench, sites, measured=dict(kept))
    assert again.best().ops == {"encoder.mlp": "triton", "encoder.attention": "flash"}
    assert not set(map(str, before)) & set(map(str, bench.asked[len(before) :]))
    assert outcomes(again)["encoder.proj=triton"] == "hung"


def test_a_clock_that_wanders_is_reported():
    class Warming(FakeBench):
        def times(self, unit, variants, seconds):
            found = super().times(unit, variants, seconds)
            return [[1.2 * t for t in times] for times in found] if len(variants) == 1 else found

    tuner = make_tuner(Warming({"mlp=triton": 1.5}), [("encoder.mlp", "triton")])
    tuner.best()
    assert tuner.notes == ["clocks wandered: plain code took +20.0% of its first time at the end"]


def test_ratios_are_of_pairs_so_that_a_busy_moment_spoils_one():
    base, candidate = [1.0, 1.0, 9.0, 1.0, 1.0], [0.5, 0.5, 4.5, 5.0, 0.5]
    assert compared(base, candidate)[0] == 2.0


WORKER = """
    import json, os, sys, time
    sys.stdin.readline()
    for line in sys.stdin:
        request = json.loads(line)
        text = json.dumps(request["variants"])
        if "triton" in text:
            sys.stderr.write("CUDA error: an illegal memory access\\n"); sys.stderr.flush()
            os.kill(os.getpid(), 11)
        if "cudnn" in text:
            time.sleep(600)
        print(json.dumps({"answer": [[1.0]] * len(request["variants"])}), flush=True)
"""


def test_a_worker_that_crashes_or_hangs_is_replaced():
    job = Job(None, None, {}, 1, 1.0)
    with Client(job, [sys.executable, "-c", textwrap.dedent(WORKER)]) as client:
        assert client.times("whole", [Variant()], 60) == [[1.0]]
        with pytest.raises(Failed, match="signal 11: CUDA error: an illegal memory access") as crash:
            client.check("encoder", Variant({"encoder.mlp": "triton"}), 60)
        assert crash.value.kind == "crashed"
        assert client.times("whole", [Variant()], 60) == [[1.0]]
        began = time.monotonic()
        with pytest.raises(Failed, match="no answer in 1 s") as hang:
            client.check("encoder", Variant({"encoder.attention": "cudnn"}), 1)
        assert hang.value.kind == "hung" and time.monotonic() - began < 30
        assert client.times("whole", [Variant()], 60) == [[1.0]]


def test_results_are_judged_by_how_far_plain_code_is_off():
    generator = torch.Generator().manual_seed(0)
    exact = {name: torch.randn(4, 5, generator=generator) for name in ("loss", "a.weight", "b.weight")}
    plain = {name: value * 1.01 for name, value in exact.items()}
    fine = {"loss": exact["loss"] * 1.015, "a.weight": exact["a.weight"] * 0.98, "b.weight": exact["b.weight"]}
    assert worst(errors(fine, plain, exact), 1e-3) is None
    assert worst(errors(fine | {"loss": exact["loss"] * 1.05}, plain, exact), 1e-3)[0] == "loss"
    assert worst(errors(fine | {"b.weight": exact["b.weight"] * 0}, plain, exact), 1e-3)[0] == "b.weight"
    assert worst(errors(fine | {"a.weight": exact["a.weight"] * float("nan")}, plain, exact), 1e-3)[0] == "a.weight"


TINY = ["--model.preset", "digits_32", "--model.embed_dim", "48", "--model.depth", "2", "--model.decoder_depth", "2"]
TINY += [
    "--model.num_heads",
    "2",
    "--model.decoder_embed_dim",
    "48",
    "--model.decoder_num_heads",
    "2",
    "--device",
    "cpu",
]


def tiny_job(kind, monkeypatch=None):
    """(Job of a small network on this processor)."""
    from epg_fast import training
    from epg_fast.config import ConsistencyConfig, DiffusionConfig, PretrainConfig, TunedSampleConfig
    from epg_fast.flags import parse
    from epg_fast.models import preset_config

    if kind == "sample":
        (config,) = parse([TunedSampleConfig], [*TINY, "--guidance", "2"], "sample")
        overrides = {"embed_dim": 48, "depth": 2, "decoder_depth": 2, "num_heads": 2}
        overrides |= {"decoder_embed_dim": 48, "decoder_num_heads": 2}
        return Job(config, None, preset_config("digits_32", **overrides), 4, 0.1)
    classes = {
        "pretrain": PretrainConfig,
        "finetune-diffusion": DiffusionConfig,
        "finetune-consistency": ConsistencyConfig,
    }
    stages = {"pretrain": "Pretrain", "finetune-diffusion": "Diffusion", "finetune-consistency": "Consistency"}
    (config,) = parse([classes[kind]], [*TINY, "--precision", "fp32"], kind)
    return Job(config, getattr(training, f"{stages[kind]}Stage"), {}, 4, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sample", "pretrain", "finetune-diffusion", "finetune-consistency"])
def test_every_unit_of_every_job_can_be_checked_and_timed(kind):
    found = Worker(Job.of_line(tiny_job(kind).line()))
    for unit in ("encoder", "decoder", "ends", "whole", "optimizer"):
        if (unit, kind) in (("decoder", "pretrain"), ("optimizer", "sample")):
            continue
        variant = Variant({"encoder.attention": "math"}, threads=1)
        assert found.check(unit, variant)  # raises for what is wrong
        base, own = found.times(unit, [Variant(threads=1), variant])
        assert len(base) == len(own) >= 5 and min(base + own) > 0


@pytest.mark.slow
def test_kernels_are_checked_at_the_job_with_gradients():
    """Triton's kernels in its interpreter, as candidates; one of them is made to be wrong, another to raise."""
    pytest.importorskip("triton")
    found = Worker(tiny_job("finetune-diffusion"))
    assert found.check("decoder", Variant({"decoder.mlp": "triton"}))


@pytest.mark.slow
def test_a_wrong_kernel_is_found(monkeypatch):
    from epg_fast.models import fused

    def wrong(*inputs):
        *tensors, backend, operands = inputs
        return mlp_residual(*tensors, "plain", operands) * (1.001 if backend == "triton" else 1)

    mlp_residual = fused.mlp_residual
    monkeypatch.setattr(fused, "mlp_residual", wrong)
    request = {"kind": "check", "unit": "encoder", "variants": [{"ops": {"encoder.mlp": "triton"}}]}
    for kind in ("sample", "finetune-diffusion"):
        answer = worker._answer(Worker(tiny_job(kind)), request)
        assert answer["failed"] == "wrong" and "is allowed" in answer["why"]


def test_a_candidate_that_raises_is_out_and_the_worker_goes_on(monkeypatch):
    from epg_fast.models import fused

    def raises(*_):
        raise RuntimeError("out of shared\nmemory")

    monkeypatch.setattr(fused, "mlp_residual", raises)
    own = Worker(tiny_job("sample"))
    request = {"kind": "check", "unit": "encoder", "variants": [{"ops": {"encoder.mlp": "triton"}}]}
    assert worker._answer(own, request) == {"failed": "crashed", "why": "RuntimeError: out of shared memory"}
    assert "answer" in worker._answer(own, request | {"variants": [{}]})


def test_where_memory_holds_one_network_they_are_timed_apart(monkeypatch):
    own, make = Worker(tiny_job("sample")), Worker._make

    def one_at_a_time(self, unit, variant, batch):
        if (
            self._made
            and variant not in (held := [json.loads(key[2]) for key in self._made])
            and held != [json.loads(json.dumps(vars(variant)))]
        ):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(self, unit, variant, batch)

    monkeypatch.setattr(Worker, "_make", one_at_a_time)
    base, other = own.times("encoder", [Variant(), Variant({"encoder.attention": "math"})])
    assert len(base) == len(other) >= 10
    assert own.check("encoder", Variant({"encoder.attention": "math"}))  # beside the network that was timed last


def test_candidates_say_why_they_cannot_run_here():
    case = type("Case", (), {"job": "sample", "precision": "bf16"})
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert candidates.obstacle("encoder.mlp", "triton", case, cpu) == "needs a CUDA device"
    assert candidates.obstacle("encoder.attention", "flash", case, cpu) is None
    assert candidates.obstacle("encoder.attention", "cudnn", case, cuda) is None
    assert (
        candidates.obstacle("encoder.attention", "flash_attn_3", case, cuda) == "flash_attn_interface is not installed"
    )
    assert candidates.obstacle("optimizer", "apex", case, cuda) == "NVIDIA's apex is not installed"
    for job in ("sample", "pretrain", "finetune-diffusion", "finetune-consistency"):
        asked = candidates.sites_of_job(type("Case", (), {"job": job, "precision": "bf16"}))
        assert set(asked) <= set(SITES) and len(set(asked)) == len(asked)
        assert ("decoder.mlp" in asked) == (job != "pretrain")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EPG_FAST_PLANS", str(tmp_path / "plans"))
    return tmp_path / "plans"


@pytest.mark.slow
def test_a_plan_is_made_here_and_taken(folder, tmp_path, capsys):
    """With a compile of every block and of the network, which a small network gains much by."""
    command = ["tune", "--job", "sample", *TINY, "--batch_size", "2", "--guidance", "2"]
    command += ["--seconds", "0.1", "--minutes", "0.3"]
    assert main([*command, "--output", str(tmp_path / "mine.json")]) == 0
    text = capsys.readouterr().out
    assert "decoder.attention=flash" in text and "not here, needs a CUDA device: decoder.mlp=triton" in text
    ((where, plan),) = stored_plans()
    assert where.startswith(str(folder)) and read_plan(tmp_path / "mine.json") == plan
    assert plan.case.batch == 4 and plan.evidence["rows"]
    assert not list(folder.glob("*.part")) and not list(folder.glob("*.lock"))

    assert choose("auto", plan.case, torch.device("cpu")).plan == plan.name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--job", "train"], "job"),
        (["--minutes", "0"], "minutes is 0"),
        (["--job", "finetune-diffusion", "--gpus", "3", "--batch_size", "16"], "does not divide over 3 GPUs"),
        (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--confg", "digits"], "confg"),
        (["--output", "."], "want a file"),
    ],
)
def test_what_tune_does_not_understand_is_one_line(flags, message, folder, capsys):
    assert main(["tune", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("epg-fast: error:") and message in error


def test_a_job_that_lacks_what_it_needs_is_refused_before_anything_is_tuned(folder, capsys):
    assert main(["sample", "--ops", "tune"]) == 2
    assert "--checkpoint and --outdir are needed" in capsys.readouterr().err
    assert main(["finetune-diffusion", "--config", "digits_diffusion", "--ops", "tune"]) == 2
    assert "outdir is missing" in capsys.readouterr().err and not folder.exists()


def test_a_folder_that_takes_no_plans_is_one_line_with_what_to_do(folder, monkeypatch, capsys):
    monkeypatch.setenv("EPG_FAST_PLANS", "/proc/self")  # there, and not even root can write to it
    assert main(["tune", "--job", "sample", *TINY]) == 2
    assert "set EPG_FAST_PLANS to a folder" in capsys.readouterr().err


def test_when_the_whole_job_fails_it_is_tried_anew_and_nothing_is_locked(folder, monkeypatch, capsys):
    class Failing(FakeBench):
        memory = staticmethod(lambda seconds: [])
        __enter__, __exit__ = lambda self: self, lambda self, *exception: None

        def check(self, unit, variant, seconds):
            if unit == "whole":
                raise Failed("crashed", "out of memory")
            return {}

    monkeypatch.setattr(command, "Client", lambda job: Failing({}))
    assert main(["tune", "--job", "sample", *TINY]) == 1
    assert "out of memory" in capsys.readouterr().err
    (part,) = folder.iterdir()  # no lock
    assert part.suffix == ".part" and b"out of memory" not in part.read_bytes()


ABANDONED = """
    import sys, threading, time
    from epg_fast.tuning.worker import lines_while_asked
    for line in lines_while_asked(sys.stdin):
        print(line, end="", flush=True)
        time.sleep(600)
"""


def test_a_worker_in_the_midst_of_a_candidate_ends_with_whoever_asked():
    command = [sys.executable, "-c", textwrap.dedent(ABANDONED)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **pipes) as worker:
        worker.stdin.write(b"hang\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == b"hang\n"
        worker.stdin.close()  # as when the tuner is killed
        assert worker.wait(60) == -signal.SIGKILL
