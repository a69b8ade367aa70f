"""FP8 linears in training: which they are, what they change, and where they are refused."""

from contextlib import nullcontext

import pytest
import torch

from epg_fast.config import DiffusionConfig
from epg_fast.models import create_encoder, create_model, fp8
from epg_fast.models.fp8 import Fp8Linear, require_fp8, use_fp8
from epg_fast.ops.linear_fp8_dynamic import linear_fp8_dynamic_ref
from tests.training.runs import fails, run_command
from tests.training.stages import CPU, DECODER, JOBS, SIZES, Training, loss_of, make_config, make_stage, spread

SMALL = SIZES | DECODER
LARGE = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def names_of(network):
    return {name for name, module in network.named_modules() if type(module) is Fp8Linear}


def small_encoder(**changes):
    return create_encoder("digits_32", **({"embed_dim": 32, "depth": 2, "num_heads": 2} | changes))


def test_the_large_linears_of_the_blocks_change_and_the_rest_is_named():
    """Not those of odd sizes and adapters. Names and parameters of the network stay."""
    network = create_model("digits_32", **SMALL)
    before, names = dict(network.named_parameters()), list(network.state_dict())
    line = use_fp8(network, "plain")
    assert list(network.state_dict()) == names
    assert all(p is before[name] for name, p in network.named_parameters())
    blocks = [f"blocks.{i}" for i in range(2)] + [f"decoder_blocks.{i}" for i in range(3)]
    want = {f"{block}.{name}" for block in blocks for name in LARGE}
    assert names_of(network) == want | {f"{block}.skip_linear" for block in blocks[2:4]}  # the third has no skip
    assert line == "fp8: 22 linears of the blocks, with a scale per row; gradients of weights are in 16 bits"

    network = create_model("digits_32", **(SMALL | {"decoder_embed_dim": 40}))
    network.blocks[0].mlp.fc1 = torch.nn.Sequential(network.blocks[0].mlp.fc1)
    network.blocks[1].attn = torch.nn.Sequential(network.blocks[1].attn)
    line = use_fp8(network, "plain")
    left = {"blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.1.attn.proj"}
    assert names_of(network) == {f"blocks.{i}.{name}" for i in range(2) for name in LARGE} - left
    for part in ("fp8: 5 linears", "3 x fc1 40 to 160", "2 x skip_linear 72 to 40", "1 x a Sequential as fc1"):
        assert part in line
    with pytest.raises(ValueError, match="no linear with sides that are multiples of 16 .*2 x qkv 24 to 72.*leave it"):
        use_fp8(small_encoder(embed_dim=24))


@pytest.mark.parametrize("job", JOBS)
def test_every_stage_computes_nearly_the_loss_and_gradients_of_16_bits(job):
    torch.manual_seed(1)
    stage = make_stage(job, make_config(job, precision="bf16"))
    spread(stage.network)
    results = []
    for recomputes in (False, False, True):
        stage.network.zero_grad()
        stage.network.use_checkpoint = recomputes
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(stage).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in stage.network.named_parameters() if p.grad is not None}))
        if not names_of(stage.network):
            use_fp8(stage.network, "plain")
    assert names_of(stage.network) and not names_of(stage.ema)
    assert job != "finetune-consistency" or not names_of(stage.perceptual)
    (loss, gradients), (other, others), (again, repeated) = results
    assert again == other and all(torch.equal(g, repeated[name]) for name, g in others.items())
    assert other == pytest.approx(loss.item(), rel=0.05) and other != loss
    assert gradients.keys() == others.keys()
    if job == "pretrain":
        # The contrastive gradient of random features is small differences of large terms, which rounding changes.
        assert all(g.isfinite().all() and g.any() for g in others.values())
        return
    whole = (torch.cat([g.flatten() for g in grads.values()]) for grads in (gradients, others))
    assert torch.cosine_similarity(*whole, dim=0) > 0.98
    for name in gradients:
        assert torch.cosine_similarity(gradients[name].flatten(), others[name].flatten(), dim=0) > 0.8, name


@pytest.mark.slow
def test_a_block_in_fp8_is_one_graph():
    network = small_encoder()
    use_fp8(network, "plain")
    x = torch.randn(2, 18, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = network.blocks[0](x)
        network.blocks[0].compile(fullgraph=True, backend="aot_eager")
        got = network.blocks[0](x)
    gradients = [torch.autograd.grad(y.sum(), [x, network.blocks[0].mlp.fc1.weight]) for y in (want, got)]
    assert torch.equal(got, want) and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    torch.compiler.reset()


@pytest.mark.slow
def test_training_follows_the_losses_of_16_bits():
    losses = {True: [], False: []}
    for quantised, found in losses.items():
        training = Training(precision="bf16")
        if quantised:
            use_fp8(training.stage.network, "plain")
        for _ in range(12):
            training.state.iteration = 0  # the same images and noise
            training.update()
            found.append(training.metrics.write(1)["loss"])
    assert losses[False][-1] < 0.8 * losses[False][0] and losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


def test_fp8_is_refused_before_anything_is_written(tiny_run, tmp_path, capsys):
    command = run_command(tiny_run, tmp_path / "run", fp8="rowwise", precision="bf16")
    fails(capsys, command, "fp8: got device cpu, wanted a GPU that multiplies FP8 (compute capability 8.9 or more")
    assert not (tmp_path / "run").exists()


def refuse(x, weight):
    raise RuntimeError("not here\nand why")


@pytest.mark.parametrize(
    "capability, product, said",
    [
        ((8, 0), linear_fp8_dynamic_ref, "of compute capability 8.0"),
        ((9, 0), refuse, "refuses: not here"),
        ((9, 0), lambda x, weight: 0 * linear_fp8_dynamic_ref(x, weight), "multiplies wrongly"),
        ((9, 0), linear_fp8_dynamic_ref, None),
    ],
)
def test_a_gpu_that_does_not_multiply_fp8_is_refused_with_its_name(monkeypatch, capability, product, said):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device, **kw: ones(*size, device=CPU, **kw))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")
    monkeypatch.setattr(fp8, "linear_fp8_dynamic", product)
    fp8.refusal.cache_clear()
    with pytest.raises(ValueError, match=f"NVIDIA Something.*{said}.*leave out --fp8") if said else nullcontext():
        require_fp8(torch.device("cuda", 0))


def test_fp8_is_refused_where_it_would_not_be_used():
    with pytest.raises(ValueError, match="got precision fp16"):
        DiffusionConfig(fp8="rowwise", precision="fp16")
    with pytest.raises(ValueError, match="got ops plain,mlp=triton, whose fused operations take weights in 16 bits"):
        job = "finetune-diffusion"
        make_stage(job, make_config(job, fp8="rowwise", precision="bf16", ops="plain,mlp=triton"))
