"""Blocks in FP8 on the kernels that quantise: they err as PyTorch's way does, and bypass nothing that was changed."""

from collections import Counter

import pytest
import torch

import epg_fast
from epg_fast.models import EPGViT, blocks, fp8, fused_fp8
from epg_fast.models.fp8 import Fp8Linear
from epg_fast.models.fused_fp8 import ChainedBlock, ChainedDecoderBlock, Fp8Block, Fp8DecoderBlock
from epg_fast.sampling.precision import inference_network
from tests.networks import change, make_model
from tests.ops.kernel_checks import pretend_gemms_run

pytest.importorskip("triton")
KERNELS = ("triton", "scaled_mm")
each_way = pytest.mark.parametrize("way", ["triton", pytest.param("scaled_mm", marks=pytest.mark.slow)])
BLOCKS = {"triton": (ChainedBlock, ChainedDecoderBlock), "scaled_mm": (Fp8Block, Fp8DecoderBlock)}
MORE = {"decoder_depth": 3, "tokens": 3, "qkv_bias": True, "qk_scale": 0.3}
FORMS = {
    "as released": {},
    "a deeper decoder, three class tokens, qkv bias, scaled scores": MORE,
    "no norm after the skips, equal widths": {"skip_post_norm": False, "decoder_embed_dim": 32, "num_classes": 0},
    "a skip whose width FP8 does not take": {"embed_dim": 40},
    "an encoder without blocks, whose decoder has no skips": {"depth": 0},
}


@pytest.fixture
def references(monkeypatch):
    """The operators' references in the place of kernels: Triton's interpreter rounds to 16 and to 8 bits badly."""
    monkeypatch.setattr("epg_fast.ops.registration.interpreting", lambda: False)


def make(kind=EPGViT, **config):
    torch.manual_seed(0)
    return make_model(kind, **{"depth": 2} | config).eval()


def inputs(model, batch=32):
    x, t = torch.randn(batch, 3, 16, 16), torch.linspace(-1500, 1400, batch)
    return (x, t, torch.arange(batch) % 6) if model.num_classes else (x, t)


@torch.no_grad()
def in_fp8(model, arguments, ops):
    x, *rest = arguments
    network = inference_network(model.use_ops(ops), "fp8")
    model.use_ops("plain")
    return network(x.bfloat16(), *rest).float()


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_network_errs_with_the_kernels_as_much_as_with_pytorch(form):
    model = make(**form)
    arguments = inputs(model)
    with torch.no_grad():
        want = model(*arguments)
    errors = {ops: error(in_fp8(model, arguments, {"fp8": ops}), want) for ops in ("plain", *KERNELS)}
    # The same roundings of other values: what they add up to differs by chance, in thousands of outputs by little.
    assert errors["scaled_mm"] == pytest.approx(errors["plain"], rel=0.1)
    assert errors["triton"] < 1.1 * errors["plain"]  # some of its scales are those of fewer values
    with_attention = error(in_fp8(model, arguments, {"fp8": "triton", "attention": "triton"}), want)
    assert 2e-3 < with_attention < 1.1 * errors["plain"]  # and attention's are those of more
    assert error(in_fp8(model, arguments, {"fp8": "triton"}), want) == errors["triton"] > 2e-3


@pytest.mark.slow
def test_use_ops_triton_samples_in_fp8_and_says_what_is_not_asked(log):
    model, options = make(), {"sampler": "onestep"}
    want = epg_fast.sample(model, [0, 1, 2], **options)
    plain = epg_fast.sample(model, [0, 1, 2], precision="fp8", **options)
    log.messages.clear()
    fused = epg_fast.sample(model.use_ops("triton"), [0, 1, 2], precision="fp8", **options)
    assert log.messages[1:] == [
        "precision fp8: 18 linears of the blocks, with a scale per row; sites norm, proj, mlp, skip are not asked"
    ]
    assert 0 < error(fused, want) < 4 * error(plain, want)  # the interpreter's roundings


@pytest.fixture
def calls(monkeypatch):
    """How often the network calls which operation, and the last two arguments of `linear_fp8`."""
    counted = Counter()

    def count(module, name):
        operation = getattr(module, name)

        def call(*args, **kwargs):
            if name == "linear_fp8":
                counted[(name, *args[-2:])] += 1
            counted[name] += 1
            return operation(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    count(blocks, "layer_norm_modulate")
    norms = "layer_norm_modulate_fp8", "gate_residual_norm_modulate_fp8", "gate_residual_norm_modulate"
    for name in (*norms, "skip_norms_fp8", "quantize_rows", "attention_fp8"):
        count(fused_fp8, name)
    for name in ("quantize_rows_ref", "linear_fp8", "linear_fp8_fused"):
        count(fp8, name)
    return counted


@pytest.mark.usefixtures("references")
def test_every_pass_over_the_tokens_that_can_be_shared_is(calls):
    model = make()
    in_fp8(model, inputs(model, 2), {"fp8": "scaled_mm"})
    assert {name: count for name, count in calls.items() if isinstance(name, str)} == {
        "layer_norm_modulate_fp8": 1,  # the first block's
        "gate_residual_norm_modulate_fp8": 4 + 1,  # second norms, and the second block's first
        "gate_residual_norm_modulate": 2,  # final norms
        "skip_norms_fp8": 2,
        "quantize_rows": 2 * 4 + 2,  # attention's outputs, GELUs, skips
        "quantize_rows_ref": 4 * 4 + 2,  # weights, once
        "linear_fp8": 4 * 4 + 2,
    }


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("attention", ["triton", "plain"])
def test_chained_products_leave_one_pass_beside_norms_and_products(calls, attention):
    model = make()
    in_fp8(model, inputs(model, 2), {"fp8": "triton", "attention": attention})
    inside = {"attention_fp8": 4, "linear_fp8_fused": 4 * 4 + 2, "quantize_rows": 1}  # what enters the decoder
    outside = {"linear_fp8": 4, "linear_fp8_fused": 4 * 3 + 2, "quantize_rows": 4 + 1}  # around another attention
    assert {name: count for name, count in calls.items() if isinstance(name, str)} == {
        "layer_norm_modulate_fp8": 2 * 2 + 2,  # both norms of the encoder's blocks, the second of the decoder's
        "layer_norm_modulate": 2,  # final norms
        "skip_norms_fp8": 2,
        "quantize_rows_ref": 4 * 4 + 2,  # weights, once
    } | (inside if attention == "triton" else outside)


@pytest.mark.usefixtures("references")
def test_products_of_the_extension_have_the_gelu_in_them(monkeypatch, calls):
    pretend_gemms_run(monkeypatch, "linear_fp8")
    monkeypatch.setattr(fused_fp8, "require_gemms", lambda op, device: None)
    model = make()
    arguments = inputs(model)
    got = in_fp8(model, arguments, {"fp8": "cuda"})
    assert (calls["linear_fp8", True, "cuda"], calls["linear_fp8", False, "cuda"]) == (4, 14)
    want = in_fp8(model, arguments, {"fp8": "scaled_mm"})
    with torch.no_grad():
        exact = model(*arguments)
    assert error(got, exact) == pytest.approx(error(want, exact), rel=0.1)


def test_products_of_an_extension_that_is_not_there_are_refused_in_a_line(monkeypatch):
    monkeypatch.setattr("epg_fast.ops.extension.extension_status", lambda: (False, "not built"))
    with pytest.raises(ValueError, match="linear_fp8: got backend='cuda'.*but the extension is not built"):
        epg_fast.sample(make().use_ops({"fp8": "cuda"}), [0], sampler="onestep", precision="fp8")


# what is changed, and whether its block then keeps its modules
CHANGED = {
    **dict.fromkeys(("blocks.0", "blocks.0.attn.qkv", "blocks.1.norm2", "blocks.1.drop_path"), True),
    **dict.fromkeys(("decoder_blocks.1", "decoder_blocks.0.mlp.fc1", "decoder_blocks.1.skip_norm"), True),
    **dict.fromkeys(("decoder_blocks.0.skip_linear", "decoder_blocks.0.adaLN_modulation", "norm", "out_norm"), False),
}


@pytest.mark.usefixtures("references")
@each_way
@pytest.mark.parametrize("path", CHANGED)
def test_a_changed_module_is_called_and_its_block_keeps_the_modules_it_had(path, way, log):
    kept = ".".join(path.split(".")[:2]) if CHANGED[path] else None
    how = "hook" if path in (kept, "norm") else "adapter"  # the network asks blocks for more than a call
    model, factor = make(), [1.0]
    arguments = inputs(model)
    with torch.no_grad():
        want = model(*arguments)
    error_before = error(in_fp8(model, arguments, {"fp8": way}), want)
    change(model, path, how, lambda out: factor[0] * out)
    log.messages.clear()
    assert error(in_fp8(model, arguments, {"fp8": way}), want) == pytest.approx(error_before, rel=0.15)
    assert ("; 1 of 4 blocks call their modules" in log.messages[0]) == (kept is not None)
    network = inference_network(model.use_ops({"fp8": way}), "fp8")
    names = {n for n, m in network.named_modules() if isinstance(m, BLOCKS[way])}
    assert names == {f"{half}.{i}" for half in ("blocks", "decoder_blocks") for i in range(2)} - {kept}
    factor[0] = float("nan")
    assert in_fp8(model, arguments, {"fp8": way}).isnan().all()


class Halved(EPGViT):
    def forward(self, x, t, y=None, **options):
        return super().forward(x, t, y, **options) / 2


@pytest.mark.usefixtures("references")
def test_a_subclass_and_a_network_that_encodes_alone_are_computed():
    model = make()
    arguments = inputs(model)
    want = in_fp8(model, arguments, {"fp8": "triton"})
    assert torch.equal(in_fp8(make(Halved), arguments, {"fp8": "triton"}), want / 2)
    x, t, y = arguments
    network = inference_network(model.use_ops({"fp8": "triton"}), "fp8")
    assert error(network.encode(x.bfloat16(), t, y).float(), model.use_ops("plain").encode(x, t, y)) < 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("way", KERNELS)
def test_blocks_and_network_compile_into_one_graph_each(way):
    model = make().use_ops({"fp8": way, "attention": "triton"})
    x, *rest = inputs(model, 3)
    network = inference_network(model, "fp8")
    with torch.no_grad():
        conditioning = network.conditioning(*rest)
        want = network.denoise(x.bfloat16(), conditioning)
        torch.compiler.reset()
        whole = torch.compile(network.denoise, fullgraph=True, backend="aot_eager")
        assert torch.equal(whole(x.bfloat16(), conditioning), want)
        for block in (network.blocks[1], network.decoder_blocks[1]):
            block.compile(fullgraph=True, backend="aot_eager")
        assert torch.equal(network.denoise(x.bfloat16(), conditioning), want)


@pytest.mark.usefixtures("references")
def test_a_cpu_without_fp8_products_multiplies_the_rounded_values(monkeypatch):
    model = make()
    arguments = inputs(model)
    want = in_fp8(model, arguments, {"fp8": "triton"})
    monkeypatch.setattr("epg_fast.ops.fp8.cpu_has_row_scales", lambda: False)
    assert error(in_fp8(model, arguments, {"fp8": "triton"}), want) < 0.01
    network = inference_network(model.use_ops({"fp8": "triton"}), "fp8")
    assert {m.backend for m in network.modules() if isinstance(m, Fp8Linear)} == {"plain"}
