"""The memory of activations, counted on shapes alone, is what a real step keeps; checkpointing changes no number."""

import pytest
import torch
from safetensors.torch import load_file

from epg_fast import training
from epg_fast.__main__ import main
from epg_fast.runtime import autocast
from epg_fast.training.activations import SavedTensors, activation_bytes
from epg_fast.training.dry_run import planned_stage
from tests.training.stages import JOBS, loss_of, make_config, make_stage

# 256 + 2 tokens and heads of dimension 64, as in the presets.
MIDDLE = {"image_size": 64, "patch_size": 4, "embed_dim": 128, "depth": 2, "num_heads": 2}
MIDDLE |= {"decoder_embed_dim": 192, "decoder_depth": 2, "decoder_num_heads": 3, "hidden_dim": 512, "output_dim": 64}


def _kept(job, config, images):
    """Bytes that a real forward pass saves."""
    stage = make_stage(job, config, perceptual=True)
    perceptual = getattr(stage, "perceptual", None)
    saved = SavedTensors(stage.network, stage.ema, *([perceptual] if perceptual else []))
    with saved.counted(), autocast(torch.device("cpu"), config.precision):
        loss_of(stage, images)
    return saved.bytes


def _estimate(job, config, images):
    if job == "finetune-consistency":
        config.perceptual = "an encoder of the same preset"
    stage = planned_stage(config, getattr(training, JOBS[job] + "Stage"), 1)
    return activation_bytes(stage, images, 0)


@pytest.mark.parametrize("size", ["tiny", "middle"])
@pytest.mark.parametrize("job", JOBS)
def test_the_estimate_is_what_autograd_saves(job, size):
    """To the byte on a CPU; what a GPU's kernels save may differ."""
    model, images, precision = (MIDDLE, 2, "bf16") if size == "middle" else ({}, 4, "fp32")
    fields = {"model": model, "precision": precision, "batch_size": images}
    estimate = _estimate(job, make_config(job, **fields), images)
    assert estimate.plain == _kept(job, make_config(job, **fields), images)
    checkpointed = _kept(job, make_config(job, **fields, activation_checkpointing=True), images)
    assert checkpointed < estimate.checkpointed < 0.7 * estimate.plain
    assert estimate.chosen == estimate.plain


@pytest.mark.parametrize("job", JOBS)
def test_a_share_of_the_blocks_is_counted_as_such(job):
    """Two blocks in pre-training and five in the generators: of the former a share of 0.4 is none."""

    def estimate(share):
        return _estimate(job, make_config(job, batch_size=4, activation_checkpointing=share), 4)

    some, every = estimate(0.4), estimate(True)
    assert every.chosen == every.checkpointed < every.plain
    kept = _kept(job, make_config(job, batch_size=4, activation_checkpointing=0.4), 4)
    if job == "pretrain":
        assert kept == some.chosen == some.plain
    else:
        assert every.plain > kept and kept < some.chosen < kept + every.plain / 3


def test_activations_grow_with_the_images_of_a_gpu():
    one, two, three = (_estimate("finetune-diffusion", make_config("finetune-diffusion"), n) for n in (8, 16, 24))
    assert three.plain - two.plain == two.plain - one.plain > 0


def test_checkpointing_changes_no_bit_of_a_run(tiny_run, tmp_path):
    """Consistency training draws its dropout masks twice, and checkpointing once more."""
    flags = [*tiny_run[:2], "--config", "digits_consistency", *tiny_run[2:], "--preview.every", "0", "--dropout", "0.5"]
    command = ["finetune-consistency", *flags, "--steps", "2", "--outdir"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    assert main([*command, str(tmp_path / "again"), "--activation_checkpointing", "true"]) == 0
    plain, again = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "again"))
    assert plain.keys() == again.keys() and all(torch.equal(again[name], plain[name]) for name in plain)
