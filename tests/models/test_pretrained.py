"""Checkpoints of both worlds: official .pth files and our safetensors, right and wrong ones."""

import argparse
import collections
import functools
import json
import os
import pathlib
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from epg_fast import create_model, from_pretrained, list_presets
from epg_fast.models import EPGViT, RCMViT, create_encoder, export, load_into, preset_config, save_weights
from epg_fast.models.pretrained import interpolate_pos_embed
from tests.networks import DECODER, SIZES, make_inputs, make_model

HEADS = {"num_heads": 2, "decoder_num_heads": 3}
CONFIG = SIZES | DECODER | HEADS


@pytest.fixture
def small():
    return make_model(**HEADS).eval()


@pytest.fixture
def written(small, tmp_path):
    """Its weights as others write them."""
    torch.save(small.state_dict(), tmp_path / "x.pth")
    return tmp_path / "x.pth"


def _prefixed(prefix):
    return lambda model: {prefix + name: tensor for name, tensor in model.state_dict().items()}


def _noise(model):
    return {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


def _with_objects(model):
    args = argparse.Namespace(lr=1e-4, out=pathlib.Path("x"))
    return {"model": model.state_dict(), "args": args, "best": np.float64(2.04), "numbers": np.arange(3)}


class _EasyDict(dict):
    pass


class _Items(list):
    pass


class _Nothing:
    pass


_Pair = collections.namedtuple("_Pair", "first second")


def _with_containers(model):
    """Mappings and lists of other classes, objects without a state, and the network in one of the mappings."""
    log = collections.defaultdict(list, {"loss": [1.0]})
    others = {"pair": _Pair(1, 2), "nothing": _Nothing(), "log": log, "last": collections.deque([1, 2])}
    return _EasyDict(net=_EasyDict(model.state_dict()), items=_Items([1, 2]), **others)


def _distributed(model):
    """What FSDP2 leaves: DTensors, here of one rank, of which a file holds all."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        return {"model": {k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in model.state_dict().items()}}
    finally:
        dist.destroy_process_group()


def _renamed(old, new, prefix=""):
    return lambda model: {prefix + name.replace(old, new): tensor for name, tensor in model.state_dict().items()}


FILES_OF_OTHERS = {
    "file": lambda model: model.state_dict(),
    "ddp": _prefixed("module."),
    "ddp twice": _prefixed("module.module."),
    "lightning": lambda model: {"state_dict": _prefixed("model.")(model), "epoch": 3},
    "fabric": _prefixed("_forward_module."),
    "compiled ddp": _prefixed("_orig_mod.module."),
    "compiled block": _renamed("blocks.0.", "blocks.0._orig_mod."),
    "fsdp": _renamed("blocks.0.", "blocks.0._checkpoint_wrapped_module.", "_fsdp_wrapped_module."),
    "averaged model": lambda model: torch.optim.swa_utils.AveragedModel(model).state_dict(),
    "ema beside": lambda m: {"model": _noise(m), "ema": m.state_dict(), "opt": {"state": {0: _noise(m)}}},
    "nested": lambda model: {"checkpoint": {"model_ema": _prefixed("module.")(model), "model": _noise(model)}},
    "objects": _with_objects,
    "containers": _with_containers,
    "whole module": lambda model: model,
    "dtensors": _distributed,
}


@pytest.mark.parametrize("layout", FILES_OF_OTHERS)
def test_the_network_in_a_file_of_another_tool_is_found_and_computes_the_same(small, tmp_path, layout):
    torch.save(FILES_OF_OTHERS[layout](small), tmp_path / "nnet_ema.pth")
    model = from_pretrained(tmp_path, **HEADS)
    inputs = make_inputs(small)
    assert torch.equal(model(*inputs), small(*inputs))
    assert not model.training


def test_safetensors_are_known_by_their_content_and_put_together_from_shards(small, tmp_path):
    state = small.state_dict()
    names = sorted(state)
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "pytorch_model.bin")
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({k: state[k] for k in part}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: file for file, part in files.items() for k in part}}))
    for source in (tmp_path / "pytorch_model.bin", tmp_path, index):
        model = from_pretrained(source, **HEADS)
        assert all(torch.equal(model.state_dict()[k], state[k]) for k in names), source
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match="b.safetensors"):
        from_pretrained(index, **HEADS)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not an index of weights"):
        from_pretrained(index, **HEADS)


def test_a_file_that_leaves_open_which_network_is_meant_is_refused_in_one_short_line(small, tmp_path):
    sharded = _distributed(small)
    sharded["model"]["out.weight"]._local_tensor = sharded["model"]["out.weight"]._local_tensor[:7]
    for content, message in (
        ({"teacher": small.state_dict(), "student": _noise(small)}, r"several networks \(teacher, student\)"),
        ({"vae": {"conv.weight": torch.ones(1)}}, "patch_embed.proj.weight is missing; it holds vae.conv.weight"),
        (sharded, "out.weight is one rank's part .*full_state_dict=True"),
    ):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=message) as caught:
            from_pretrained(tmp_path / "x.pth", **HEADS)
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["digits_32", pytest.param("epg_b_16_256", marks=pytest.mark.slow)])
def test_the_preset_is_inferred_from_the_tensors(name, tmp_path):
    want = create_model(name)
    torch.save(want.state_dict(), tmp_path / "generator.pth")
    torch.save(create_encoder(name).state_dict(), tmp_path / "encoder.pth")
    generator, encoder = from_pretrained(tmp_path / "generator.pth"), from_pretrained(tmp_path / "encoder.pth")
    assert isinstance(generator, EPGViT) and isinstance(encoder, RCMViT)
    assert generator.blocks[0].attn.num_heads == want.blocks[0].attn.num_heads == encoder.blocks[0].attn.num_heads
    assert generator.decoder_blocks[0].attn.num_heads == want.decoder_blocks[0].attn.num_heads


def test_presets_of_the_same_widths_and_depths_by_which_heads_are_found_share_the_heads():
    heads = {}
    for config in map(preset_config, list_presets()):
        key = tuple(config[k] for k in ("embed_dim", "depth", "decoder_embed_dim", "decoder_depth"))
        mine = config["num_heads"], config["decoder_num_heads"]
        assert heads.setdefault(key, mine) == mine


def test_safetensors_carry_their_configuration_and_round_trip_through_official(small, tmp_path, log):
    metadata = {"config": CONFIG, "parameterization": "edm", "untrained_classes": [0, 4]}
    save_weights(tmp_path / "model.safetensors", small.state_dict(), metadata)
    model = from_pretrained(tmp_path)
    assert model.metadata["parameterization"] == "edm"
    inputs = make_inputs(small)
    assert torch.equal(model(*inputs), small(*inputs))
    files = export(tmp_path, tmp_path / "official", "official")
    assert "sample from these with --parameterization edm" in log.messages[0]
    assert "do not say that 2 classes were never trained: [0, 4]" in log.messages[1]
    assert sorted(f.name for f in files) == ["nnet.pth", "nnet_ema.pth"]
    again = from_pretrained(tmp_path / "official", **HEADS)
    assert torch.equal(again(*inputs), small(*inputs))
    with pytest.raises(ValueError, match="nothing is overwritten"):
        export(tmp_path, tmp_path / "official", "official")
    assert oct((tmp_path / "model.safetensors").stat().st_mode & 0o444) == oct(0o444 & ~os.umask(os.umask(0o022)))


def test_another_resolution_interpolates_the_position_embedding(small, written):
    model = from_pretrained(written, image_size=64, **HEADS)
    assert model.pos_embed.shape == (1, 2 + 64, 32)
    assert torch.equal(model.pos_embed[:, :2], small.pos_embed[:, :2])
    assert model(*make_inputs(model)).shape == (2, 3, 64, 64)


def test_interpolation_keeps_constants_and_ramps():
    grid = torch.arange(4.0).repeat_interleave(4)[:, None] * torch.ones(1, 3)
    old = torch.cat([torch.full((2, 3), 9.0), grid])[None]
    new = interpolate_pos_embed(old, torch.empty(1, 2 + 64, 3), 2)
    rows = new[0, 2:, 0].view(8, 8)
    assert torch.equal(new[:, :2], old[:, :2])
    assert rows.std(dim=1).max() < 1e-6
    torch.testing.assert_close(rows[2:6, 0], torch.tensor([0.75, 1.25, 1.75, 2.25]), atol=0.1, rtol=0)
    assert torch.equal(interpolate_pos_embed(old[:, :18], torch.empty(1, 18, 3), 2), old)


def test_weights_that_do_not_fit_are_named(small, written):
    for sizes, message in (
        ({"embed_dim": 64}, r"cls_token has shape \[1, 1, 64\], want \[1, 1, 32\].* and \d+ more"),
        ({"num_classes": 7}, "x.pth has 7 classes, the model 5; pass --model.num_classes 7"),
        ({"num_classes": 0}, "x.pth has 0 classes, the model 5; pass --model.num_classes 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_into(small, EPGViT(**CONFIG | sizes).state_dict(), "x.pth")
    with pytest.raises(ValueError, match="pass num_heads= and decoder_num_heads="):
        from_pretrained(written)
    state = small.state_dict()
    del state["out.bias"]
    with pytest.raises(ValueError, match=r"x.pth does not fit EPGViT: missing out.bias"):
        load_into(small, state, "x.pth")


def test_encoder_only_takes_the_trunk_and_leaves_the_rest(small):
    encoder = make_model(RCMViT).eval()
    before = {k: v.clone() for k, v in small.state_dict().items()}
    load_into(small, encoder.state_dict(), encoder_only=True)
    after, trunk = small.state_dict(), encoder.state_dict()
    for name in before:
        assert torch.equal(after[name], trunk[name] if name in trunk else before[name]), name
    x, t = make_inputs(encoder)
    assert "decoder_blocks.0.norm1.weight" not in trunk
    small.class_embed.weight.data.zero_()
    torch.testing.assert_close(small.encode(x, t), encoder.encode(x, t))


def test_weights_that_are_not_finite_are_loaded_with_a_warning_that_names_the_first(small, written, log):
    from_pretrained(written, **HEADS)
    assert not log.messages
    state = small.state_dict()
    for name, value in (("blocks.0.norm1.bias", float("inf")), ("norm.weight", float("nan"))):
        state[name][3] = value
    torch.save(state, written)
    from_pretrained(written, **HEADS)
    (line,) = log.messages
    assert line.startswith(f"{written}: blocks.0.norm1.bias holds NaN or infinity")


NO_WEIGHTS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 9\n": "Git LFS pointer.*git lfs pull",
    b"<!DOCTYPE html>\n<html>": "web page.*download",
    b"<html><body>Not found": "web page.*download",
    b"root:x:0:0:root:/root:/bin/bash\n": "not a (file of plain tensors|readable safetensors)",
    b"\x00" * 100: "not a (file of plain tensors|readable safetensors)",
    b"]a.": "not a (file of plain tensors|readable safetensors)",
    b"\x80\x02}q\x00.": "not a (file of plain tensors|readable safetensors)",
    b"": "is empty; get it again|not a readable safetensors",
}


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_file_of_other_things_is_refused_by_name(small, tmp_path, name):
    for content, message in NO_WEIGHTS.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            from_pretrained(tmp_path / name)
        assert name in str(caught.value)
    if name == "x.pth":
        torch.save(small.state_dict(), tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:9000])
        with pytest.raises(ValueError, match="is truncated; get it again"):
            from_pretrained(tmp_path / name)
    (tmp_path / name).unlink()
    for path, message in ((tmp_path, "no weights in this folder"), (tmp_path / name, "no such file or folder")):
        with pytest.raises(ValueError, match=message):
            from_pretrained(path)


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    for save in (functools.partial(pickle.dump, protocol=2), torch.save):
        with open(tmp_path / "evil.pth", "wb") as file:
            save({"x": Evil()}, file)
        with pytest.raises(ValueError, match=r"posix.mkdir.*torch.save\(model.state_dict\(\), path\)"):
            from_pretrained(tmp_path / "evil.pth")
    torch.save({"args": argparse.Namespace()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="argparse.Namespace"):
        from_pretrained(tmp_path / "old.pth")
    assert not (tmp_path / "executed").exists()


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'epg_xl_16_256'"):
        create_model("epg_xl_16_265")
    with pytest.raises(ValueError, match="did you mean 'embed_dim'"):
        create_model("digits_32", embeddim=3)
    with pytest.raises(ValueError, match="not a multiple of patch_size"):
        create_model("digits_32", image_size=30)
