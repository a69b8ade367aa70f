"""A mistake of the caller is answered in one line: what was got, what was wanted, and what to do."""

import importlib

import pytest
import torch

from epg_fast import ops
from epg_fast.ops import extension
from tests.ops.examples import BF16, EXAMPLES, FP16, FP64
from tests.ops.kernel_checks import DEVICE, assert_refused, needs_extension

E4M3 = torch.float8_e4m3fn


def z(*size, dtype=torch.float32, **options):
    return torch.zeros(size, dtype=dtype, **options)


def b(*size):
    return z(*size, dtype=BF16)


# Of the operations below.
SHAPES = {
    "layer_norm_modulate": (2, 5, 40),
    "gate_residual_norm_modulate": (2, 5, 40),
    "linear_residual_norm": (2, 5, 40, 24),
    "skip_linear": (2, 5, 40, 24),
    "mlp_residual": (2, 5, 24, 40),
    "attention": (2, 5, 2, 8),
    "patch_embed": (2, 3, 8, 4, 24),
    "patch_loss": (2, 3, 8, 4),
    "timestep_condition": (3, 40),
    "quantize_rows": (2, 5, 40, 24),
    "linear_fp8": (5, 48, 24),
    "linear_fp8_dynamic": (5, 48, 32),
}
# Changes of an operation's arguments with what they are answered.
MISTAKES = {
    "layer_norm_modulate": [
        ({"shift": None}, "got no shift, wanted both shift and scale, or neither"),
        ({"scale": z(3, 40)}, r"got scale of shape \(3, 40\), wanted \[2, 40\] or \[2, 1, 40\]"),
    ],
    "gate_residual_norm_modulate": [
        ({"branch": z(2, 5, 41)}, "wanted .* as x"),
        ({"scale": None}, "got no scale, wanted both shift and scale"),
    ],
    "linear_residual_norm": [
        ({"h": z(2, 5, 39)}, r"got h of shape \(2, 5, 39\) and weight of shape \(24, 40\), wanted"),
        ({"h": z(2, 5, 40).int()}, "got h in torch.int32, wanted a floating dtype"),
        ({"scale": None}, "got no scale, wanted both shift and scale, or neither"),
    ],
    "skip_linear": [
        ({"skip": z(2, 4, 24)}, r"skip of shape \(2, 4, 24\).*with the same B and L"),
        ({"skip": z(2, 5, 24).long()}, "got skip in torch.int64, wanted a floating dtype"),
        ({"weight": z(40, 63)}, r"got weight of shape \(40, 63\), wanted \[N, 64\].*\(40\).*skip \(24\)"),
        ({"norm_bias": None}, "got no norm_bias, wanted both norm_weight and norm_bias, or neither"),
    ],
    "mlp_residual": [
        ({"fc2_weight": z(24, 39)}, r"weight of shape \(24, 39\), wanted \[B, L, K\] and \[N, K\] with the same K")
    ],
    "attention": [
        ({"qkv": z(2, 5, 240)}, r"got qkv of shape \(2, 5, 240\), wanted \[B, L, 3, H, d\].*\.view"),
        ({"qkv": z(2, 5, 2, 2, 8)}, r"got qkv of shape \(2, 5, 2, 2, 8\), wanted \[B, L, 3, H, d\]"),
        ({"qkv": z(2, 5, 3, 2, 8).long()}, "got qkv in torch.int64, wanted a floating dtype"),
        ({"scale": 0.0}, "got scale=0.0, wanted a positive number, or None"),
        ({"scale": float("nan")}, "got scale=nan, wanted a positive number, or None"),
        ({"dropout_p": 1.0}, "got dropout_p=1.0, wanted 0 <= dropout_p < 1"),
        ({"dropout_p": 0.1, "backend": "triton"}, "dropout_p=0.1 with backend='triton', wanted 0; use backend="),
        ({"backend": "cudnn"}, "wanted a CUDA device for backend='cudnn'"),
        ({"backend": "efficient"}, "wanted a CUDA device for backend='efficient'"),
    ],
    "patch_embed": [
        ({"image": z(2, 3, 8, 8).byte()}, "image in torch.uint8, wanted a floating dtype; normalise its pixels"),
        ({"image": z(2, 3, 8, 10)}, "image of 8 x 10, wanted multiples of the patch size 4; crop it to 8 x 8"),
        ({"weight": z(24, 1, 4, 4)}, r"got weight of shape \(24, 1, 4, 4\), wanted \[E, 3, p, p\]"),
        ({"prefix": z(2, 1, 24)}, r"got position of shape \(1, 6, 24\), wanted \[1, 5, 24\]: one row per"),
    ],
    "patch_loss": [
        ({"target": z(2, 4, 47)}, r"target of shape \(2, 4, 47\), wanted \[2, 4, 48\] like tokens, or an image"),
        ({"target": z(2, 3, 8, 9)}, r"target of shape \(2, 3, 8, 9\), wanted .* cuts into 4 patches of .* 48"),
        ({"target": z(2, 4, 8, 8)}, r"got target of shape \(2, 4, 8, 8\), wanted"),
        ({"target": z(2, 3, 8, 8).byte()}, "got target in torch.uint8, wanted a floating dtype"),
        ({"offset": z(2, 3, 16, 8)}, r"got offset of shape \(2, 3, 16, 8\), wanted"),
        ({"target": z(2, 3, 8, 8), "offset": z(2, 3, 4, 16)}, r"offset .*, wanted target's \(2, 3, 8, 8\)"),
        ({"offset": None}, "got offset_scale without offset, wanted both, or neither"),
        ({"scale": z(3)}, r"got scale of shape \(3,\), wanted \[2\], one per image"),
        ({"weight": z(2, requires_grad=True)}, r"got weight that requires a gradient, .* detach\(\) weight"),
        ({"huber_c": 0.0}, "got huber_c=0.0, wanted a positive number, or None for the mean"),
    ],
    "timestep_condition": [({"dim": 1}, "got dim=1, wanted at least 2")],
    "quantize_rows": [
        ({"branch": None}, "got a gate and no branch, wanted both, or no gate"),
        ({"skip": z(2, 5, 24).int()}, "got skip in torch.int32, wanted a floating dtype"),
    ],
    "linear_fp8": [
        ({"x": z(5, 48)}, "got x in torch.float32, wanted torch.float8_e4m3fn; quantise it"),
        ({"weight": z(24, 48).half()}, "got weight in torch.float16, wanted torch.float8_e4m3fn"),
        ({"x_scale": z(5).double()}, "got x_scale in torch.float64, wanted torch.float32"),
        ({"bias": z(24).int()}, "got bias in torch.int32, wanted a floating dtype"),
        ({"bias": z(24).half(), "backend": "scaled_mm"}, "bias in torch.float16, wanted one of torch.bfloat16 for"),
        ({"backend": "scaled_mm"}, "got N=24, wanted a multiple of 16"),
    ],
    "linear_fp8_dynamic": [
        ({"x": z(5, 40), "weight": z(32, 40)}, "got a weight of 32 x 40, wanted multiples of 16"),
        ({"weight": z(24, 48), "bias": None}, "got a weight of 24 x 48, wanted multiples of 16"),
        ({"dtype": FP16, "backend": "scaled_mm"}, "dtype torch.float16, wanted torch.bfloat16 for backend='scaled"),
    ],
}
for name in ("layer_norm_modulate", "gate_residual_norm_modulate"):
    SHAPES[f"{name}_fp8"], MISTAKES[f"{name}_fp8"] = SHAPES[name], MISTAKES[name]
# Arguments whose first or last dimension, or number of dimensions, is free: of further images, say.
FREE = {
    "more dimensions": {"linear_fp8_dynamic x", "linear_fp8_fused skip_scale"},
    "first": {"attention qkv", "timestep_embedding t", "linear_fp8_dynamic x"},
    "last": {"attention qkv", "attention_fp8 qkv", "timestep_embedding t", "quantize_rows skip"},
}
# What backend "cuda" cannot read, of arguments in bfloat16.
CUDA_MISTAKES = {
    "mlp_residual": [
        ({"y": z(2, 5, 24).half()}, "got y in torch.float16, wanted one of torch.bfloat16 for backend='cuda'"),
        ({"x": z(2, 5, 24).half()}, "got x in torch.float16, wanted one of torch.bfloat16, torch.float32"),
        ({"gate": z(2, 24).half()}, "got gate in torch.float16, wanted one of torch.bfloat16, torch.float32"),
        ({"fc1_bias": z(40).double()}, "got fc1_bias in torch.float64.*backend='cuda'"),
        ({"y": b(2, 24, 5).mT}, r"got y.*with strides \(120, 1, 5\).*call .contiguous\(\)"),
        ({"x": z(5, 2, 24).transpose(0, 1)}, "got x.*wanted it contiguous"),
        ({"fc2_weight": b(24, 80)[:, ::2]}, "got fc2_weight.*wanted it contiguous"),
        ({"fc1_weight": b(24, 40).t()}, "got fc1_weight.*wanted it contiguous"),
        ({"gate": z(24, 2).t()}, r"got gate with strides \(1, 2\), wanted contiguous rows"),
        ({"gate": z(2, 26)[:, 1:25]}, "got gate.*start at even offsets"),
        ({"y": b(2, 5, 20), "fc1_weight": b(40, 20)}, "got y.*wanted a last dimension that is a multiple of 8 .*pad"),
        ({"fc1_weight": b(36, 24), "fc1_bias": z(36), "fc2_weight": b(24, 36)}, "got fc2_weight.*multiple of 8"),
        ({"x": z(2, 5, 20), "fc2_weight": b(20, 40), "fc2_bias": z(20), "gate": None}, "got a weight for 20 outputs, "),
        ({"y": b(241)[1:].view(2, 5, 24)}, "start at a multiple of 16 bytes.*call .clone"),
        ({"fc2_bias": z(24, device="meta")}, "got fc2_bias.* on meta, wanted it on cpu"),
    ],
    "linear_residual_norm": [
        ({"h": z(2, 5, 40)}, "got h in torch.float32, wanted one of torch.bfloat16 for backend='cuda'"),
        ({"x": z(2, 5, 24).half()}, "got x in torch.float16, wanted one of torch.bfloat16, torch.float32"),
        ({"weight": b(40, 24).t()}, "got weight.*wanted it contiguous"),
        ({"gate": z(2, 25)[:, :24]}, r"got gate with strides \(25, 1\), wanted contiguous rows"),
    ],
    "skip_linear": [
        ({"x": z(2, 5, 40).half()}, "got x in torch.float16, wanted one of torch.bfloat16 for"),
        ({"norm_bias": z(40).double()}, "got norm_bias in torch.float64.*backend='cuda'"),
        ({"skip": b(2, 24, 5).mT}, "got skip.*wanted it contiguous"),
        ({"x": b(2, 5, 36), "skip": b(2, 5, 28)}, "got x.*wanted a last dimension that is a multiple of 8"),
    ],
    "linear_fp8": [
        ({"bias": z(24).half()}, "got bias in torch.float16, wanted one of torch.bfloat16 for backend='cuda'"),
        ({"x": z(48, 5).to(E4M3).t()}, "got x.*wanted it contiguous"),
        ({"x": z(5, 40).to(E4M3), "weight": z(24, 40).to(E4M3)}, "got x.*a last dimension that is a multiple of 16"),
    ],
}


@pytest.mark.parametrize(
    ("name", "change", "message"), [(name, *mistake) for name, rows in MISTAKES.items() for mistake in rows]
)
def test_a_mistake_is_answered_with_what_was_got_and_wanted(name, change, message):
    example = EXAMPLES[name]
    inputs = example.inputs(SHAPES[name], device="cpu", grad=False) | change
    assert_refused(message, example, inputs.pop("backend", "plain"), inputs)


@pytest.mark.parametrize(
    "example", [e for e in EXAMPLES.values() if e.name not in ("linear", "fused_adamw_ema")], ids=lambda e: e.name
)
def test_an_argument_of_another_shape_is_answered_with_the_shape_that_was_wanted(example):
    inputs = example.inputs(device="cpu", grad=False)
    for name, tensor in [pair for pair in inputs.items() if isinstance(pair[1], torch.Tensor)]:
        sides = tensor.shape
        others = {"more dimensions": (1, *sides), "first": (sides[0] + 1, *sides[1:])}
        for kind, shape in (others | {"last": (*sides[:-1], sides[-1] + 1)}).items():
            if f"{example.name} {name}" not in FREE[kind]:
                assert_refused("got .*, wanted", example, "plain", inputs | {name: tensor.new_zeros(shape)})


@pytest.mark.parametrize(
    ("name", "change", "message"), [(name, *mistake) for name, rows in CUDA_MISTAKES.items() for mistake in rows]
)
def test_backend_cuda_refuses_what_its_kernels_cannot_read(name, change, message, monkeypatch):
    monkeypatch.setattr(extension, "extension_status", lambda: (False, "not built"))
    example = EXAMPLES[name]
    inputs = example.inputs(SHAPES[name], example.cuda_dtypes[0], device="cpu", grad=False)
    assert_refused(message, example, "cuda", inputs | change)


def test_a_width_beyond_the_kernels_is_refused():
    pytest.importorskip("triton")
    from epg_kernels._norm_modulate import MAX_WIDTH

    for name, shape, message in (
        ("layer_norm_modulate", (1, 1, MAX_WIDTH + 1), f"{MAX_WIDTH + 1}, wanted at most {MAX_WIDTH} for"),
        ("quantize_rows", (1, 1, 16_400, 8), "16400, wanted at most 16384 for backend='triton'"),
        ("attention", (1, 2, 1, 136), "136, wanted at most 128.*use backend='plain'"),
    ):
        with pytest.raises(ValueError, match=message):
            EXAMPLES[name].call("triton", **EXAMPLES[name].inputs(shape, "fp32", grad=False))


@pytest.mark.parametrize("backend", ["flash_attn", "flash_attn_3", "flash_attn_4"])
def test_a_package_for_attention_says_what_it_needs(backend, monkeypatch):
    module = importlib.import_module("epg_fast.ops.attention")
    for installed, message in (
        (False, f"got backend='{backend}', but flash_attn.* is not installed; .*flash"),
        (True, "got qkv in torch.float32 on .*, wanted bfloat16 or float16 on a CUDA device"),
    ):
        monkeypatch.setattr(module, "installed", lambda package, installed=installed: installed)
        with pytest.raises(ValueError, match=message):
            ops.attention(z(2, 5, 3, 2, 8, device=DEVICE), backend=backend)


def test_an_image_that_does_not_cut_into_patches_is_refused():
    with pytest.raises(ValueError, match="an image of 8 x 10, wanted multiples of the patch size 4; crop it to 8 x 8"):
        ops.patchify(z(1, 3, 8, 10), 4)


def test_an_older_pytorch_that_lacks_fp8_products_on_a_cpu_is_named(monkeypatch):
    monkeypatch.setattr(importlib.import_module("epg_fast.ops.fp8"), "cpu_has_row_scales", lambda: False)
    inputs = EXAMPLES["linear_fp8"].inputs((33, 64, 32), device="cpu")
    with pytest.raises(ValueError, match="got torch .*one scale per tensor.*use backend='plain'"):
        ops.linear_fp8(**inputs, backend="scaled_mm")


def test_backend_cuda_asks_for_a_build_with_cutlass_and_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(extension, "extension_status", lambda: (True, "CPU and CUDA"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Ampere")
    for built, device, message in (
        (False, "cpu", "built without CUTLASS.*pip install --no-deps nvidia-cutlass.*TORCH_CUDA_ARCH_LIST"),
        (True, "cpu", "tensors on cpu, wanted a GPU of compute capability 9.0"),
        (True, "cuda", "tensors on Ampere, wanted a GPU of compute capability 9.0"),
    ):
        monkeypatch.setattr(extension, "extension_has_gemms", lambda built=built: built)
        with pytest.raises(ValueError, match=message):
            extension.require_gemms("mlp_residual", torch.device(device))


BUFFER, HALVES = z(8), dict.fromkeys(("x", "denoised", "denoised_next"), z(4).half())
# What both backends refuse, and what the extension does.
STEP_MISTAKES = [
    ("step", {"denoised": z(5)}, r"got denoised of shape \(5,\), wanted \(4,\) as x"),
    ("heun", {"denoised_next": z(5)}, r"got denoised_next of shape \(5,\), wanted \(4,\) as x"),
    ("step", {"sigma": 0.0}, "got sigma=0, wanted a level above 0"),
    ("heun", {"sigma_next": 0.0}, "got sigma_next=0, wanted a level above 0"),
    ("step_", {"x": z(4, requires_grad=True)}, "got x that requires a gradient.*use .*_step$"),
    ("step_", {"denoised": z(4).double()}, "got denoised in torch.float64, wanted torch.float32"),
    ("step_", {"denoised": z(4, device="meta")}, "got denoised on meta and x on cpu"),
]
OF_THE_EXTENSION = [
    ("step", HALVES, "float16, wanted torch.float32"),
    ("step", {"denoised": z(8)[::2]}, r"got denoised with strides \(2,\), wanted it contiguous"),
    ("step", {"denoised": z(4, device="meta")}, "got denoised on meta and x on cpu, wanted one device"),
    ("step", {"clamp": (z(1), 1.0)}, "wanted two numbers for backend='extension'"),
    ("step", {"clamp": (float("nan"), 1.0)}, "wanted two numbers for backend='extension'"),
    ("step_", {"x": BUFFER[:4], "denoised": BUFFER[2:6]}, r"got x that overlaps part of denoised.*denoised.clone\(\)"),
]


@pytest.mark.parametrize("name", ["euler_step", "euler_step_", "heun_step", "heun_step_"])
def test_a_step_of_a_sampler_says_what_it_wants(name):
    estimates = ("denoised", "denoised_next")[: 1 + name.startswith("heun")]
    good = {argument: z(4) for argument in ("x", *estimates)} | {"sigma": 1.0, "sigma_next": 0.5}
    for backend, rows in (("plain", STEP_MISTAKES), ("extension", STEP_MISTAKES + OF_THE_EXTENSION)):
        for of, change, message in rows:
            if of in name:
                arguments = good | {key: value for key, value in change.items() if key in good or key == "clamp"}
                with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
                    getattr(ops, name)(**arguments, backend=backend)


@needs_extension
def test_forward_mode_derivatives_of_a_step_are_refused_not_lost():
    x, denoised, tangent = z(4, device=DEVICE) + 1, z(4, device=DEVICE), z(4, device=DEVICE)
    steps = (
        lambda x: ops.euler_step(x, denoised, 2.0, 1.0, backend="extension"),
        lambda x: ops.heun_step(x, denoised, denoised, 2.0, 1.0, backend="extension"),
    )
    for step in steps:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            with pytest.raises(ValueError, match="got x with a tangent.*use backend='plain'"):
                step(dual)
        with pytest.raises(ValueError, match="inside torch.func.jvp or torch.func.grad"):
            torch.func.jvp(step, (x,), (tangent,))


def test_a_timestep_in_float64_and_weights_of_two_dtypes_are_left_to_plain_pytorch():
    pytest.importorskip("triton")
    inputs = EXAMPLES["mlp_residual"].inputs((2, 5, 24, 40), "fp32")
    with pytest.raises(ValueError, match="got weights in torch.float16 and torch.float32, wanted one dtype"):
        ops.mlp_residual(**inputs | {"fc1_weight": inputs["fc1_weight"].half()}, backend="triton")
    with pytest.raises(ValueError, match="got t in torch.float64, wanted one of torch.float32.*backend='triton'"):
        ops.timestep_embedding(z(3, dtype=FP64, device=DEVICE), 40, backend="triton")
