"""What only a GPU can show: parity on the device, compiled training there, and the same images as on the CPU."""

import copy
import shutil

import pytest
import torch

import epg_fast
from epg_fast.__main__ import main
from epg_fast.distributed import Ranks
from epg_fast.models import EPGViT, create_model
from epg_fast.models.fp8 import Fp8Linear, use_fp8
from epg_fast.plans.sites import site_choices
from epg_fast.training.draws import Draws
from epg_fast.training.gradients import compile_stage
from epg_fast.training.loop import train_step
from tests.golden_data import Case, names
from tests.ops.kernel_checks import needs_gemms
from tests.training.runs import run_command, run_lines
from tests.training.stages import JOBS, Training, make_config, make_stage, spread

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


ON_GPU = Ranks(0, 1, torch.device("cuda", 0))
needs_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs compute capability 8.9"
)


@pytest.fixture(autouse=True)
def _full_float32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("name", names("epgvit_"))
def test_generator_output_and_gradients(name):
    case = Case(name)
    model = EPGViT(**case.config["model"])
    model.load_state_dict(case.weights(), strict=True)
    model.cuda()
    out = model(case["x"].cuda(), case["t"].cuda(), case["y"].cuda())
    (out * case["r"].cuda()).sum().backward()
    case.check("out", out.cpu())
    for parameter in model.parameters():
        parameter.grad = None if parameter.grad is None else parameter.grad.cpu()
    model.cpu()
    case.check_gradients(model)


def test_the_same_noise_gives_the_same_images_as_on_the_cpu():
    case = Case("samplers")
    model = EPGViT(**case.config["model"])
    model.load_state_dict(case.weights())
    want = epg_fast.sample(model, [0, 1, 2], steps=8, guidance=2.0)
    got = epg_fast.sample(model.cuda(), [0, 1, 2], steps=8, guidance=2.0)
    assert (got - want).abs().max() < 1e-3


@needs_gemms
@pytest.mark.parametrize("compiled", [False, True])
def test_products_of_the_extension_serve_a_network_of_true_widths(compiled):
    """A block of EPG-XL's encoder and one of its decoder, batch 64, sampled and trained; the other sites are Triton's.

    Output within twice the error that PyTorch makes in bfloat16, gradients together within three times theirs.
    """
    with torch.device("cuda"):
        plain = create_model("epg_xl_16_256", depth=1, decoder_depth=1)
        x, t, y = torch.randn(64, 3, 256, 256), torch.randn(64), torch.arange(64)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    cutlass = site_choices("cuda")
    results = []
    for ops, dtype in (("plain", torch.float32), ("plain", torch.bfloat16), (cutlass, torch.bfloat16)):
        model = copy.deepcopy(plain).use_ops(ops)
        for block in (*model.blocks, *model.decoder_blocks) if compiled and ops == cutlass else ():
            block.compile(fullgraph=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            with torch.no_grad():
                sampled = model(x, t, y)
            out = model(x, t, y)
        torch.testing.assert_close(sampled, out.detach())
        out.float().square().mean().backward()
        results.append((out.detach().float(), {name: p.grad for name, p in model.named_parameters()}))
    (exact, wanted), *others = results
    outputs = [(out - exact).norm() for out, _ in others]
    gradients = [
        torch.stack([(found[n] - g).norm() / g.norm() for n, g in wanted.items()]).norm() for _, found in others
    ]
    assert outputs[1] < 2 * outputs[0] < 0.1 * exact.norm() and gradients[1] < 3 * gradients[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("job", JOBS)
def test_compiled_training_learns_and_resumes(job, precision, tiny_run, tmp_path):
    flags = {"device": "cuda", "compile": "blocks", "precision": precision, "steps": 60}
    flags |= {} if job == "pretrain" else {"preview.every": 30}
    command = run_command(tiny_run, tmp_path / "run", job, **flags)
    assert main(command) == 0
    lines = run_lines(tmp_path / "run")
    assert _total(lines[-10:]) < _total(lines[:10])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000000060")
    assert main(command) == 0
    assert run_lines(tmp_path / "run")[-1]["loss"] == pytest.approx(lines[-1]["loss"], rel=0.05)


def _total(lines):
    return sum(line["loss"] for line in lines)


def _lines(job, tiny_run, outdir, **flags):
    """What a run of 24 updates without dropout logs."""
    flags = {"device": "cuda", "precision": "bf16", "steps": 24, **flags}
    flags |= {} if job == "pretrain" else {"preview.every": 8, "dropout": 0}
    assert main(run_command(tiny_run, outdir, job, **flags)) == 0
    return run_lines(outdir)


@needs_fp8
@pytest.mark.parametrize("job", JOBS)
def test_training_in_fp8_follows_16_bits(job, tiny_run, tmp_path):
    plain = _lines(job, tiny_run, tmp_path / "bf16", compile="off")
    lines = _lines(job, tiny_run, tmp_path / "fp8", compile="blocks", fp8="rowwise")
    assert _total(lines[-6:]) < _total(lines[:6])
    for part in (slice(0, 8), slice(16, 24)):
        assert _total(lines[part]) == pytest.approx(_total(plain[part]), rel=0.1)


@needs_fp8
@pytest.mark.parametrize("job", JOBS)
def test_fp8_products_of_the_gpu_are_those_of_float32_on_rounded_operands(job):
    """Loss and gradients of a step with PyTorch's FP8 product, and with the reference."""
    torch.manual_seed(0)
    device = ON_GPU.device
    stage = make_stage(job, make_config(job, precision="bf16", batch_size=8), perceptual=False, ranks=ON_GPU)
    spread(stage.network)
    batch = {name: torch.randn(8, 3, 32, 32, device=device) for name in ("x", "view1", "view2")}
    batch["label"] = torch.arange(8, device=device)
    assert use_fp8(stage.network).startswith("fp8: ")
    results = []
    for backend in ("scaled_mm", "plain"):
        for module in stage.network.modules():
            if type(module) is Fp8Linear:
                module.backend = backend
        stage.network.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = stage.loss(batch, Draws(0, 0, 0, 8, device), 0).loss
        loss.backward()
        gradients = [p.grad.flatten() for p in stage.network.parameters() if p.grad is not None]
        results.append((loss.item(), torch.cat(gradients)))
    assert results[0][0] == pytest.approx(results[1][0], rel=0.02)
    assert torch.cosine_similarity(results[0][1], results[1][1], dim=0) > (0.9 if job == "pretrain" else 0.99)


@pytest.mark.parametrize("job, checkpointing", [*((job, "false") for job in JOBS), ("finetune-diffusion", "true")])
def test_cuda_graphs_give_the_losses_of_compiled_networks(job, checkpointing, tiny_run, tmp_path, monkeypatch, recwarn):
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    recorded, new_graph = [], CUDAGraphTreeManager.new_graph_id
    monkeypatch.setattr(CUDAGraphTreeManager, "new_graph_id", lambda self: recorded.append(self) or new_graph(self))
    flags = {"compile": "network", "activation_checkpointing": checkpointing}
    want = _lines(job, tiny_run, tmp_path / "compiled", **flags)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    got = _lines(job, tiny_run, tmp_path / "graphs", **flags, cuda_graphs="true")
    for a, b in zip(got, want, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.02)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped
    # pre-training has seven passes forward and three backward; none is recorded in every step
    assert 2 <= len(recorded) <= 12
    assert not any("fast path of CUDAGraphs" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("job", JOBS)
def test_sharded_training_in_parts_gives_the_losses_of_plain_training(job, tiny_run, tmp_path):
    """One rank, over NCCL. In bf16 parts round otherwise than the whole batch does."""
    plain = _lines(job, tiny_run, tmp_path / "ddp", compile="blocks")
    flags = {"parallelism": "fsdp", "gradient_accumulation": 2, "activation_checkpointing": 0.5}
    lines = _lines(job, tiny_run, tmp_path / "fsdp", compile="blocks", **flags)
    assert lines[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.02)
    for part in (slice(0, 8), slice(16, 24)):
        assert _total(lines[part]) == pytest.approx(_total(plain[part]), rel=0.1)


@pytest.mark.parametrize("precision, parts", [("bf16", 1), ("fp16", 1), ("bf16", 2)])
@pytest.mark.parametrize("job", JOBS)
def test_the_host_waits_for_nothing_in_an_update(job, precision, parts):
    """torch raises where the host waits for the device; blocks are compiled, as training on a GPU has them."""
    training = Training(job, ranks=ON_GPU, precision=precision, gradient_accumulation=parts)
    compile_stage(training.stage, "blocks")
    batch = training.batch()
    training.updated(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train_step(training.state, batch, training.metrics)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert training.state.iteration == 5


def test_ema_in_host_memory_follow_every_update_and_nobody_waits():
    """An EMA beside them is updated on the device, without a wait that would hide a copy that comes too late."""
    model = {"embed_dim": 512, "decoder_embed_dim": 512}  # so that copies take their time
    training = Training(ranks=ON_GPU, model=model, ema=0.5, offload_ema=True)
    state, weights = training.state, [p.detach() for p in training.stage.network.parameters()]
    want = [p.detach().cuda() for p in training.stage.ema.parameters()]
    whole, broken = training.batch(), training.batch(broken=True)
    torch.cuda.synchronize()
    for i in range(30):
        torch.cuda.set_sync_debug_mode("error" if i > 2 else "default")
        try:
            skipped = i % 7 == 5
            train_step(state, broken if skipped else whole, training.metrics)
            if not skipped:
                torch._foreach_lerp_(want, weights, 0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    state.host_ema.wait()
    got = list(training.stage.ema.parameters())
    assert not any(p.is_cuda for p in got) and state.skipped[0] == 4
    torch.testing.assert_close([p.data for p in got], [w.cpu() for w in want], rtol=1e-5, atol=1e-6)
