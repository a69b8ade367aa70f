"""What the ledger counts of small graphs, against counts by hand and Inductor's own; what should not be is reported.

Needs a CUDA build of PyTorch and the stand-in for its runtime, preloaded: `make ledger` runs it so.
"""

import dataclasses
import os

import pytest
import torch
import torch.nn.functional as F

if "standin" not in os.environ.get("LD_PRELOAD", ""):
    pytest.skip("needs a CUDA build of PyTorch and a GPU that is not there: `make ledger`", allow_module_level=True)

from bench.ledger import device
from bench.ledger.cost import ATTENTION, COPIES, ELEMENTWISE, H200, NORMS, OPTIMISER, PRODUCTS, REDUCTIONS, total

device.prepare()

from bench import roofline  # noqa: E402
from bench.ledger import products  # noqa: E402
from bench.ledger.count import Counter  # noqa: E402
from bench.ledger.jobs import JOBS, VARIANTS, NotCounted, compiling_as_is, count, least_seconds  # noqa: E402
from epg_fast import ops  # noqa: E402
from epg_fast.models import create_model  # noqa: E402
from epg_fast.ops.fused_adamw_ema import SPEC as ADAMW  # noqa: E402
from epg_fast.ops.global_norm import SPEC as GLOBAL_NORM  # noqa: E402
from epg_fast.ops.linear_fp8_fused import SPEC as FUSED  # noqa: E402

BF16 = torch.bfloat16


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="cuda")


def counted(call, *shapes, dtype=BF16, compiled=True, grad=False):
    """The counter of a second call of `call`."""
    counter = Counter()
    with compiling_as_is(counter), torch.set_grad_enabled(grad):
        inputs = [empty(*shape, dtype=dtype).requires_grad_(grad) for shape in shapes]
        run = torch.compile(call, dynamic=False) if compiled else call
        run(*inputs)
        with counter.counting():
            run(*inputs)
    return counter


def only(counter):
    (kernel,) = counter.kernels
    return kernel


@pytest.mark.parametrize(
    ("call", "shapes", "values"),
    [
        (lambda x: F.gelu(x) * 2 + x, [(128, 256)], (128 * 256, 128 * 256)),
        # a slice and what is expanded, with their own size
        (lambda x, b: x[:, :64] + b, [(128, 256), (64,)], (128 * 64 + 64, 128 * 64)),
    ],
)
def test_an_elementwise_graph_is_one_kernel_that_reads_and_writes_once(call, shapes, values):
    kernel = only(counted(call, *shapes))
    assert (kernel.read, kernel.written) == (2 * values[0], 2 * values[1])
    assert (kernel.kind, kernel.by, kernel.flops) == (ELEMENTWISE, "generated", 0)


def test_a_product_and_what_follows_are_two_kernels():
    found = counted(lambda x, w: F.relu(x @ w), (128, 256), (256, 512))
    product, relu = found.kernels
    assert (product.kind, product.flops) == (PRODUCTS, 2 * 128 * 256 * 512)
    assert product.bytes == 2 * (128 * 256 + 256 * 512 + 128 * 512)
    assert (relu.read, relu.written) == (128 * 512 * 2, 128 * 512 * 2)
    assert total(found.kernels).kernels == 2


def test_forward_and_backward_are_counted():
    found = counted(lambda x, w: (x @ w).sum().backward(), (128, 256), (256, 512), compiled=False, grad=True)
    assert sum(kernel.flops for kernel in found.kernels) == 3 * 2 * 128 * 256 * 512


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype) @ w,
        lambda x, w: torch.cat([F.silu(x), x @ w], dim=-1),
        lambda x, w: F.softmax((x @ w).float(), dim=-1).sum(0),
    ],
)
def test_bytes_are_inductors_own_count(call):
    (graph,) = counted(call, (1024, 768), (768, 768)).graphs
    assert sum(kernel.bytes for kernel in graph.kernels) == pytest.approx(graph.check, rel=0.005)


def test_kinds_of_generated_kernels():
    def kinds(call):
        return {kernel.kind for kernel in counted(call, (1024, 768)).kernels}

    assert kinds(lambda x: F.layer_norm(x.float(), (768,))) == {NORMS}
    assert kinds(lambda x: x.t().contiguous()) == {COPIES}
    assert kinds(lambda x: x.float()) == {COPIES}
    assert kinds(lambda x: x.sum(1)) == {REDUCTIONS}
    assert kinds(lambda x: F.scaled_dot_product_attention(*(x.view(4, 4, 256, 192),) * 3)) == {ATTENTION}


def test_a_planted_copy_is_a_kernel_more():
    calls = F.gelu, lambda x: F.gelu(x.t().contiguous())
    before, after = (counted(call, (128, 256), compiled=False) for call in calls)
    (added,) = [kernel for kernel in after.kernels if kernel.kind == COPIES]
    assert len(after.kernels) == len(before.kernels) + 1
    assert added.bytes == 2 * 128 * 256 * 2 and not after.problems


def problem(counter):
    (text,) = counter.problems
    return text


def breaking(x):
    x = F.gelu(x)
    torch._dynamo.graph_break()
    return F.gelu(x)


@pytest.mark.parametrize(
    ("call", "compiled", "wanted"),
    [
        (breaking, True, "graph break"),
        (lambda x: x * x.sum().item(), False, "a value of the GPU is read"),
        (lambda x: x.cpu(), False, "a copy to the host that waits"),
        (lambda x: x * torch.ones(128, 1).to(x), False, "a copy from the host that waits"),
    ],
)
def test_a_planted_break_or_host_sync_is_reported(call, compiled, wanted):
    found = counted(call, (128, 256), compiled=compiled)
    assert wanted in problem(found) and len(found.graphs) == 2 * compiled


def test_a_tensor_on_the_cpu_in_a_graph_is_reported():
    found = counted(lambda x: x + torch.arange(256).float().cumsum(0).to("cuda"), (128, 256))
    assert any("CPU" in text for text in found.problems)


def test_a_second_compilation_is_reported():
    counter = Counter()
    with compiling_as_is(counter), torch.no_grad():
        call = torch.compile(F.gelu, dynamic=False)
        call(empty(4, 4))
        with counter.counting():
            call(empty(8, 4))
    assert "compiled again" in problem(counter)


def test_a_launcher_that_disagrees_with_its_fake_is_reported():
    @torch.library.custom_op("epg_fast::planted", mutates_args=(), device_types="cpu")
    def planted(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    planted.register_kernel("cuda")(lambda x: torch.empty_like(x, dtype=torch.float32))
    planted.register_fake(torch.empty_like)
    text = problem(counted(planted, (4, 8), compiled=False))
    assert "epg_fast::planted, output 0" in text and "float32" in text and "bfloat16" in text


def test_skip_linear_by_hand():
    batch, tokens, width, skip = 2, 256, 512, 256
    shapes = ((batch, tokens, width), (batch, tokens, skip), (width, width + skip), (width,))
    kernel = only(counted(lambda *x: ops.skip_linear(*x, backend="triton"), *shapes))
    rows = batch * tokens
    assert (kernel.kind, kernel.by) == (PRODUCTS, "ours")
    assert kernel.flops == 2 * rows * width * (width + skip)
    assert kernel.read == 2 * (rows * (width + skip) + width * (width + skip) + width)
    assert kernel.written == 2 * rows * width
    tiles = products.triton_tiles(kernel.source)
    # as small a product has tiles of 64 x 64: 16 of 128 x 128 would leave most multiprocessors idle
    assert (tiles.rows, tiles.columns, tiles.count) == (rows, width, 8 * 8)


def test_a_product_of_fp8_operands_moves_what_its_specification_says_at_twice_the_rate():
    batch, tokens, width, skip, n = shape = 2, 256, 512, 256, 384

    def call(residual, gate, bias):
        x, other, weight = (
            empty(*sides, dtype=torch.float8_e4m3fn)
            for sides in ((batch, tokens, width), (batch, tokens, skip), (n, width + skip))
        )
        scales = [empty(*sides, dtype=torch.float32) for sides in ((4, batch, tokens), (n,), (batch, tokens))]
        operands = x, scales[0], weight, scales[1], bias, other, scales[2]
        return ops.linear_fp8_fused(*operands, False, residual, gate, "both", "triton")

    kernel = only(counted(call, (batch, tokens, n), (batch, n), (n,), compiled=False))
    assert kernel.bytes == FUSED.bytes(shape, 2) and kernel.flops == FUSED.flops(shape)
    assert kernel.seconds == max(kernel.flops / (2 * H200.products), kernel.bytes / H200.memory)


def test_what_a_kernel_wrote_itself_is_not_read_again():
    shape = (2, 128, 3, 4, 64)

    def backward(qkv):
        return torch.autograd.grad(ops.attention(qkv, 0.125, backend="triton").sum(), qkv)

    found = counted(backward, shape, compiled=False, grad=True)
    (kernel,) = [k for k in found.kernels if k.name == "_attention_bwd_kernel"]
    result, statistics = 2 * 128 * 4 * 64, 2 * 128 * 4 * 4
    assert kernel.read == 2 * (3 * result + 2 * result) + statistics  # qkv, gradient and output, log-sum-exp
    assert kernel.written == 2 * 3 * result + 4 * result + statistics  # dqkv, dq in float32, delta


def test_the_fused_optimiser_moves_what_its_specification_says():
    shapes = [(1000, 64)] * 3

    def update(*params):
        grads, first, second, ema = ([torch.empty_like(p) for p in params] for _ in range(4))
        norm, found_inf = ops.global_norm(grads, backend="extension")
        numbers = {name: empty(3, dtype=torch.float64) for name in ("lrs", "weight_decays")}
        numbers |= {"max_norm": empty(dtype=torch.float64), "ema_weights": empty(1, dtype=torch.float64)}
        numbers |= {"steps": empty(3, dtype=torch.float32), "norm": norm, "found_inf": found_inf}
        ops.fused_adamw_ema_(list(params), grads, first, second, emas=[ema], **numbers, backend="extension")

    norm, step = counted(update, *shapes, dtype=torch.float32, compiled=False).kernels
    assert {norm.kind, step.kind} == {OPTIMISER} and (norm.launches, step.launches) == (2, 2)
    values = (3, 64_000)
    assert norm.bytes == pytest.approx(GLOBAL_NORM.bytes(values, 4), rel=1e-3)
    assert step.bytes == pytest.approx(ADAMW.bytes(values, 4), rel=1e-3)


SMALL = dataclasses.replace(JOBS["sample_xl"], preset="digits_32", batch=8)


@pytest.mark.parametrize(
    "variant", ["ours-blocks", "ours-prologue", "ours-cuda", "auto-blocks", "plain-blocks", "plain-cudnn"]
)
def test_a_job_of_a_small_network_is_counted_without_problems(variant):
    found = count(SMALL, VARIANTS[variant])
    assert total(found.of_phase("call")).kernels > 20 and not found.problems
    attention = {kernel.name for kernel in found.kernels if kernel.kind == ATTENTION}
    assert attention and (variant != "plain-cudnn" or all("cudnn" in name for name in attention))


def test_what_a_keen_user_tries_is_tried():
    from torch._inductor import config

    with VARIANTS["plain-tuned"].within():
        assert config.coordinate_descent_tuning and not config.epilogue_fusion
    with VARIANTS["plain-cudnn"].within():
        assert torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and not config.coordinate_descent_tuning


def test_products_of_the_package_are_studied_site_by_site():
    rows = {row.variant: row.details for row in products.study(SMALL, ["embedding", "encoder.mlp"])}
    tokens, width = 8 * (16 + 2), 96
    mlp = {f"encoder.mlp, mlp_residual ({i} of 2), {by}" for i in (1, 2) for by in ("Triton", "CUTLASS")}
    assert set(rows) == {"embedding, patch_embed, Triton", *mlp}
    for by in ("Triton", "CUTLASS"):
        up, down = (rows[f"encoder.mlp, mlp_residual ({i} of 2), {by}"] for i in (1, 2))
        assert (up["result"], down["result"]) == ([tokens, 4 * width], [tokens, width])
        assert up["break_even"] == down["break_even"] == 1 + up["saved_us"] / (up["floor_us"] + down["floor_us"])


def test_the_minimum_is_the_rooflines():
    with torch.device("meta"):
        floor = roofline.forward(create_model("digits_32"), 8).floor(H200)
    assert sum(least_seconds(SMALL).values()) == pytest.approx(floor)
    fp8 = least_seconds(dataclasses.replace(SMALL, dtype="fp8"))
    assert sum(fp8.values()) <= floor


def test_what_cannot_be_counted_says_why():
    with pytest.raises(NotCounted, match="no FP8"):
        count(JOBS["sample_xl_fp8"], VARIANTS["plain-blocks"])
