"""Precisions of sampling: what is cast, how far images move, and what happens where hardware lacks one."""

import copy
import functools
import types

import pytest
import torch

import epg_fast
from epg_fast import SamplingEngine
from epg_fast.models import EPGViT
from epg_fast.models.blocks import LayerNorm
from epg_fast.models.fp8 import Fp8Linear, refusal
from epg_fast.runtime import float32_products
from epg_fast.sampling import image_error, precision
from epg_fast.sampling.precision import inference_network
from tests import networks

make_model = functools.partial(networks.make_model, depth=2, decoder_depth=3)


@pytest.mark.parametrize(("name", "bounds"), [("bf16", (1e-4, 2e-3)), ("fp16", (1e-5, 2e-4)), ("fp8", (5e-4, 1e-2))])
def test_every_precision_is_nearly_fp32_and_none_is_fp32(name, bounds):
    model = make_model()
    options = {"sampler": "euler", "steps": 6, "guidance": 1.5, "interval": (0.1, 10.0)}
    want = epg_fast.sample(model, [0, 1, 2, 3], **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    error = image_error(epg_fast.sample(model, [0, 1, 2, 3], precision=name, **options), want)
    assert bounds[0] < error["relative_l2"] < bounds[1]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_weights_are_cast_once_and_norms_stay_in_float32():
    model = make_model()
    network = inference_network(model, "bf16")
    norms = {id(p) for m in network.modules() if isinstance(m, LayerNorm) for p in m.parameters()}
    for own, parameter in zip(network.parameters(), model.parameters(), strict=True):
        if id(own) in norms:
            assert own.dtype == torch.float32 and own.data_ptr() == parameter.data_ptr()
        else:
            assert torch.equal(own, parameter.bfloat16()) and not own.requires_grad
    shared = inference_network(model, "fp32")
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(shared.parameters(), model.parameters(), strict=True))


def test_the_joined_adaln_projection_computes_what_the_blocks_did():
    model = make_model().eval()
    joined = inference_network(model, "bf16")
    apart = make_model().eval()
    apart.load_state_dict(model.state_dict())
    apart.bfloat16()
    t, y = torch.tensor([-500.0, 0.0, 800.0]), torch.tensor([0, 3, 5])
    with torch.no_grad():
        modulations, cond = joined.conditioning(t, y).modulations, apart.conditioning(t, y).cond
        for block, got in zip(apart.decoder_blocks, modulations, strict=True):
            want, linear = block.adaLN_modulation(cond), block.adaLN_modulation[1]
            # bfloat16 rounds each term's condition, then the sum, once more on the one way or the other
            terms = torch.nn.functional.silu(cond).abs() @ linear.weight.abs().T + linear.bias.abs()
            assert ((got - want).abs() <= torch.finfo(torch.bfloat16).eps * (terms + want.abs())).all()
            assert not torch.equal(want, linear.bias.expand_as(want))
    weight = joined._joined_projection[0]
    parts = [block.adaLN_modulation[1].weight for block in joined.decoder_blocks]
    assert torch.equal(torch.cat(parts), weight)
    assert {part.untyped_storage().data_ptr() for part in parts} == {weight.untyped_storage().data_ptr()}  # held once


def test_fp8_is_some_linears_of_the_blocks_beside_which_all_is_bf16(log):
    network = inference_network(make_model(), "fp8")
    names = [name for name, module in network.named_modules() if isinstance(module, Fp8Linear)]
    assert len(names) == 22 and all("blocks." in name and "adaLN" not in name for name in names)
    assert network.out.weight.dtype == network.patch_embed.proj.weight.dtype == torch.bfloat16
    assert log.messages == ["precision fp8: 22 linears of the blocks, with a scale per row"]


def test_an_fp8_linear_rounds_weights_by_channel_and_activations_by_token():
    model = make_model()
    with torch.no_grad():  # scales of one tensor or of the other axis would lose the small rows
        model.blocks[0].mlp.fc1.weight *= torch.logspace(-3, 3, 128)[:, None]
    linear = inference_network(model, "fp8").blocks[0].mlp.fc1
    x = torch.randn(7, 32) * torch.logspace(-2, 2, 7)[:, None]

    def rounded(rows):
        scale = rows.double().abs().amax(1, keepdim=True) / 448
        return (rows / scale).float().to(torch.float8_e4m3fn).double() * scale

    weight, bias = model.blocks[0].mlp.fc1.weight.detach(), model.blocks[0].mlp.fc1.bias.detach().bfloat16()
    want = rounded(x.bfloat16()) @ rounded(weight).T + bias.double()
    assert torch.linalg.vector_norm((linear(x.bfloat16()) - want) / want.abs().amax(0), dim=0).max() < 0.02


def test_precisions_that_the_device_lacks_give_way_and_say_so(log, monkeypatch):
    model = make_model()
    engine = SamplingEngine(model, steps=3, precision="tf32")
    assert engine.precision == "fp32"
    assert log.messages == ["precision tf32: a CPU has no TF32 products; computing in fp32"]
    assert torch.equal(engine([0]), epg_fast.sample(model, [0], steps=3))
    log.messages.clear()
    monkeypatch.setattr(precision, "_name", lambda device: "an old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    refusal.cache_clear()
    assert precision.available_precision("tf32", torch.device("cuda")) == "tf32"
    assert precision.available_precision("fp8", torch.device("cuda")) == "bf16"
    assert len(log.messages) == 1
    assert "got an old GPU of compute capability 8.0, wanted a GPU that multiplies FP8" in log.messages[0]
    assert log.messages[0].endswith("; computing in bf16")


def test_fp8_on_a_cpu_without_such_a_product_shows_its_numbers(monkeypatch, log):
    model = make_model()
    options = {"sampler": "onestep", "precision": "fp8"}
    want = epg_fast.sample(model, [0, 1], **options)
    monkeypatch.setattr("epg_fast.ops.fp8.cpu_has_row_scales", lambda: False)
    log.messages.clear()
    got = epg_fast.sample(model, [0, 1], **options)
    assert "float32 products of the rounded values" in log.messages[0]
    assert image_error(got, want)["relative_l2"] < 1e-2


def test_tf32_is_switched_for_the_time_of_a_batch_only():
    def state():
        cudnn = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.conv.fp32_precision

    before = state()
    for tf32, want in ((True, ("high", True)), (False, ("highest", False))):
        with float32_products(tf32):
            assert state()[:2] == want
        assert state() == before
    # PyTorch's older interface raises for one who has used the newer
    matmul, model = torch.backends.cuda.matmul, make_model()
    want, before = epg_fast.sample(model, [0], steps=3), matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert torch.equal(epg_fast.sample(model, [0], steps=3), want)
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_models_in_other_precisions_are_sampled():
    model = make_model()
    want = epg_fast.sample(model, [0, 1, 2], sampler="onestep")
    for dtype, bound in ((torch.float64, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.02)):
        got = epg_fast.sample(copy.deepcopy(model).to(dtype), [0, 1, 2], sampler="onestep")
        assert got.dtype == torch.float32 and 0 < (got - want).abs().mean() < bound


def test_autocast_around_it_is_obeyed_in_fp32_alone():
    model = make_model()
    want = epg_fast.sample(model, [0, 1], sampler="onestep")
    half = epg_fast.sample(model, [0, 1], sampler="onestep", precision="fp16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = epg_fast.sample(model, [0, 1], sampler="onestep")
        assert torch.equal(epg_fast.sample(model, [0, 1], sampler="onestep", precision="fp16"), half)
    assert 0 < image_error(got, want)["relative_l2"] < 0.02


class Recorder:
    calls = 0

    def hook(self, module, args, out):
        self.calls += 1
        return out * 0


class Shifted(EPGViT):
    def forward(self, x, t, y):
        return super().forward(x, t, y) + 0.25


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8"])
def test_hooks_and_replaced_forwards_of_the_network_and_inside_it_are_called(name):
    """Those of the caller's own objects, where a copy of everything would call a copy of these."""
    options = {"sampler": "onestep", "precision": name}
    model, recorder = make_model(), Recorder()
    plain = epg_fast.sample(model, [0, 1], **options)
    handle = model.blocks[1].attn.qkv.register_forward_hook(recorder.hook)
    hooked = epg_fast.sample(model, [0, 1], **options)
    assert recorder.calls == 1 and not torch.equal(hooked, plain)
    handle.remove()
    qkv = model.blocks[1].attn.qkv
    qkv.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 0, qkv)
    assert torch.equal(epg_fast.sample(model, [0, 1], **options), hooked)
    del qkv.forward
    adaptation = model.decoder_blocks[0].adaLN_modulation[1]
    adaptation.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 0, adaptation)
    assert not torch.equal(epg_fast.sample(model, [0, 1], **options), plain)
    del adaptation.forward
    handle = model.register_forward_hook(lambda module, args, out: out + 0.25)
    shifted = epg_fast.sample(model, [0, 1], **options)
    handle.remove()
    assert (shifted - plain).mean() > 0.05
    model.__class__ = Shifted
    assert torch.equal(epg_fast.sample(model, [0, 1], **options), shifted)
    model.forward = types.MethodType(lambda self, *args: EPGViT.forward(self, *args) * 0, model)
    assert epg_fast.sample(model, [0, 1], **options).flatten(2).std(dim=2).max() < 1e-6


def test_a_forward_of_something_else_is_refused_where_weights_are_cast():
    model = make_model().eval()
    fc1 = model.blocks[0].mlp.fc1
    fc1.forward = lambda x: torch.nn.functional.linear(x, fc1.weight, fc1.bias)
    epg_fast.sample(model, [0], sampler="onestep")
    with pytest.raises(ValueError, match="a Linear has a forward that belongs to something else.*want precision fp32"):
        epg_fast.sample(model, [0], sampler="onestep", precision="bf16")


class Adapter(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.register_buffer("delta", 0.01 * torch.randn(linear.out_features, linear.in_features))

    def forward(self, x):
        return self.linear(x) + torch.nn.functional.linear(x, self.delta)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_weight_norm_and_adapters_with_buffers_are_cast_like_the_rest():
    model = make_model()
    torch.nn.utils.weight_norm(model.blocks[0].mlp.fc1)
    model.blocks[1].attn.proj = Adapter(model.blocks[1].attn.proj)
    want = epg_fast.sample(model, [0, 1], sampler="onestep")
    for name in ("bf16", "fp8"):
        error = image_error(epg_fast.sample(model, [0, 1], sampler="onestep", precision=name), want)
        assert 0 < error["relative_l2"] < 0.02


def test_the_error_of_images_is_what_its_formulas_say():
    reference = torch.full((2, 3, 4, 4), 0.5)
    images = reference + 0.01
    error = image_error(images, reference)
    assert error["psnr_db"] == pytest.approx(40.0, abs=1e-4)
    assert error["relative_l2"] == pytest.approx(0.02, rel=1e-4)
    assert image_error(reference, reference) == {"relative_l2": 0.0, "psnr_db": float("inf")}
    black = torch.zeros_like(reference)
    assert image_error(black, black)["relative_l2"] == 0 and image_error(images, black)["relative_l2"] == float("inf")
    with pytest.raises(ValueError, match="want the same"):
        image_error(images, reference[:1])
