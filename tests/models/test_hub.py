"""Networks in folders and on the hub: what is written there is what everything else reads."""

import copy
import inspect
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import epg_fast
from epg_fast.models import EPGViT, RCMViT, load_weights, save_weights
from epg_fast.sampling.outputs import quantize
from tests.commands import run
from tests.networks import DECODER, HEAD, SIZES, make_inputs, make_model

ARGUMENTS = {
    EPGViT: SIZES | DECODER | {"decoder_num_heads": 3},
    RCMViT: SIZES | HEAD | {"proj_layers": 2, "qkv_bias": True},
}
METADATA = {
    "stage": "finetune-consistency",
    "preset": "digits_32",
    "step": 7,
    "ema_decay": 0.999,
    "parameterization": "edm",
    "normalization": "simple",
    "noise": {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "sigma_data": 0.5},
}


def network(kind, **others):
    """Of random weights, with BatchNorm's statistics of some batch, as a checkpoint gives it."""
    model = make_model(kind, 0.05, **ARGUMENTS[kind] | others)
    if kind is RCMViT:
        model(*make_inputs(model, batch=4))
    model.metadata = dict(METADATA)
    return model.eval()


def output(model, given):
    with torch.no_grad():
        found = model(*given)
    return found if isinstance(found, torch.Tensor) else torch.cat(found, dim=1)


@pytest.mark.parametrize("kind", [EPGViT, RCMViT])
def test_what_a_network_saves_is_loaded_by_its_class_the_package_and_its_own_config(tmp_path, kind):
    model = network(kind)
    model.save_pretrained(tmp_path / "mine")
    given = make_inputs(model)
    want = output(model, given)
    for load in (kind.from_pretrained, epg_fast.from_pretrained):
        again = load(tmp_path / "mine")
        assert type(again) is kind and not again.training
        assert torch.equal(output(again, given), want)
        assert METADATA.items() <= again.metadata.items()
    config = json.loads((tmp_path / "mine/config.json").read_text())
    assert config.pop("architectures") == [kind.__name__] and config.pop("epg_fast") == METADATA
    assert ARGUMENTS[kind].items() <= config.items()
    by_hand = kind(**config).eval()
    by_hand.load_state_dict(load_file(tmp_path / "mine/model.safetensors"))
    assert torch.equal(output(by_hand, given), want)


def test_a_run_that_is_loaded_and_saved_says_the_same_of_itself(tmp_path):
    """`sample` takes up a folder of samples by what weights say; whole numbers stay whole."""
    metadata = METADATA | {"config": ARGUMENTS[EPGViT] | {"mlp_ratio": 4, "hidden_dim": 512, "drop": 0.1}}
    save_weights(tmp_path / "run/model.safetensors", network(EPGViT).state_dict(), metadata)
    epg_fast.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "mine")
    texts = [json.dumps(load_weights(tmp_path / name)[1], sort_keys=True) for name in ("mine", "run")]
    config = json.loads(texts[0])["config"]
    assert metadata["config"].items() <= config.items()
    assert json.loads(texts[1])["config"].items() <= config.items() and '"mlp_ratio": 4,' in texts[0]


def test_what_differs_from_the_defaults_is_kept(tmp_path):
    """A scale of attention that no tensor shows, and another resolution than the checkpoint's."""
    model = network(EPGViT, qk_scale=0.5)
    model.metadata["config"] = ARGUMENTS[EPGViT]
    model.save_pretrained(tmp_path / "mine")
    given = make_inputs(model)
    assert torch.equal(output(EPGViT.from_pretrained(tmp_path / "mine"), given), output(model, given))
    large = EPGViT.from_pretrained(tmp_path / "mine", image_size=32)
    large.save_pretrained(tmp_path / "large")
    again = EPGViT.from_pretrained(tmp_path / "large")
    assert again.image_size == 32 and torch.equal(again.pos_embed, large.pos_embed)
    half = EPGViT.from_pretrained(tmp_path / "mine", torch_dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16 and half.device.type == "cpu"
    assert torch.equal(half.out.weight, model.out.weight.bfloat16())


def test_an_edited_config_is_obeyed_also_for_weights_that_say_nothing(tmp_path):
    model = network(EPGViT)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["epg_fast"]["parameterization"] = "x0"
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    assert EPGViT.from_pretrained(tmp_path).metadata == METADATA | {
        "parameterization": "x0",
        "config": EPGViT.from_pretrained(tmp_path / "model.safetensors").metadata["config"],
    }
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # as other tools write them
    again = EPGViT.from_pretrained(tmp_path)
    assert again.metadata["noise"] == METADATA["noise"] and again.decoder_blocks[0].attn.num_heads == 3


def test_a_disk_that_fills_up_leaves_no_config_of_other_weights(tmp_path, monkeypatch):
    before, after = network(EPGViT), network(EPGViT, num_classes=7)

    def full(path, *_):
        raise OSError(28, f"cannot write {path}")

    for name, want in (("write_atomically", after), ("save_weights", before)):
        before.save_pretrained(tmp_path / name)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot write"):
            patch.setattr(f"epg_fast.models.pretrained.{name}", full)
            after.save_pretrained(tmp_path / name)
        again = EPGViT.from_pretrained(tmp_path / name)
        assert again.num_classes == want.num_classes and torch.equal(again.out.weight, want.out.weight)


class Mine(EPGViT, tags=["mine"], license="mit"):
    pass


def test_a_subclass_and_a_copy_save_and_load_as_the_network_does(tmp_path):
    model = network(EPGViT)
    copy.deepcopy(pickle.loads(pickle.dumps(model))).save_pretrained(tmp_path / "copy")
    assert load_file(tmp_path / "copy/model.safetensors").keys() == model.state_dict().keys()
    mine = Mine.from_pretrained(tmp_path / "copy")
    assert type(mine) is Mine and torch.equal(mine.out.weight, model.out.weight)
    mine.save_pretrained(tmp_path / "mine")
    assert json.loads((tmp_path / "mine/config.json").read_text())["architectures"] == ["EPGViT"]


def test_a_folder_of_something_else_is_refused_in_one_line(tmp_path):
    for kind, other, remedy in ((EPGViT, RCMViT, "it is a generator"), (RCMViT, EPGViT, "to be fine-tuned first")):
        network(kind).save_pretrained(tmp_path / kind.__name__)
        with pytest.raises(ValueError, match=f"holds an {kind.__name__}, want an {other.__name__}: .*{remedy}"):
            other.from_pretrained(tmp_path / kind.__name__)
    file = tmp_path / "EPGViT/config.json"
    config = json.loads(file.read_text())
    for content, message in (
        (
            config | {"architectures": ["LlamaForCausalLM"]},
            "is of another architecture, LlamaForCausalLM; want EPGViT or RCMViT",
        ),
        (config | {"embeddim": 3}, "unknown model argument 'embeddim' .did you mean 'embed_dim'.*correct or remove"),
        (config | {"epg_fast": 3}, "not JSON of names and values"),
        ([config], "not JSON of names and values"),
        (config | {"num_classes": 6}, "has 5 classes, the model 6"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message) as caught:
            EPGViT.from_pretrained(tmp_path / "EPGViT")
        assert "\n" not in str(caught.value)
    file.write_text("{")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        EPGViT.from_pretrained(tmp_path / "EPGViT")
    file.write_text('{"hidden_size": 768}')  # of who knows what, beside weights that speak for themselves
    assert EPGViT.from_pretrained(tmp_path / "EPGViT").num_classes == 5
    with pytest.raises(ValueError, match="is a file, want a folder"):
        network(EPGViT).save_pretrained(file)


def test_without_huggingface_hub_folders_work_and_a_hub_id_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = network(EPGViT)
    model.save_pretrained(tmp_path / "mine")
    assert torch.equal(EPGViT.from_pretrained(tmp_path / "mine").out.weight, model.out.weight)
    for action in (EPGViT.from_pretrained, model.push_to_hub):
        with pytest.raises(ValueError, match="someone/EPG-XL: .* needs `pip install huggingface_hub`"):
            action("someone/EPG-XL")


@pytest.mark.parametrize("kind", [EPGViT, RCMViT])
def test_networks_are_models_of_the_hub_also_once_fused_or_unpickled(fake_hub, tmp_path, kind):
    from huggingface_hub import ModelCard, PyTorchModelHubMixin

    model = network(kind)
    assert ARGUMENTS[kind].items() <= model._hub_mixin_config.items()
    model.use_ops("triton")
    again = pickle.loads(pickle.dumps(model))
    for each in (model, again, model.use_ops("plain")):
        assert type(each) is kind and isinstance(each, PyTorchModelHubMixin)
        each.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine", token="x")
        assert fake_hub.repos["me/mine"].keys() == {"README.md", "config.json", "model.safetensors"}
        text = fake_hub.repos["me/mine"].pop("README.md").decode()
        assert text == str(each.generate_model_card("me/mine"))
        assert {"epg", "model_hub_mixin", "pytorch_model_hub_mixin"} <= {*ModelCard(text).data.tags}
    with pytest.raises(TypeError, match="save_pretrained: private is for push_to_hub=True"):
        model.save_pretrained(tmp_path / "other", private=True)
    assert not (tmp_path / "other").exists()


def test_a_subclass_has_its_own_tags_and_licence_in_the_card():
    pytest.importorskip("huggingface_hub")
    card, plain = (kind(**ARGUMENTS[EPGViT]).generate_model_card() for kind in (Mine, EPGViT))
    assert {"mine", "epg", "pytorch_model_hub_mixin"} <= {*card.data.tags} and "mine" not in plain.data.tags
    assert card.data.license == "mit" and "Weights: mit." in str(card) and card.data.library_name == "epg_fast"


@pytest.mark.slow
def test_a_network_that_was_pickled_beside_huggingface_hub_is_read_where_it_is_not_installed(tmp_path):
    model = network(EPGViT)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = f"""
import pickle, sys
sys.modules["huggingface_hub"] = None
import torch
from epg_fast.models import EPGViT
with open("{tmp_path}/model.pkl", "rb") as file:
    model = pickle.load(file)
assert type(model) is EPGViT and type(model).__mro__[-2].__module__ == "epg_fast.models.hub"
model.use_ops("triton").use_ops("plain").save_pretrained("{tmp_path}/mine")
assert torch.equal(EPGViT.from_pretrained("{tmp_path}/mine").out.weight, model.out.weight)
class Mine(EPGViT, tags=["mine"]): pass
try:
    model.push_to_hub("me/mine")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "me/mine: pushing to the hub needs `pip install huggingface_hub`\n"
    assert torch.equal(EPGViT.from_pretrained(tmp_path / "mine").out.weight, model.out.weight)


def test_the_methods_take_the_arguments_of_huggingface_hubs_mixin():
    """Code for any model of the hub works on ours; what is left out concerns other ways to say the configuration."""
    mixin = pytest.importorskip("huggingface_hub").PyTorchModelHubMixin
    elsewhere = {"config", "model_card_kwargs", "model_kwargs", "push_to_hub_kwargs", "cls", "self"}
    elsewhere |= {"allow_patterns", "ignore_patterns", "delete_patterns"}
    loading = {*inspect.signature(epg_fast.from_pretrained).parameters}
    for name in ("save_pretrained", "from_pretrained", "push_to_hub"):
        theirs = {*inspect.signature(getattr(mixin, name)).parameters} - elsewhere
        ours = {*inspect.signature(getattr(EPGViT, name)).parameters}
        assert theirs - {"repo_id"} <= (ours | loading if name == "from_pretrained" else ours), name


@pytest.mark.parametrize("kind", [EPGViT, RCMViT])
def test_what_is_pushed_is_loaded_from_the_hub_also_when_it_is_down_later(fake_hub, tmp_path, kind):
    model = network(kind)
    url = model.push_to_hub("me/mine", token="x")
    assert url.startswith("https://huggingface.co/me/mine/commit/") and fake_hub.commits == ["me/mine"]
    assert set(fake_hub.repos["me/mine"]) == {"README.md", "config.json", "model.safetensors"}
    model.save_pretrained(tmp_path / "mine")
    assert fake_hub.repos["me/mine"]["config.json"] == (tmp_path / "mine/config.json").read_bytes()
    fake_hub.repos["me/official"] = {"nnet_ema.pth": _torch_saved(model, tmp_path)}
    heads = {"num_heads": 2, "decoder_num_heads": 3}
    given = make_inputs(model)
    for fake_hub.down in (False, True):
        again = kind.from_pretrained("me/mine", revision="main")
        assert torch.equal(output(again, given), output(model, given)) and METADATA.items() <= again.metadata.items()
        again = epg_fast.from_pretrained("me/official", **heads if kind is EPGViT else {"num_heads": 2})
        assert torch.equal(output(again, given), output(model, given))


def _torch_saved(model, folder):
    torch.save(model.state_dict(), folder / "x.pth")
    return (folder / "x.pth").read_bytes()


def test_the_hubs_refusals_are_one_line_with_the_remedy_and_nothing_is_pushed(fake_hub):
    model = network(EPGViT)
    fake_hub.refuses = {"me/private": (401, ""), "me/gated": (403, "GatedRepo"), "me/broken": (400, "")}
    fake_hub.repos["me/empty"] = {}
    for repo, reading, writing in (
        ("me/none", "no such repository.*correct the name, or `hf auth login`", None),
        ("me/private", "`hf auth login`", "nothing was pushed, the hub refused .401.; `hf auth login`"),
        ("me/gated", "asked on its page", "nothing was pushed"),
        ("me/broken", "the hub refused", "nothing was pushed, the hub refused"),
        ("me/empty", "holds none of model.safetensors, nnet_ema.pth", None),
        ("me/a b", "no such file or folder", "nothing was pushed, the hub refused: Repo id"),
    ):
        for action, message in ((EPGViT.from_pretrained, reading), (model.push_to_hub, writing)):
            if message:
                with pytest.raises(ValueError, match=message) as caught:
                    action(repo)
                assert "\n" not in str(caught.value) and repo in str(caught.value)
    with pytest.raises(ValueError, match="no such revision"):
        EPGViT.from_pretrained("me/empty", revision="v404")
    fake_hub.repos["me/llama"] = {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "model.safetensors": b""}
    with pytest.raises(ValueError, match="is of another architecture, LlamaForCausalLM; want EPGViT or RCMViT"):
        EPGViT.from_pretrained("me/llama")
    fake_hub.down = True
    with pytest.raises(ValueError, match="the hub cannot be reached .no route to host.; try again later"):
        EPGViT.from_pretrained("me/other")
    assert len({path for path in fake_hub.asked if path.startswith("/me/other/")}) == 1  # each is waited for
    with pytest.raises(ValueError, match="nothing was pushed, the hub cannot be reached .no route to host"):
        model.push_to_hub("me/other")
    with pytest.raises(ValueError, match="evaluation nowhere.json: .*want a result of `epg-fast evaluate"):
        model.push_to_hub("me/other", evaluation="nowhere.json")
    with pytest.raises(ValueError, match="holds no figures of images with their protocol"):
        model.push_to_hub("me/other", evaluation={"kind": "probe"})
    assert not fake_hub.commits


def test_the_card_says_how_the_weights_were_made_how_to_sample_and_how_good_they_are(
    fake_hub, tmp_path, tiny_inception
):
    from huggingface_hub import ModelCard

    model = network(EPGViT)
    model.save_pretrained(tmp_path / "mine")
    flags = ["--num", 12, "--steps", 3, "--guidance", 2.5, "--interval", "[0.1,30]"]
    run("sample", "--checkpoint", tmp_path / "mine", "--outdir", tmp_path / "s", "--device", "cpu", *flags)
    labels = [i % 5 for i in range(12)]
    drawn = epg_fast.sample(model, labels, steps=3, guidance=2.5, interval=(0.1, 30.0))
    with np.load(tmp_path / "s/samples.npz") as file:  # of the saved folder are the images of the network
        assert np.array_equal(file["arr_0"], quantize(drawn).numpy())
    np.savez(tmp_path / "imagenet.npz", arr_0=np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8))
    judges = ["--reference", tmp_path / "imagenet.npz", "--inception", tiny_inception, "--splits", 2]
    run("evaluate", "--samples", tmp_path / "s/samples.npz", "--output", tmp_path / "result.json", *judges)
    result = json.loads((tmp_path / "result.json").read_text())
    model.push_to_hub("me/mine", evaluation=tmp_path / "result.json", license="mit")
    text = fake_hub.repos["me/mine"]["README.md"].decode()
    for part in (
        *("# mine\n", "16 x 16 pixels of 5 classes", "| stage | finetune-consistency |", "| ema_decay | 0.999 |"),
        *(f"| fid | {result['fid']:.5g} | {result['spread']['fid']:.2g} |", "Weights: mit."),
        *("12 samples of 16x16 pixels", "Spread: deviation over 20 sets", "https://arxiv.org/abs/2510.12586"),
        "sample(model, [0, 0, 0, 0], seed=0, sampler='heun', steps=3, guidance=2.5, interval=(0.1, 30.0), "
        "precision='fp32')",
        "epg-fast sample --checkpoint me/mine --outdir samples --num 12 --sampler heun --steps 3 --guidance 2.5 "
        "--interval [0.1,30.0] --precision fp32 --labels balanced\n",
    ):
        assert part in text, part
    data = ModelCard(text).data  # as the hub reads it
    assert data.license == "mit" and data.library_name == "epg_fast"
    figures = {found.metric_type: (found.metric_value, found.dataset_name) for found in data.eval_results}
    assert figures.keys() == {k for k in result["spread"] if result[k] is not None} >= {"fid", "inception_score"}
    assert figures["fid"] == (result["fid"], "imagenet")


def test_a_card_that_somebody_wrote_stays(fake_hub, log):
    fake_hub.repos["me/mine"] = {"README.md": b"by hand"}
    network(EPGViT).push_to_hub("me/mine")
    assert len(fake_hub.repos["me/mine"]) == 3
    assert fake_hub.repos["me/mine"]["README.md"] == b"by hand" and "README.md stays as it is" in log.messages[-1]


def test_the_command_in_a_card_is_one_of_the_command_line(fake_hub):
    """Without figures: the sampler that the kind of training asks for, and the network's own labels."""
    network(EPGViT, num_classes=0).push_to_hub("me/mine")
    named = network(EPGViT, num_classes=22)
    named.metadata["class_names"] = [f"kind {i}" for i in range(22)]
    named.push_to_hub("me/named")
    assert "Classes: 0 kind 0, 1 kind 1, " in (text := fake_hub.repos["me/named"]["README.md"].decode())
    assert "19 kind 19 and 2 more." in text
    network(RCMViT).push_to_hub("me/encoder")
    text = fake_hub.repos["me/mine"]["README.md"].decode()
    assert "sample(model, 4, seed=0, sampler='onestep')" in text and "without classes" in text
    assert "--outdir samples --sampler onestep\n" in text and "The publisher states none" in text
    assert "## Sampling" not in fake_hub.repos["me/encoder"]["README.md"].decode()
