"""One switch for the networks' operations: the same results, the same checkpoints, one graph, with any backend."""

import copy
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from epg_fast.__main__ import main
from epg_fast.diffusion import NoiseSchedule
from epg_fast.models import EPGViT, RCMViT
from epg_fast.models import fused as fused_models
from epg_fast.objectives import consistency_loss, denoising_loss
from epg_fast.plans.sites import PLAIN, SITES
from tests.commands import fails

pytest.importorskip("triton")
SIZES = {"image_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
DECODER = {"decoder_depth": 2, "decoder_embed_dim": 40, "decoder_num_heads": 2, "num_classes": 5}
MORE = {"decoder_depth": 3, "tokens": 3, "qkv_bias": True, "qk_scale": 0.3}
FORMS = {
    "as released": {},
    "a deeper decoder, three class tokens, qkv bias, scaled scores": MORE,
    "no norm after the skips, equal widths": {"skip_post_norm": False, "decoder_embed_dim": 48, "num_classes": 0},
    "checkpointing, projection dropout, stochastic depth": {"use_checkpoint": True, "drop": 0.5, "drop_path": 0.3},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter rounds to bfloat16 badly


def make(cls=EPGViT, **config):
    model = cls(**(SIZES | config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.to(DEVICE)


def inputs(model, batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 16, 16, generator=generator).to(DEVICE)
    t = torch.tensor([-1500.0, 3.0, 1400.0])[:batch].to(DEVICE)
    labelled = isinstance(model, EPGViT) and model.num_classes
    return (x, t, torch.tensor([0, 5, 2])[:batch].to(DEVICE)) if labelled else (x, t)


def outputs_and_gradients(model, arguments):
    torch.manual_seed(2)
    out = model(*arguments)
    out = out if isinstance(out, torch.Tensor) else torch.cat([o.flatten() for o in out])
    out.square().mean().backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("form", [*FORMS][1:])
def test_the_generator_computes_the_same_with_the_fused_kernels(form):
    """The first form is that of the recorded data."""
    plain = make(**DECODER | {"depth": 1} | FORMS[form])
    fused = copy.deepcopy(plain).use_ops("triton")
    x, *rest = inputs(plain, 2)
    images = [x.clone().requires_grad_() for _ in range(2)]
    results = [outputs_and_gradients(m, (image, *rest)) for m, image in zip((plain, fused), images, strict=True)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(images[1].grad, images[0].grad, rtol=1e-4, atol=1e-5)


MIXED = [
    {"norm": "triton", "embedding": "triton"},
    {"attention": "triton", "condition": "triton"},
    {"proj": "triton", "skip": "triton"},
    {"proj": "norm", "mlp": "triton"},
    {"encoder.attention": "math", "decoder.mlp": "triton", "decoder.norm": "triton"},
]


@pytest.mark.slow
@pytest.mark.parametrize("ops", MIXED, ids=str)
def test_every_site_alone_and_mixtures_compute_the_same(ops):
    plain = make(**DECODER | {"depth": 1})
    mixed = copy.deepcopy(plain).use_ops(ops)
    assert {site: backend for site, backend in mixed.ops.items() if backend != "plain"}.keys() >= {*ops} & {*SITES}
    results = [outputs_and_gradients(model, inputs(plain, 2)) for model in (plain, mixed)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert type(mixed.use_ops("plain")) is EPGViT and type(mixed.blocks[0]) is type(plain.blocks[0])


NORMS_WITHIN = {"norm": "prologue", "attention": "plain"}


@pytest.mark.parametrize("form", [pytest.param(f, marks=[pytest.mark.slow] * (i > 0)) for i, f in enumerate(FORMS)])
def test_norms_within_products_compute_the_same_and_a_pass_with_gradients_does_without(form, monkeypatch):
    plain = make(**DECODER | {"depth": 2} | FORMS[form]).eval()
    fused = copy.deepcopy(plain).use_ops(NORMS_WITHIN)
    arguments, products = inputs(plain, 2), []
    product = fused_models.norm_linear
    monkeypatch.setattr(fused_models, "norm_linear", lambda *given: products.append(given) or product(*given))
    with torch.no_grad():
        want, got = plain(*arguments), fused(*arguments)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    skips = min(2, len(plain.decoder_blocks))
    # of two norms each; the first has no statistics of its rows, nor has one behind a skip; and of the last norm
    assert len(products) == 2 * (2 + len(plain.decoder_blocks)) - 1 - skips + 1
    results = [outputs_and_gradients(model, arguments) for model in (plain, fused)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_norms_within_products_of_one_half_compute_the_same(half):
    plain = make(**DECODER | {"depth": 1}).eval()
    fused = copy.deepcopy(plain).use_ops({f"{half}.norm": "prologue"})
    with torch.no_grad():
        want, got = (network(*inputs(plain, 1)) for network in (plain, fused))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["blocks.1", "decoder_blocks.2"])
def test_a_block_in_training_mode_drops_behind_one_that_leaves_statistics(path):
    plain = make(**DECODER | {"decoder_depth": 3, "drop": 0.5}).eval()
    plain.get_submodule(path).train()
    results = []
    for network in (plain, copy.deepcopy(plain).use_ops(NORMS_WITHIN)):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(network(*inputs(plain, 1)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ops", ["triton", NORMS_WITHIN], ids=str)
def test_a_generator_whose_encoder_has_no_blocks_has_no_skips(ops):
    plain = make(**DECODER | {"depth": 0, "decoder_depth": 1}).eval()
    fused = copy.deepcopy(plain).use_ops(ops)
    with torch.no_grad():
        want, got = (network(*inputs(plain, 1)) for network in (plain, fused))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["autocast", "pure 16-bit"])
def test_norms_within_products_are_one_graph_in_16_bits_and_as_accurate(mode):
    model = make(**DECODER).eval().requires_grad_(False)
    arguments, errors = inputs(model), []
    want = model(*arguments)
    for ops in ("plain", NORMS_WITHIN):
        network = copy.deepcopy(model).use_ops(ops)
        network = network.to(HALF) if mode == "pure 16-bit" else network
        x, *rest = (arguments[0].to(network.dtype), *arguments[1:])
        with torch.no_grad(), torch.autocast(DEVICE, HALF, enabled=mode == "autocast"):
            got = network(x, *rest)
            torch.compiler.reset()
            assert torch.equal(torch.compile(network, backend="aot_eager", fullgraph=True)(x, *rest), got)
        errors.append(((got.float() - want).norm() / want.norm()).item())
    assert errors[1] < 2 * errors[0] < 0.1


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
    plain = make(**DECODER | FORMS[form])
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


@pytest.mark.slow
def test_the_encoder_computes_the_same_with_the_fused_kernels():
    plain = make(RCMViT, hidden_dim=32, output_dim=16)
    fused = copy.deepcopy(plain).use_ops("triton")
    results = [outputs_and_gradients(model, inputs(plain)) for model in (plain, fused)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_feature_is_computed_without_the_other_tokens_behind_the_last_attention():
    plain = make(RCMViT, hidden_dim=32, output_dim=16)
    fused, seen = copy.deepcopy(plain).use_ops({"norm": "triton"}), []
    for block in fused.blocks:
        block.register_forward_hook(lambda block, given, result: seen.append(result.shape[1]))
    x, t = inputs(plain)[:2]
    torch.testing.assert_close(fused.encode(x, t), plain.encode(x, t), rtol=1e-4, atol=1e-5)
    assert set(seen[:-1]) <= {fused.extras + fused.num_patches} and seen[-1] == 1


class MeanOfTokens(RCMViT):
    def encode(self, x, t):
        x = self._embed(x, self._prefix(self._condition(t, None)[0], None))
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)


def test_a_network_that_encodes_its_own_way_has_all_tokens_of_the_last_block():
    plain = make(MeanOfTokens, hidden_dim=32, output_dim=16)
    fused = copy.deepcopy(plain).use_ops({"norm": "triton"})
    x, t = inputs(plain)[:2]
    torch.testing.assert_close(fused.encode(x, t), plain.encode(x, t), rtol=1e-4, atol=1e-5)
    assert not fused.drops_tokens


def test_dropout_is_drawn_for_all_tokens_of_the_last_block():
    plain = make(RCMViT, hidden_dim=32, output_dim=16, drop=0.5).train()
    fused = copy.deepcopy(plain).use_ops({"norm": "triton"})
    results = []
    for network in (plain, fused):
        torch.manual_seed(0)
        results.append(network.encode(*inputs(plain)[:2]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert not fused.drops_tokens and fused.eval().drops_tokens  # by which FLOPs are counted


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["autocast", "pure 16-bit"])
def test_fused_kernels_run_in_16_bit_as_the_plain_path_does(mode):
    model = make(**DECODER).eval().requires_grad_(False)
    x, t, y = inputs(model)
    want = model(x, t, y)
    errors = {}
    for ops in ("plain", "triton"):
        if mode == "autocast":
            with torch.autocast(DEVICE, HALF):
                got = copy.deepcopy(model).use_ops(ops)(x, t, y)
        else:
            got = copy.deepcopy(model).use_ops(ops).to(HALF)(x.to(HALF), t, y)
        errors[ops] = ((got.float() - want).norm() / want.norm()).item()
        dtypes = errors.setdefault("dtypes", set())
        dtypes.add(got.dtype)
    assert len(errors["dtypes"]) == 1
    assert errors["triton"] < 2 * errors["plain"] < 0.1


def test_an_objective_gives_the_same_in_patches_as_for_a_function_that_makes_images():
    model = make(**DECODER)
    x, _, y = inputs(model)
    noise, sigma = torch.randn_like(x), torch.tensor([0.3, 1.0, 20.0], device=DEVICE)

    def function(*arguments):
        return model(*arguments)

    for loss in (
        lambda m: denoising_loss(m, x, noise, y, sigma, NoiseSchedule(), parameterization="edm"),
        lambda m: denoising_loss(m, x, noise, y, sigma, NoiseSchedule()),
        lambda m: consistency_loss(m, x, noise, y, sigma, sigma * 0.9, 2, NoiseSchedule()),
        lambda m: consistency_loss(m, x, noise, y, sigma, sigma * 0.9, 0, NoiseSchedule()),
    ):
        in_patches, in_images = loss(model), loss(function)
        torch.testing.assert_close(in_patches.per_sample, in_images.per_sample, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(in_patches.terms, in_images.terms, rtol=1e-5, atol=1e-6)


def test_the_switch_changes_no_parameter_and_can_be_turned_back():
    model = make(**DECODER)
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
    assert EPGViT(**SIZES, **DECODER).ops == PLAIN
    with pytest.raises(ValueError, match="ops 'cublas'.*: want auto, plain, triton, cuda, tune"):
        model.use_ops("cublas")
    for ops, message in (
        ({"atention": "triton"}, "got site 'atention' .did you mean 'attention'"),
        ({"mlp": "cudnn"}, "got mlp='cudnn', want one of plain, triton, cuda"),
        ({"norm": "cuda"}, "got norm='cuda', want one of plain, triton"),
    ):
        with pytest.raises(ValueError, match=message):
            model.use_ops(ops)


class Adapter(torch.nn.Module):
    """Changes what a module computes, and shows its parameters, as adapters do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args).flip(-1)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


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
    model = make(**DECODER).eval()
    arguments = inputs(model, 1)
    before = model(*arguments)
    if how == "adapter":
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Adapter(model.get_submodule(path)))
    else:
        model.get_submodule(path).register_forward_hook(lambda module, args, out: out.flip(-1))
    changed = model(*arguments)
    assert not torch.allclose(changed, before, rtol=1e-3)
    if "adaLN" in path:
        torch.testing.assert_close(model.use_ops("triton")(*arguments), changed, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="in the place of a plain .* would bypass; use ops='plain'"):
            model.use_ops("triton")(*arguments)


def test_a_reparametrised_adaln_projection_is_not_read_behind_its_back():
    model = make(**DECODER).eval()
    linear = torch.nn.utils.weight_norm(model.decoder_blocks[0].adaLN_modulation[1])
    before = model(*inputs(model))
    linear.weight_g.data.mul_(2)
    assert not torch.allclose(model(*inputs(model)), before, rtol=1e-3)


def test_a_plain_block_is_a_function_of_one_tensor_and_hooks_see_tensors():
    model, seen = make(**DECODER), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
    model(*inputs(model))
    called = {name for name, _ in model.named_modules() if name.count(".") < 2} - {"blocks", "decoder_blocks"}
    assert called | {"norm", "blocks.0.norm2", "decoder_blocks.1.adaLN_modulation"} <= set(seen)
    assert all(isinstance(out, torch.Tensor) for out in seen.values())


class Halved(EPGViT):
    def forward(self, *arguments, **options):
        return super().forward(*arguments, **options) / 2


def test_a_network_with_its_own_forward_is_trained_on_images_and_keeps_it_with_the_fused_kernels():
    model = make(Halved, **DECODER | {"decoder_depth": 1})
    x, t, y = inputs(model)
    noise, sigma = torch.randn_like(x), torch.tensor([0.3, 1.0, 20.0], device=DEVICE)
    for loss in (denoising_loss, lambda *a: consistency_loss(*a[:5], a[4] * 0.9, 1, a[5])):
        result = loss(model, x, noise, y, sigma, NoiseSchedule())
        wanted = loss(lambda *a: EPGViT.forward(model, *a) / 2, x, noise, y, sigma, NoiseSchedule())
        torch.testing.assert_close(result.per_sample, wanted.per_sample)
    want = model.eval()(x, t, y)
    torch.testing.assert_close(model.use_ops("triton")(x, t, y), want, rtol=1e-4, atol=1e-5)
    assert type(model) is not Halved and type(model.use_ops("plain")) is Halved


@pytest.mark.slow
def test_one_graph_serves_every_batch_size_and_its_gradients_are_the_same():
    model = make(**DECODER | {"depth": 1, "decoder_depth": 1}).use_ops("triton")
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
    model = make(**DECODER).double()
    x, t, y = inputs(model)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = model(x.double(), t.double(), y)
    torch.testing.assert_close(out, model(x.double(), t.double(), y))


def test_what_the_kernels_cannot_take_is_refused_in_a_line_and_a_derivative_that_they_have_not_is_not_zero():
    model = make(**DECODER).use_ops("triton")
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

    model = make(**DECODER)
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
