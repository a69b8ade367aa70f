"""One switch for the networks' operations: the same results, the same checkpoints, one graph, with any backend."""

import copy
import functools
import json
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from epg_fast.__main__ import main
from epg_fast.diffusion import NoiseSchedule
from epg_fast.models import EPGViT, RCMViT
from epg_fast.models import fused as fused_models
from epg_fast.objectives import consistency_loss, denoising_loss
from epg_fast.plans.sites import PLAIN
from tests.commands import fails
from tests.networks import change, make_model

pytest.importorskip("triton")
SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 4}
DECODER = {"decoder_embed_dim": 40}
HEAD = {"hidden_dim": 32, "output_dim": 16}
MORE = {"decoder_depth": 3, "tokens": 3, "qkv_bias": True, "qk_scale": 0.3}
FORMS = {
    "as released": {},
    "a deeper decoder, three class tokens, qkv bias, scaled scores": MORE,
    "no norm after the skips, equal widths": {"skip_post_norm": False, "decoder_embed_dim": 48, "num_classes": 0},
    "checkpointing, projection dropout, stochastic depth": {"use_checkpoint": True, "drop": 0.5, "drop_path": 0.3},
    "an encoder without blocks": {"depth": 0, "decoder_depth": 1},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter rounds to bfloat16 badly
NORMS_WITHIN = {"norm": "prologue", "attention": "plain"}
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def make(cls=EPGViT, **config):
    return make_model(cls, **SIZES | (DECODER if issubclass(cls, EPGViT) else HEAD) | config).to(DEVICE)


def inputs(model, batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 16, 16, generator=generator).to(DEVICE)
    t = torch.tensor([-1500.0, 3.0, 1400.0])[:batch].to(DEVICE)
    labelled = isinstance(model, EPGViT) and model.num_classes
    return (x, t, torch.tensor([0, 5, 2])[:batch].to(DEVICE)) if labelled else (x, t)


def outputs_and_gradients(model, arguments):
    """Of parameters and of the image."""
    torch.manual_seed(2)
    x, *rest = arguments
    x = x.clone().requires_grad_()
    out = model(x, *rest)
    out = out if isinstance(out, torch.Tensor) else torch.cat([o.flatten() for o in out])
    out.square().mean().backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}


def computes_the_same(plain, ops, batch=2, gradients=True):
    """The network with these operations, once its results are those of the plain one."""
    fused, results = copy.deepcopy(plain).use_ops(ops), []
    for model in (plain, fused):
        if gradients:
            results.append(outputs_and_gradients(model, inputs(plain, batch)))
        else:
            torch.manual_seed(2)
            with torch.no_grad():
                results.append(model(*inputs(plain, batch)))
    close(results[1], results[0])
    return fused


CASES = [
    # the first form is that of the recorded data, and one without skips has fewer kernels
    *((EPGViT, {"depth": 1} | form, "triton") for form in [*FORMS.values()][1:4]),
    (EPGViT, FORMS["an encoder without blocks"], "triton"),
    (RCMViT, {}, "triton"),
    *(
        (EPGViT, {"depth": 1}, ops)
        for ops in (
            {"norm": "triton", "embedding": "triton"},
            {"attention": "triton", "condition": "triton"},
            {"proj": "triton", "skip": "triton"},
            {"proj": "norm", "mlp": "triton"},
            {"encoder.attention": "math", "decoder.mlp": "triton", "decoder.norm": "triton"},
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "form", "ops"), CASES, ids=str)
def test_every_form_and_every_site_alone_and_mixtures_compute_the_same(cls, form, ops):
    plain = make(cls, **form)
    fused = computes_the_same(plain, ops)
    names = {ops} if isinstance(ops, str) else {*ops.values()}
    assert {*fused.ops.values()} == {"plain", *names}
    fused.use_ops("plain")
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]


@pytest.mark.parametrize("form", [pytest.param(f, marks=[pytest.mark.slow] * (i > 0)) for i, f in enumerate(FORMS)])
def test_norms_within_products_compute_the_same_and_a_pass_with_gradients_does_without(form, monkeypatch):
    plain, products = make(**FORMS[form]).eval(), []
    product = fused_models.norm_linear
    monkeypatch.setattr(fused_models, "norm_linear", lambda *given: products.append(given) or product(*given))
    computes_the_same(plain, NORMS_WITHIN, gradients=False)
    encoder, decoder = len(plain.blocks), len(plain.decoder_blocks)
    # of two norms each; the first has no statistics of its rows, nor has one behind a skip; and of the last norm
    assert len(products) == 2 * (encoder + decoder) - 1 - min(encoder, decoder) + 1
    computes_the_same(plain, NORMS_WITHIN)


@pytest.mark.parametrize("path", ["blocks.1", "decoder_blocks.2", "encoder.norm", "decoder.norm"])
def test_norms_within_products_meet_blocks_without(path):
    """One that drops, in training mode, behind one that leaves statistics; and those of the other half."""
    if path.endswith("norm"):
        computes_the_same(make(depth=1).eval(), {path: "prologue"}, batch=1, gradients=False)
    else:
        plain = make(decoder_depth=3, drop=0.5).eval()
        plain.get_submodule(path).train()
        computes_the_same(plain, NORMS_WITHIN, batch=1, gradients=False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["autocast", "pure 16-bit"])
def test_the_kernels_are_one_graph_in_16_bits_and_as_accurate(mode):
    model = make().eval().requires_grad_(False)
    arguments, errors, dtypes = inputs(model), [], set()
    want = model(*arguments)
    for ops in ("plain", "triton", NORMS_WITHIN):
        network = copy.deepcopy(model).use_ops(ops)
        network = network.to(HALF) if mode == "pure 16-bit" else network
        x, *rest = (arguments[0].to(network.dtype), *arguments[1:])
        with torch.no_grad(), torch.autocast(DEVICE, HALF, enabled=mode == "autocast"):
            got = network(x, *rest)
            if ops == NORMS_WITHIN:
                torch.compiler.reset()
                assert torch.equal(torch.compile(network, backend="aot_eager", fullgraph=True)(x, *rest), got)
        dtypes.add(got.dtype)
        errors.append(((got.float() - want).norm() / want.norm()).item())
    assert len(dtypes) == 1 and max(errors[1:]) < 2 * errors[0] < 0.1


# A form, operations, and the extension's products that they take
MLP, ROW = {"linear_gelu_out", "linear_gate_residual_out", "linear_dgelu_out"}, {"linear_gate_residual_out"}
MIXTURE = {"decoder.mlp": "cuda", "encoder.mlp": "plain", "proj": "cuda", "skip": "cuda"}
PRODUCTS = [
    ("as released", {"mlp": "cuda"}, MLP),
    ("as released", {"proj": "cuda"}, ROW),
    ("as released", {"skip": "cuda"}, {"skip_linear_out"}),
    ("no norm after the skips, equal widths", MIXTURE, MLP | {"skip_linear_out"}),
]


@pytest.mark.parametrize("form, ops, products", PRODUCTS, ids=[" ".join(case[1]) for case in PRODUCTS])
def test_products_of_the_extension_compute_the_same_in_bfloat16(form, ops, products, gemms):
    """Output within twice the error that PyTorch makes in bfloat16, gradients together within three times theirs."""
    plain = make(**FORMS[form])
    arguments = inputs(plain)
    exact, exact_gradients = outputs_and_gradients(copy.deepcopy(plain), arguments)
    errors = []
    for chosen in ("plain", ops):
        with torch.autocast(DEVICE, torch.bfloat16):
            out, gradients = outputs_and_gradients(copy.deepcopy(plain).use_ops(chosen), arguments)
        assert gradients.keys() == exact_gradients.keys()
        each = [(gradients[name] - g).norm() / g.norm() for name, g in exact_gradients.items()]
        errors.append(((out - exact).norm(), torch.stack(each).norm()))
    assert errors[1][0] < 2 * errors[0][0] and errors[1][1] < 3 * errors[0][1]
    assert errors[0][0] < 0.05 * exact.norm()
    assert DEVICE == "cuda" or {*gemms} == products


class MeanOfTokens(RCMViT):
    def encode(self, x, t):
        x = self.trunk.embed(self, x, self._prefix(self._condition(t, None)[0], None))
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)


@pytest.mark.parametrize(
    ("cls", "drop", "kept"), [(RCMViT, 0.0, 1), (MeanOfTokens, 0.0, 6), (RCMViT, 0.5, 1)], ids=["", "own", "drop"]
)
def test_a_feature_is_computed_without_the_tokens_that_it_does_not_need_behind_the_last_attention(cls, drop, kept):
    """A network that encodes its own way needs all; dropout is drawn for all."""
    plain = make(cls, drop=drop).train()
    fused, seen = copy.deepcopy(plain).use_ops({"norm": "triton"}), []
    for block in fused.blocks:
        block.register_forward_hook(lambda block, given, result: seen.append(result.shape[1]))
    features = []
    for network in (plain, fused):
        torch.manual_seed(0)
        features.append(network.encode(*inputs(plain)[:2]))
    close(features[1], features[0])
    assert seen == [fused.extras + fused.num_patches, kept]
    assert fused.drops_tokens == (kept == 1 and not drop)  # by which FLOPs are counted
    assert fused.eval().drops_tokens == (kept == 1)


def test_the_switch_changes_no_parameter_and_can_be_turned_back():
    model = make()
    state, arguments = copy.deepcopy(model.state_dict()), inputs(model)
    before = model(*arguments)
    assert model.use_ops("triton") is model
    assert {backend for module in model.modules() for backend in getattr(module, "ops", {}).values()} == {
        "plain",  # the optimiser and the sampler's steps, which are no part of a network
        "triton",
    }
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(model.use_ops("plain")(*arguments), before)
    assert make().ops == PLAIN
    with pytest.raises(ValueError, match="ops 'cublas'.*: want auto, plain, triton, cuda, tune"):
        model.use_ops("cublas")
    for ops, message in (
        ({"atention": "triton"}, "got site 'atention' .did you mean 'attention'"),
        ({"mlp": "cudnn"}, "got mlp='cudnn', want one of plain, triton, cuda"),
        ({"norm": "cuda"}, "got norm='cuda', want one of plain, triton"),
        (["triton"], r"ops \['triton'\]: want a name such as 'triton', or sites with their backends"),
    ):
        with pytest.raises(ValueError, match=message):
            model.use_ops(ops)


CHANGED = [
    *("patch_embed.proj", "blocks.0.mlp.fc1", "blocks.1.norm2", "norm", "decoder_blocks.0.norm1"),
    *("decoder_blocks.0.skip_norm", "decoder_blocks.0.skip_linear", "decoder_blocks.1.attn"),
    *("decoder_blocks.1.attn.qkv", "decoder_blocks.0.adaLN_modulation", "decoder_blocks.0.adaLN_modulation.1"),
]


def changes():
    for how in ("adapter", "hook"):
        for path in CHANGED[how == "hook" :: 2]:
            # the interpreter computes up to the changed module
            late = "decoder_blocks" in path and "adaLN" not in path
            yield pytest.param(how, path, marks=pytest.mark.slow if late else ())


@pytest.mark.parametrize(("how", "path"), changes())
def test_a_changed_module_has_its_effect_or_is_refused(how, path):
    model = make().eval()
    arguments = inputs(model, 1)
    before = model(*arguments)
    change(model, path, how, lambda out: out.flip(-1))
    changed = model(*arguments)
    assert not torch.allclose(changed, before, rtol=1e-3)
    if "adaLN" in path:
        torch.testing.assert_close(model.use_ops("triton")(*arguments), changed, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="in the place of a plain .* would bypass; use ops='plain'"):
            model.use_ops("triton")(*arguments)


def test_a_reparametrised_adaln_projection_is_not_read_behind_its_back():
    model = make().eval()
    linear = torch.nn.utils.weight_norm(model.decoder_blocks[0].adaLN_modulation[1])
    before = model(*inputs(model))
    linear.weight_g.data.mul_(2)
    assert not torch.allclose(model(*inputs(model)), before, rtol=1e-3)


def test_a_plain_block_is_a_function_of_one_tensor_and_hooks_see_tensors():
    model, seen = make(), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
    model(*inputs(model))
    called = {name for name, _ in model.named_modules() if name.count(".") < 2} - {"blocks", "decoder_blocks"}
    assert called | {"norm", "blocks.0.norm2", "decoder_blocks.1.adaLN_modulation"} <= set(seen)
    assert all(isinstance(out, torch.Tensor) for out in seen.values())


class Halved(EPGViT):
    def forward(self, *arguments, **options):
        return super().forward(*arguments, **options) / 2


@pytest.mark.parametrize("cls", [EPGViT, Halved])
def test_an_objective_gives_the_same_in_patches_as_for_a_function_that_makes_images(cls):
    """A network with its own forward is trained on images, too."""
    model = make(cls, decoder_depth=1)
    x, _, y = inputs(model)
    noise, sigma = torch.randn_like(x), torch.tensor([0.3, 1.0, 20.0], device=DEVICE)
    for loss in (
        lambda m: denoising_loss(m, x, noise, y, sigma, NoiseSchedule(), parameterization="edm"),
        lambda m: denoising_loss(m, x, noise, y, sigma, NoiseSchedule()),
        lambda m: consistency_loss(m, x, noise, y, sigma, sigma * 0.9, 2, NoiseSchedule()),
        lambda m: consistency_loss(m, x, noise, y, sigma, sigma * 0.9, 0, NoiseSchedule()),
    ):
        result, in_images = loss(model), loss(lambda *a: EPGViT.forward(model, *a) / (2 if cls is Halved else 1))
        torch.testing.assert_close(result.per_sample, in_images.per_sample, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.terms, in_images.terms, rtol=1e-5, atol=1e-6)


def test_a_subclass_stays_one_and_keeps_its_forward_with_the_fused_kernels():
    model = make(Halved, decoder_depth=1).eval()
    want = model(*inputs(model))
    fused = pickle.loads(pickle.dumps(model.use_ops("triton")))
    close(fused(*inputs(model)), want)
    assert type(fused) is type(model) is Halved


@pytest.mark.slow
def test_one_graph_serves_every_batch_size_and_its_gradients_are_the_same():
    model = make(depth=1, decoder_depth=1).use_ops("triton")
    x, t, y = inputs(model)
    wanted = outputs_and_gradients(copy.deepcopy(model), (x, t, y))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    out = compiled(x, t, y)
    out.square().mean().backward()
    torch.testing.assert_close(out, wanted[0], rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[1][name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(x[:2], t[:2], y[:2]), model(x[:2], t[:2], y[:2]), rtol=1e-4, atol=1e-4)


def test_autocast_leaves_float64_alone():
    model = make().double()
    x, t, y = inputs(model)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = model(x.double(), t.double(), y)
    torch.testing.assert_close(out, model(x.double(), t.double(), y))


def test_what_the_kernels_cannot_take_is_refused_in_a_line_and_a_derivative_that_they_have_not_is_not_zero():
    model = make().use_ops("triton")
    x, t, y = inputs(model)
    derivatives = "torch.func.jvp or torch.func.grad.*use backend='plain'"
    for call, message in (
        (lambda: model(x[:0], t[:0], y[:0]), r"got an empty tensor of shape \(0,\)"),
        (lambda: model(x.to(torch.uint8), t, y), "got an image in torch.uint8, want normalised floating pixels"),
        (lambda: torch.func.jvp(lambda x: model(x, t, y), (x,), (x,)), derivatives),
        (lambda: torch.func.grad(lambda x: model(x, t, y).sum())(x), derivatives),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("joined", [False, True])
def test_the_modulations_of_all_decoder_blocks_are_one_product_where_their_weights_need_no_copy(joined):
    """On a GPU a copy pays too; on a CPU it takes longer than the products of one image."""

    class Products(TorchDispatchMode):
        shapes, copied = [], 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in str(function):
                self.shapes.append(tuple(args[-1].shape))
            out = function(*args, **(kwargs or {}))
            self.copied += "cat" in str(function) and out.shape == (2 * 6 * 40, 48)
            return out

    model = make()
    if joined:
        model.join_projection()
    with torch.no_grad(), Products() as products:
        model(*inputs(model))
    at_once = joined or DEVICE == "cuda"
    assert products.shapes.count((48, 2 * 6 * 40)) == at_once
    assert products.shapes.count((48, 6 * 40)) == 2 * (not at_once)
    assert products.copied == (at_once and not joined)


@pytest.mark.slow
def test_training_on_the_command_line_takes_the_switch_and_says_without_a_gpu_that_it_cannot(
    tiny_run, tmp_path, monkeypatch, capsys
):
    flags = [*tiny_run[:2], "--config", "digits_diffusion", *tiny_run[2:], "--steps", "2", "--batch_size", "2"]
    command = ["finetune-diffusion", *flags, "--preview.every", "0"]
    for ops in ("plain", "triton"):
        assert main([*command, "--outdir", str(tmp_path / ops), "--ops", ops]) == 0
    lines = [(tmp_path / ops / "metrics.jsonl").read_text().splitlines() for ops in ("plain", "triton")]
    losses = [[json.loads(line)["loss"] for line in run] for run in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        fails(capsys, [*command, "--ops", "triton", "--outdir", tmp_path / "run"], "wanted one on a CUDA device")
        assert not (tmp_path / "run").exists()
