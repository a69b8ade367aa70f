"""Networks against the official implementation: outputs, gradients, parameter names and counts."""

import json

import pytest
import torch

from epg_fast.models import EPGViT, RCMViT
from epg_fast.ops import timestep_embedding
from tests.golden_data import GOLDEN, Case, each_backend, each_backend_and_dtype, names

COUNTS = json.loads((GOLDEN / "param_counts.json").read_text())["parameter_counts"]


@each_backend
def test_timestep_embedding(ops):
    case = Case("timestep_embedding")
    for dim in case.config["dims"]:
        case.check(f"embedding_dim{dim}", timestep_embedding(case["t"], dim, backend=ops))


@pytest.mark.parametrize("name", names("epgvit_"))
@each_backend_and_dtype
def test_generator_output_and_gradients(name, dtype, ops):
    case = Case(name)
    model = EPGViT(**case.config["model"])
    model.load_state_dict(case.weights(), strict=True)
    model.to(dtype).use_ops(ops)
    x = case["x"].to(dtype).requires_grad_()
    out = model(x, case["t"].to(dtype), case["y"])
    assert out.dtype == dtype
    (out * case["r"].to(dtype)).sum().backward()
    case.check("out", out)
    case.check("grad.x", x.grad)
    case.check_gradients(model)


@each_backend
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_encoder_output_and_running_statistics(mode, ops):
    case = Case("rcmvit_forward")
    model = RCMViT(**case.config["model"])
    model.load_state_dict(case.weights(), strict=True)
    projection, feature = model.use_ops(ops).train(mode == "train")(case["x"], case["t"])
    case.check(f"{mode}.proj", projection)
    case.check(f"{mode}.feat", feature)
    buffers = dict(model.named_buffers())
    for name in case.spec["outputs"]:
        if name.startswith(f"{mode}.buffer_after."):
            case.check(name, buffers[name.removeprefix(f"{mode}.buffer_after.")])


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_and_shapes_without_memory(name):
    entry = COUNTS[name]
    with torch.device("meta"):
        model = {"EPGViT": EPGViT, "RCMViT": RCMViT}[entry["kind"]](**entry["config"])
        x = torch.zeros(2, 3, model.image_size, model.image_size)
        arguments = [x, torch.zeros(2), torch.zeros(2, dtype=torch.int64)][: 3 if entry["kind"] == "EPGViT" else 2]
        out = model(*arguments)
    out = out if entry["kind"] == "EPGViT" else out[0]
    assert out.is_meta and out.shape == (x.shape if entry["kind"] == "EPGViT" else (2, entry["config"]["output_dim"]))
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]
    assert sum(p.numel() for n, p in model.named_parameters() if "adaLN" in n) == entry["adaLN_parameters"]


@pytest.mark.parametrize("file", ["state_dict_EPG-XL-16.json", "state_dict_RCMViT-768.json"])
def test_state_dict_names_and_shapes(file):
    entry = json.loads((GOLDEN / file).read_text())
    with torch.device("meta"):
        model = {"EPGViT": EPGViT, "RCMViT": RCMViT}[entry["kind"]](**entry["config"])
    got = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert got == {item["name"]: item["shape"] for item in entry["state_dict"]}
    assert list(got) == [item["name"] for item in entry["state_dict"]]
    assert model.no_weight_decay() == set(entry["no_weight_decay"])
