"""Averages of any length after training: tracked, written, resumed, reconstructed."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from epg_fast.__main__ import main
from epg_fast.config import DataConfig, DiffusionConfig, ModelConfig, OptimizerConfig, PosthocEmaConfig
from epg_fast.data import ImageFolder, PillowLoader
from epg_fast.distributed import Ranks
from epg_fast.models import from_pretrained, load_weights, save_weights
from epg_fast.ops import extension_status
from epg_fast.training import DiffusionStage, loop
from epg_fast.training.loop import train_step
from epg_fast.training.posthoc_ema import PosthocEma, list_snapshots
from epg_fast.training.power_ema import gamma_of
from epg_fast.training.reconstruct import reconstruct
from epg_fast.training.state import RunState
from tests.training.runs import crash_after_save

WIDTHS = [0.05, 0.10]
needs_extension = pytest.mark.skipif(not extension_status()[0], reason="the extension is not built")


def direct_average(trajectory, sigma_rel):
    """Float64 power-function average of the weights after each update, [steps, ...]: every step by its share."""
    steps = len(trajectory)
    shares = np.diff((np.arange(steps + 1) / steps) ** (gamma_of(sigma_rel) + 1))
    return torch.tensordot(torch.from_numpy(shares), torch.stack([t.double() for t in trajectory]), 1)


# ---- while training


class _Silent:
    def add(self, *values):
        pass


def _flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


@pytest.mark.parametrize("backend", ["torch", pytest.param("fused", marks=needs_extension)])
def test_tracked_averages_are_those_of_the_whole_trajectory(backend, digits):
    """The deeper decoder has parameters without a gradient; the batch that is not finite changes nothing."""
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 48, "decoder_depth": 2}
    config = DiffusionConfig(
        outdir="unused",
        model=ModelConfig("digits_32", decoder_num_heads=2, **sizes),
        data=DataConfig(f"{digits}/train", normalization="simple"),
        optimizer=OptimizerConfig(lr=3e-2, warmup_steps=0, backend=backend),
        posthoc_ema=PosthocEmaConfig([0.05, 0.1, 0.2]),
        batch_size=8,
        precision="fp32",
    )
    ranks, folder = Ranks(0, 1, torch.device("cpu")), ImageFolder(config.data.path)
    state = RunState(config, DiffusionStage(config, ranks), folder, ranks)
    batches, trajectory = iter(PillowLoader(folder, image_size=32, batch_size=8, seed=0, workers=0)), []
    for i in range(24):
        batch = next(batches)
        if i == 9:
            before = [_flat(average) for average in state.posthoc_ema.averages]
            batch["x"] = torch.full(batch["x"].shape, float("nan"))
        train_step(state, batch, _Silent())
        if i == 9:
            assert all(torch.equal(a, _flat(b)) for a, b in zip(before, state.posthoc_ema.averages, strict=True))
        trajectory.append(_flat(state.stage.network))
    assert (trajectory[0] - trajectory[-1]).abs().max() > 0.1
    for sigma_rel, average in zip([0.05, 0.1, 0.2], state.posthoc_ema.averages, strict=True):
        trajectory[9] = direct_average(trajectory[:9], sigma_rel)  # the share of the skipped step is that of its past
        torch.testing.assert_close(_flat(average).double(), direct_average(trajectory, sigma_rel), rtol=1e-6, atol=1e-6)


def _content(snapshot):
    with safe_open(snapshot, framework="pt") as file:
        return load_file(snapshot), json.loads(file.metadata()["epg_fast"])


def test_kill_9_and_resume_gives_the_same_snapshots(diffusion, tmp_path):
    command = [*diffusion, "--steps", "33", "--posthoc_ema.every", "4", "--outdir"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*command, str(whole)]) == 0
    steps = [*range(4, 33, 4), 33]
    process = subprocess.Popen([sys.executable, "-m", "epg_fast", *command, str(killed)], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    metrics = killed / "metrics.jsonl"
    while time.time() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 17):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model.safetensors").exists() or load_weights(killed)[1]["step"] < 33
    # what a run that went on for longer, and one that was killed while it wrote, leave behind
    folder = killed / "posthoc_ema"
    for name in ("step_000000031.safetensors", ".step_000000012.safetensors.tmp7"):
        (folder / name).write_bytes(b"stale")
    assert main([*command, str(killed)]) == 0
    assert sorted(f.name for f in folder.iterdir()) == [f"step_{step:09d}.safetensors" for step in steps]
    for one, two in zip(list_snapshots(whole / "posthoc_ema"), list_snapshots(folder), strict=True):
        (a, about_a), (b, about_b) = _content(one), _content(two)
        assert about_a == about_b and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_snapshot_at_the_step_of_the_checkpoint_is_not_lost(diffusion, tmp_path, monkeypatch):
    crash_after_save(monkeypatch, 10)
    run = [*diffusion, "--steps", "12", "--posthoc_ema.every", "10", "--outdir", str(tmp_path / "run")]
    assert main(run) == 1
    (first,) = list_snapshots(tmp_path / "run" / "posthoc_ema")
    written = first.stat().st_mtime_ns
    monkeypatch.undo()
    assert main(run) == 0
    assert [f.name[5:14] for f in list_snapshots(first.parent)] == ["000000010", "000000012"]
    assert first.stat().st_mtime_ns == written


def test_training_goes_on_while_a_snapshot_is_written(diffusion, tmp_path, monkeypatch):
    """Its averages are those of its step all the same."""
    reached, saw, write, update = threading.Event(), [], PosthocEma.write, loop.train_step
    command = [*diffusion, "--steps", "7", "--posthoc_ema.every", "3", "--outdir"]
    assert main([*command, str(tmp_path / "whole")]) == 0

    def update_and_tell(state, *arguments):
        if state.iteration == 5:
            reached.set()
        return update(state, *arguments)

    def write_slowly(averages, step, snapshot):
        saw.append((step, reached.wait(60)))
        write(averages, step, snapshot)

    monkeypatch.setattr(loop, "train_step", update_and_tell)
    monkeypatch.setattr(PosthocEma, "write", write_slowly)
    assert main([*command, str(tmp_path / "slow")]) == 0
    assert saw == [(3, True), (6, True), (7, True)]
    for one, two in zip(*(list_snapshots(tmp_path / run / "posthoc_ema") for run in ("whole", "slow")), strict=True):
        (a, about_a), (b, about_b) = _content(one), _content(two)
        assert about_a == about_b and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("fails", [3, 4])
def test_no_checkpoint_passes_a_snapshot_that_could_not_be_written(fails, diffusion, tmp_path, monkeypatch, capsys):
    """Checkpoints are due at 2, 4 and 6: with the snapshot of 4, after that of 3."""
    write, run = PosthocEma.write, tmp_path / "run"

    def fail(averages, step, snapshot):
        if step == fails:
            raise OSError(f"could not write step {step}: disk full")
        write(averages, step, snapshot)

    command = [*diffusion, "--steps", "6", "--posthoc_ema.every", "1", "--checkpoint_every", "2", "--outdir", str(run)]
    with monkeypatch.context() as patched:
        patched.setattr(PosthocEma, "write", fail)
        assert main(command) == 1
    assert f"could not write step {fails}: disk full" in capsys.readouterr().err
    assert [f.name for f in (run / "checkpoints").iterdir()] == ["step_000000002"]
    assert main(command) == 0
    assert [f.name[5:14] for f in list_snapshots(run / "posthoc_ema")] == [f"{step:09d}" for step in range(1, 7)]


# ---- afterwards


class _Stage:
    """A stage of two small tensors, one of which float16 cannot hold, and a buffer."""

    def __init__(self):
        self.network = torch.nn.Module()
        self.network.weight = torch.nn.Parameter(torch.zeros(3, 40))
        self.network.huge = torch.nn.Parameter(torch.full((2,), 1e5))
        self.network.register_buffer("count", torch.tensor(0))
        self.ranks = Ranks(0, 1, torch.device("cpu"))

    def metadata(self):
        return {"stage": "synthetic", "config": {"depth": 1}}


STEPS = 600


def _synthetic_run(folder, every, widths=WIDTHS, stage=None):
    """A trajectory that drifts, bends and trembles, averaged and written as training does: [STEPS, 3, 40]."""
    stage = stage or _Stage()
    config = DiffusionConfig(str(folder), steps=STEPS, posthoc_ema=PosthocEmaConfig(list(widths), every))
    folder.mkdir()
    tracker, trajectory = PosthocEma(config, stage), []
    generator = torch.Generator().manual_seed(0)
    start, drift, tremble = (torch.randn(3, 40, generator=generator) for _ in range(3))
    for step in range(STEPS):
        progress = (step + 1) / STEPS
        noise = torch.randn(3, 40, generator=generator)
        weights = start + drift * progress**0.5 + 0.2 * tremble * np.sin(9 * progress) + 0.1 * noise
        trajectory.append(weights)
        with torch.no_grad():
            stage.network.weight.copy_(weights)
            stage.network.count.fill_(step + 1)
            for average, decay in zip(tracker.averages, tracker.decays(step), strict=True):
                average.weight.lerp_(weights, 1 - decay)
                average.huge.lerp_(stage.network.huge, 1 - decay)
        if tracker.is_due(step + 1):
            tracker.write(step + 1, tracker.snapshot())
    return trajectory


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """(run folder with 30 snapshots, trajectory)."""
    folder = tmp_path_factory.mktemp("synthetic") / "run"
    return folder, _synthetic_run(folder, every=20)


def _error(got, want):
    return (got.double() - want).square().mean().sqrt().item()


@pytest.mark.parametrize("step", [600, 300])
@pytest.mark.parametrize("sigma_rel", [0.04, 0.06, 0.075, 0.12, 0.15])
def test_other_widths_are_the_averages_of_the_whole_trajectory(synthetic, sigma_rel, step):
    """The weights, of size 1, move by 1; root mean square error at a snapshot: below 7e-4, float16's part included."""
    folder, trajectory = synthetic
    state, metadata = reconstruct(folder, sigma_rel, step)
    want = direct_average(trajectory[:step], sigma_rel)
    error = _error(state["weight"], want)
    print(f"sigma_rel {sigma_rel}, step {step}: error {error:.1e}, {metadata['posthoc_ema']}")
    assert metadata["step"] == step and metadata["sigma_rel"] == sigma_rel
    assert state["count"] == step
    torch.testing.assert_close(state["huge"], torch.full((2,), 1e5))
    # the residual says how far the profile can be off, times what moves and the norm of the profile in steps
    gamma = gamma_of(sigma_rel)
    norm = ((gamma + 1) ** 2 / (2 * gamma + 1) / step) ** 0.5
    moved = torch.stack(trajectory[:step]).double()
    moved = (moved - moved.mean(0)).square().sum(0).mean().sqrt().item()
    allowed = metadata["posthoc_ema"]["residual"] * norm * moved + 2 * metadata["posthoc_ema"]["rounding"]
    assert error < allowed
    tracked = load_file(list_snapshots(folder / "posthoc_ema")[step // 20 - 1])
    assert error < 7e-4 < min(_error(tracked[f"{width}/weight"], want) for width in WIDTHS) / 4


def test_a_tracked_width_at_a_snapshot_is_given_back(synthetic):
    folder, trajectory = synthetic
    for step in (20, 600):
        snapshot = load_file(folder / "posthoc_ema" / f"step_{step:09d}.safetensors")
        state, metadata = reconstruct(folder, 0.1, step)
        assert snapshot["0.1/weight"].dtype == torch.float16 and state["weight"].dtype == torch.float32
        assert torch.equal(state["weight"], snapshot["0.1/weight"].float())
        assert metadata["posthoc_ema"]["residual"] == 0
        assert _error(state["weight"], direct_average(trajectory[:step], 0.1)) < 4e-4
    assert snapshot["0.1/huge"].dtype == torch.float32


def test_what_does_not_change_is_reproduced_by_a_poor_fit(synthetic):
    state, metadata = reconstruct(synthetic[0], 0.03, 20, max_residual=1)
    assert metadata["posthoc_ema"]["residual"] > 0.1
    torch.testing.assert_close(state["huge"], torch.full((2,), 1e5))


@pytest.fixture
def diffusion(tiny_run):
    """Command of a short diffusion run that tracks averages (the last two words), without its folder."""
    start = ["finetune-diffusion", *tiny_run[:2], "--config", "digits_diffusion", *tiny_run[2:], "--preview.every", "0"]
    return [*start, "--posthoc_ema.sigma_rel", "[0.05,0.10]"]


def test_reconstructed_weights_are_used_like_any(diffusion, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "new" / "wide.safetensors"
    assert main([*diffusion, "--steps", "24", "--posthoc_ema.every", "2", "--outdir", str(run)]) == 0
    command = ["reconstruct-ema", "--run", str(run), "--sigma_rel", "0.08", "--output", str(out)]
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "sigma_rel 0.08 (gamma 9.452)" in said and "step 24 from 12 snapshots of sigma_rel 0.05, 0.1" in said
    assert main(command) == 2 and "nothing is overwritten" in capsys.readouterr().err
    model, own = from_pretrained(out), from_pretrained(run)
    assert model.metadata["parameterization"] == own.metadata["parameterization"] == "x0"
    assert model.state_dict().keys() == own.state_dict().keys()
    sample = ["sample", "--checkpoint", str(out), "--num", "2", "--steps", "2", "--outdir", str(tmp_path / "s")]
    assert main(sample) == 0
    export = ["export", "--checkpoint", str(out), "--format", "official", "--output", str(tmp_path / "official")]
    assert main(export) == 0


def test_a_reconstructed_encoder_has_the_statistics_of_its_step(tiny_run, tmp_path):
    run = tmp_path / "run"
    command = ["pretrain", *tiny_run[:2], "--config", "digits_pretrain", *tiny_run[2:], "--steps", "9"]
    command += ["--posthoc_ema.sigma_rel", "[0.05,0.10]", "--posthoc_ema.every", "3"]
    assert main([*command, "--outdir", str(run)]) == 0
    state, metadata = reconstruct(run, 0.1, 6)
    save_weights(tmp_path / "encoder.safetensors", state, metadata)
    encoder = from_pretrained(tmp_path / "encoder.safetensors")
    counts = [b for name, b in encoder.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counts and all(count == 24 for count in counts)  # the objective calls the head four times a step


# ---- mistakes


def _fails(capsys, arguments, *expected):
    assert main([str(a) for a in arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    for text in expected:
        assert text in line, line


@pytest.mark.parametrize("widths", ["[0]", "[0.05,-0.1]", "[0.29]", "[0.1,0.1]", "[]"])
def test_widths_without_meaning_are_refused_before_training(capsys, diffusion, tmp_path, widths):
    out = tmp_path / "run"
    _fails(capsys, [*diffusion[:-1], widths, "--outdir", out], "sigma_rel is", "want")
    _fails(capsys, [*diffusion, "--posthoc_ema.every", "0", "--outdir", out], "every is 0")
    assert not out.exists()


@needs_extension
def test_more_widths_than_the_fused_optimiser_keeps_are_refused_by_it(capsys, diffusion, tmp_path):
    command = [*diffusion[:-1], "[0.05,0.1,0.15,0.2]", "--optimizer.backend", "fused", "--outdir", tmp_path / "run"]
    _fails(capsys, command, "5 averages", "4 at most", "--optimizer.backend torch")


@pytest.fixture
def damaged(synthetic, tmp_path):
    """A copy of the synthetic run, and its snapshots."""
    shutil.copytree(synthetic[0], tmp_path / "run")
    return tmp_path / "run", list_snapshots(tmp_path / "run" / "posthoc_ema")


def _command(run, tmp_path, *flags):
    return ["reconstruct-ema", "--run", run, "--sigma_rel", "0.07", "--output", tmp_path / "x.safetensors", *flags]


def test_impossible_requests_are_refused(capsys, synthetic, tmp_path):
    command = _command(synthetic[0], tmp_path)
    _fails(capsys, [*command, "--sigma_rel", "0.3"], "sigma_rel is 0.3", "less than 0.2887")
    _fails(capsys, [*command, "--sigma_rel", "0"], "sigma_rel is 0", "more than 0")
    _fails(capsys, [*command, "--step", "601"], "step is 601", "20 to 600", "such as 580 or 600")
    _fails(capsys, [*command, "--step", "290"], "step is 290", "such as 280 or 300")
    _fails(
        capsys, [*command, "--step", "20"], "the 1 snapshots up to there", "over max_residual 0.05", "--max_residual"
    )
    _fails(capsys, [*command, "--sigma_rel", "0.001"], "relative residual of 0.86", "--posthoc_ema.every")
    _fails(capsys, [*command, "--output", tmp_path / "x.pth"], ".safetensors")
    _fails(capsys, ["reconstruct-ema", "--run", synthetic[0]], "--sigma_rel and --output are needed")
    _fails(capsys, _command(tmp_path, tmp_path), "posthoc_ema holds no snapshots", "--posthoc_ema.sigma_rel")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0.5, 0.02, 0])
def test_a_truncated_snapshot_is_named(capsys, damaged, tmp_path, keep):
    run, snapshots = damaged
    content = snapshots[7].read_bytes()
    snapshots[7].write_bytes(content[: int(len(content) * keep)])
    _fails(capsys, _command(run, tmp_path), "step_000000160.safetensors: not a readable snapshot")
    snapshots[7].unlink()
    assert main([str(a) for a in _command(run, tmp_path)]) == 0


def test_a_snapshot_with_one_bit_changed_is_named(capsys, damaged, tmp_path):
    run, snapshots = damaged
    content = bytearray(snapshots[7].read_bytes())
    content[-9] ^= 1
    snapshots[7].write_bytes(content)
    _fails(capsys, _command(run, tmp_path), "step_000000160.safetensors: not a readable snapshot (the checksum of")


def test_snapshots_of_another_model_or_run_are_named(capsys, damaged, tmp_path):
    run, snapshots = damaged
    tensors, metadata = _content(snapshots[3])
    with pytest.raises(ValueError, match="is a snapshot of averages; `epg-fast reconstruct-ema`"):
        load_weights(snapshots[3])

    def change(tensors=tensors, **about):
        save_weights(snapshots[3], tensors, metadata | about)
        return _command(run, tmp_path)

    name = "step_000000080.safetensors"
    _fails(capsys, change(config={"depth": 2}), name, "another run", "config is {'depth': 2}, there {'depth': 1}")
    _fails(capsys, change(sigma_rel=[0.05, 0.2]), name, "sigma_rel is [0.05, 0.2], there [0.05, 0.1]")
    _fails(capsys, change(step=60), name, "step 60, unlike its name")
    other = tensors | {"0.05/weight": torch.zeros(3, 41)}
    _fails(capsys, change(other), name, "another model", "0.05/weight is [3, 41], there [3, 40]")
    less = {k: v for k, v in tensors.items() if k != "0.1/huge"}
    _fails(capsys, change(less), name, "0.1/huge is missing, there [2]")
    save_file({"x": torch.zeros(1)}, snapshots[3], metadata={"epg_fast": json.dumps({"step": 80})})
    _fails(capsys, _command(run, tmp_path), name, "not a snapshot of tracked averages")
    assert not (tmp_path / "x.safetensors").exists()
