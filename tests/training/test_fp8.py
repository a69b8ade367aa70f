"""FP8 linears in training: which they are, what they change, and where they are refused."""

import pytest
import torch

from epg_fast.__main__ import main
from epg_fast.config import DiffusionConfig
from epg_fast.models import create_encoder, create_model, fp8
from epg_fast.models.fp8 import Fp8Linear, require_fp8, use_fp8
from epg_fast.ops.linear_fp8_dynamic import linear_fp8_dynamic_ref
from epg_fast.training.optimizer import make_optimizer
from tests.training.stages import DECODER, JOBS, SIZES, loss_of, make_config, make_stage

SMALL = SIZES | DECODER
LARGE = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def names_of(network):
    return {name for name, module in network.named_modules() if type(module) is Fp8Linear}


def small_encoder(**changes):
    return create_encoder("digits_32", **({"embed_dim": 32, "depth": 2, "num_heads": 2} | changes))


def test_the_large_linears_of_the_blocks_change_and_nothing_else():
    network = create_model("digits_32", **SMALL)
    before, names = dict(network.named_parameters()), list(network.state_dict())
    line = use_fp8(network, "plain")
    assert list(network.state_dict()) == names
    assert all(p is before[name] for name, p in network.named_parameters())
    blocks = [f"blocks.{i}" for i in range(2)] + [f"decoder_blocks.{i}" for i in range(3)]
    want = {f"{block}.{name}" for block in blocks for name in LARGE}
    assert names_of(network) == want | {f"{block}.skip_linear" for block in blocks[2:4]}  # the third has no skip
    assert line == "fp8: 22 linears of the blocks, with a scale per row; gradients of weights are in 16 bits"


def test_linears_of_odd_sizes_and_adapters_stay_in_16_bits_and_are_named():
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
    for p in stage.network.parameters():  # zero-initialised layers would hide most gradients
        p.data += 0.02 * torch.randn(p.shape)
    results = []
    for _ in range(2):
        stage.network.zero_grad()
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(stage).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in stage.network.named_parameters() if p.grad is not None}))
        if not names_of(stage.network):
            use_fp8(stage.network, "plain")
    assert names_of(stage.network) and not names_of(stage.ema)
    assert job != "finetune-consistency" or not names_of(stage.perceptual)
    (loss, gradients), (other, others) = results
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


def train(fp8, steps=12, checkpointing=False):
    torch.manual_seed(0)
    config = make_config("finetune-diffusion", precision="bf16", activation_checkpointing=checkpointing)
    config.optimizer.lr, config.optimizer.warmup_steps = 2e-3, 0
    stage = make_stage("finetune-diffusion", config)
    optimizer = make_optimizer(stage.network, config.optimizer, [])
    if fp8:
        use_fp8(stage.network, "plain")
    losses = []
    for _ in range(steps):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(stage).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_training_follows_the_losses_of_16_bits():
    plain, quantised = train(False), train(True)
    assert plain[-1] < 0.8 * plain[0] and plain != quantised
    assert quantised == pytest.approx(plain, rel=0.02)
    # blocks that are computed again round alike
    assert train(True, 3, checkpointing=True) == quantised[:3]


def test_fp8_is_refused_before_anything_is_written(tiny_run, tmp_path, capsys):
    flags = ["finetune-diffusion", *tiny_run[:2], "--config", "digits_diffusion", *tiny_run[2:], "--fp8", "rowwise"]
    flags += ["--precision", "bf16"]
    assert main([*flags, "--outdir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "fp8: got device cpu, wanted a GPU that multiplies FP8 (compute capability 8.9 or more" in error
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
    cpu = torch.device("cpu")
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device, **kw: ones(*size, device=cpu, **kw))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")
    monkeypatch.setattr(fp8, "linear_fp8_dynamic", product)
    fp8.refusal.cache_clear()
    if said is None:
        assert require_fp8(torch.device("cuda", 0)) is None
        return
    with pytest.raises(ValueError, match=f"fp8: got NVIDIA Something.*{said}.*leave out --fp8"):
        require_fp8(torch.device("cuda", 0))


def test_fp8_is_refused_where_it_would_not_be_used():
    with pytest.raises(ValueError, match="got precision fp16"):
        DiffusionConfig(fp8="rowwise", precision="fp16")
    with pytest.raises(ValueError, match="got ops plain,mlp=triton, whose fused operations take weights in 16 bits"):
        make_stage(
            "finetune-diffusion",
            make_config("finetune-diffusion", fp8="rowwise", precision="bf16", ops="plain,mlp=triton"),
        )
