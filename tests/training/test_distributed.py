"""Ranks that share a batch, and parts of it one after the other, compute what one rank computes of the whole batch."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from epg_fast import config as configs
from epg_fast.__main__ import main
from epg_fast.distributed import TIMEOUT, Ranks, torchrun_store
from epg_fast.models import create_encoder, save_weights
from tests.training import ddp_worker

WORKER = Path(__file__).parent / "ddp_worker.py"
SIZES = {"embed_dim": 32, "depth": 1, "num_heads": 2, "hidden_dim": 32, "output_dim": 16}
DECODER = {"decoder_embed_dim": 48, "decoder_depth": 2, "decoder_num_heads": 2}


def _torchrun(ranks, *arguments):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run([*launch, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def jobs(digits, tmp_path):
    """Return a function: parts -> arguments of ddp_worker.gradients for the three stages."""
    encoder = create_encoder("digits_32", **SIZES).state_dict()
    network = {"image_size": 32, "patch_size": 8, **SIZES}
    save_weights(tmp_path / "encoder.safetensors", encoder, {"config": network})
    model = configs.ModelConfig("digits_32", **SIZES, **DECODER)
    data = configs.DataConfig(f"{digits}/train", normalization="simple")
    common = {"outdir": "unused", "model": model, "data": data, "batch_size": 12, "precision": "fp32"}
    tuned = common | {"p_mean": 1.0, "dropout": 0.0}
    perceptual = str(tmp_path / "encoder.safetensors")

    def make(parts):
        return [
            (configs.PretrainConfig(**common, gradient_accumulation=parts), "PretrainStage", 7),
            (configs.DiffusionConfig(**tuned, gradient_accumulation=parts), "DiffusionStage", 7),
            (
                configs.ConsistencyConfig(**tuned, gradient_accumulation=parts, perceptual=perceptual),
                "ConsistencyStage",
                7,
            ),
        ]

    return make


def test_loss_and_gradients_do_not_depend_on_the_number_of_ranks_and_parts(jobs, tmp_path):
    """Contrastive negatives and BatchNorm statistics span the global batch; float32 tolerance."""
    alone = Ranks(0, 1, torch.device("cpu"))
    whole = [ddp_worker.gradients(*job, alone) for job in jobs(1)]
    (tmp_path / "jobs.pkl").write_bytes(pickle.dumps([*jobs(1), *jobs(3)]))
    _torchrun(2, WORKER, tmp_path / "jobs.pkl", tmp_path / "two.pt")
    for found in ([ddp_worker.gradients(*job, alone) for job in jobs(4)], *_thirds(torch.load(tmp_path / "two.pt"))):
        for one, other in zip(whole, found, strict=True):
            assert one.keys() == other.keys() and len(one) > 20
            for name, want in one.items():
                if want.is_floating_point():
                    error = (other[name] - want).norm() / want.norm().clamp_min(1e-6)
                    # a value near a tie may be rounded to the other side in FP8
                    assert error < (2e-2 if name.startswith("fp8.") else 2e-4), f"{name}: relative error {error:.1e}"
                else:
                    assert torch.equal(other[name], want), name


def _thirds(results):
    return results[:3], results[3:]


def test_the_loss_scale_reaches_every_part(jobs):
    alone = Ranks(0, 1, torch.device("cpu"))
    for job in jobs(2):
        plain, scaled = (ddp_worker.gradients(*job, alone, scaled=on) for on in (False, True))
        for name, want in plain.items():
            if name.startswith("fp8."):
                continue
            factor = 2.0**14 if name.startswith("grad.") else 1
            torch.testing.assert_close(scaled[name], factor * want, msg=lambda text, name=name: f"{name}: {text}")


def test_a_batch_that_does_not_divide_into_parts_is_refused(tiny_run, tmp_path, capsys):
    flags = [*tiny_run[:2], "--config", "digits_diffusion", *tiny_run[2:], "--gradient_accumulation", "3"]
    assert main(["finetune-diffusion", *flags, "--batch_size", "16", "--outdir", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "batch_size 16 does not divide over 1 rank with 3 parts each" in message and "--batch_size 18" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_trains_and_logs_the_same_losses(tiny_run, tmp_path):
    for ranks in (1, 2):
        flags = [*tiny_run[:2], "--config", "digits_pretrain", *tiny_run[2:], "--steps", "6"]
        flags += ["--gradient_accumulation", str(ranks)]
        _torchrun(ranks, "-m", "epg_fast", "pretrain", *flags, "--outdir", tmp_path / str(ranks))
    one, two = (
        [json.loads(line) for line in (tmp_path / str(ranks) / "metrics.jsonl").read_text().splitlines()]
        for ranks in (1, 2)
    )
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        levels = [name for name in a if name.startswith("consistency_by_level/")]
        assert len(levels) == 1 and levels[0] in b  # one noise level for the whole batch
        for name in ("loss", "contrastive", "consistency", "grad_norm", *levels):
            assert b[name] == pytest.approx(a[name], rel=2e-3)


@pytest.mark.parametrize("nodes, seen", [(1, False), (2, True)])
def test_a_restart_does_not_see_the_addresses_of_before(nodes, seen, monkeypatch):
    """torchrun keeps its store over restarts, whose count several nodes may not agree on."""
    kept = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *args, **kwargs: iter([(kept, 0, 2)]))
    for name, value in {"WORLD_SIZE": 2 * nodes, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RESTART_COUNT": 0}.items():
        monkeypatch.setenv(name, str(value))
    torchrun_store(TIMEOUT).set("address", "of a rank that is gone")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert torchrun_store(TIMEOUT).check(["address"]) == seen
