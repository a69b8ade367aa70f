"""The pipeline of diffusers: the pixels of `sample`, from folders that diffusers itself loads."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline

from epg_fast.diffusers import EPGPipeline
from epg_fast.models import EPGViT, RCMViT, export, from_pretrained, load_weights, save_weights
from epg_fast.sampling import SamplingEngine, sample
from epg_fast.sampling.outputs import quantize
from tests.commands import fails, run, snapshot
from tests.networks import make_model
from tests.sampling.conftest import write_checkpoint

FEW = {"num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": (0.1, 30.0)}
SAME = {"steps": 3, "guidance": 2.0, "interval": (0.1, 30.0)}
FILES = ["model_index.json", "pipeline.py"]
FILES += ["transformer/config.json", "transformer/model.safetensors", "transformer/network.py"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of ten classes, some of which have names."""
    path = write_checkpoint(tmp_path_factory.mktemp("run") / "model.safetensors")
    state, metadata = load_weights(path)
    save_weights(path, state, metadata | {"class_names": ["tench, Tinca tinca", *map(str, range(1, 10))]})
    return path


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """What the command line exports for diffusers."""
    path = tmp_path_factory.mktemp("pipeline") / "epg"
    run("export", "--checkpoint", checkpoint, "--output", path, "--format", "diffusers")
    return path


@pytest.fixture
def pipe(folder):
    return EPGPipeline.from_pretrained(folder)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Where diffusers copies the code of folders that are trusted."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def noise_of(seed, number=2):
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_pixels_are_those_of_sample_for_the_noise_that_the_generator_draws(pipe, checkpoint):
    want = sample(from_pretrained(checkpoint), [7, 3], noise=noise_of(0), **SAME)
    for form, wanted in (
        ("pt", want),
        ("np", want.permute(0, 2, 3, 1).numpy()),
        ("pil", quantize(want).numpy()),
    ):
        generator = torch.Generator().manual_seed(0)
        images = pipe(class_labels=[7, 3], generator=generator, output_type=form, **FEW).images
        assert np.array_equal(np.stack([np.asarray(image) for image in images]), np.asarray(wanted))
    one_each = [torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)]
    (images,) = pipe(torch.tensor([7, 3]), generator=one_each, output_type="pt", return_dict=False, **FEW)
    noise = torch.cat([noise_of(5, 1), noise_of(6, 1)])
    assert torch.equal(images, sample(pipe.transformer, [7, 3], noise=noise, **SAME))


def test_noise_on_the_way_depends_on_the_seed_of_the_generator(pipe):
    few = {"num_inference_steps": 3, "sampler": "euler_ancestral", "output_type": "pt"}
    drawn = [pipe([7, 3], generator=torch.Generator().manual_seed(seed), **few).images for seed in (5, 5, 6)]
    want = sample(pipe.transformer, [7, 3], noise=noise_of(5), seed=5, steps=3, sampler="euler_ancestral")
    assert torch.equal(drawn[0], want) and torch.equal(drawn[1], want)
    other = sample(pipe.transformer, [7, 3], noise=noise_of(6), seed=5, steps=3, sampler="euler_ancestral")
    assert not torch.equal(drawn[2], other)


def test_image_i_of_a_seed_is_image_i_of_the_command(pipe, folder, tmp_path):
    flags = ["--num", 3, "--labels", "7,3", "--seed", 4, "--steps", 3, "--guidance", 2.0, "--interval", "[0.1,30]"]
    run("sample", "--checkpoint", folder, "--outdir", tmp_path / "s", "--device", "cpu", "--png", "true", *flags)
    with np.load(tmp_path / "s/samples.npz") as file:
        for i, image in enumerate(pipe([7, 3, 7], seed=4, **FEW).images):
            assert np.array_equal(np.asarray(image), file["arr_0"][i])


def test_without_a_generator_pytorchs_own_decides(pipe):
    def draw():
        return pipe([1], num_inference_steps=2, output_type="pt").images

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_diffusers_itself_loads_the_folder_and_the_repository(pipe, folder, modules, fake_hub):
    want = pipe([7], generator=torch.Generator().manual_seed(0), output_type="pt", **FEW).images
    pipe.push_to_hub("me/epg", license="mit")
    assert sorted(fake_hub.repos["me/epg"]) == ["README.md", *FILES] and len(fake_hub.commits) == 1
    assert "pipe(class_labels=[0, 0, 0, 0], seed=0).images" in fake_hub.repos["me/epg"]["README.md"].decode()
    card = fake_hub.repos["me/epg"]["README.md"].decode()
    assert 'DiffusionPipeline.from_pretrained("me/epg", trust_remote_code=True)' in card and "license: mit" in card
    for source, options in (
        (str(folder), {"custom_pipeline": str(folder)}),
        (str(folder), {}),
        ("me/epg", {}),
    ):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            DiffusionPipeline.from_pretrained(source, **options)
        again = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, **options)
        assert type(again) is EPGPipeline and type(again.transformer) is EPGViT
        images = again([7], generator=torch.Generator().manual_seed(0), output_type="pt", **FEW).images
        assert torch.equal(images, want)
    half = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16
    for source in ("me/epg", folder / "transformer"):
        images = sample(from_pretrained(source), [7], noise=noise_of(0, 1), **SAME)
        assert torch.equal(images, want)


def test_a_saved_pipeline_is_the_exported_folder_again(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "mine")
    mine, exported = snapshot(tmp_path / "mine"), snapshot(folder)
    assert sorted(mine) == FILES
    for name in FILES:
        if not name.endswith(".safetensors"):  # whose header has its texts in any order
            assert mine[name] == exported[name], name
    want, again = pipe.transformer.state_dict(), EPGPipeline.from_pretrained(tmp_path / "mine").transformer.state_dict()
    assert all(torch.equal(again[name], want[name]) for name in want)
    assert json.loads(exported["transformer/config.json"])["epg_fast"]["normalization"] == "simple"


def test_the_dtype_of_the_pipeline_is_the_precision_of_its_products(pipe, folder):
    pipe.to(torch.bfloat16)
    same = EPGPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    want = sample(from_pretrained(folder).to(torch.bfloat16), [1, 2], noise=noise_of(0), precision="bf16", **SAME)
    for each in (pipe, same):
        images = each([1, 2], generator=torch.Generator().manual_seed(0), output_type="pt", **FEW).images
        assert each.dtype is torch.bfloat16 and torch.equal(images, want)
    exact = EPGPipeline.from_pretrained(folder)
    mixed = exact([1, 2], generator=torch.Generator().manual_seed(0), output_type="pt", precision="bf16", **FEW).images
    assert torch.equal(mixed, sample(exact.transformer, [1, 2], noise=noise_of(0), precision="bf16", **SAME))


def test_an_engine_serves_until_settings_or_weights_change(pipe, monkeypatch):
    made = []

    def engine(*arguments, **options):
        made.append(options)
        return SamplingEngine(*arguments, **options)

    monkeypatch.setattr("epg_fast.diffusers.SamplingEngine", engine)
    pipe.to(torch.bfloat16)  # for which an engine has weights of its own

    def draw(**settings):
        return pipe([1], seed=0, output_type="pt", **{"num_inference_steps": 2} | settings).images

    draw(num_inference_steps=3)
    first = draw()
    assert torch.equal(draw(), first) and [options["steps"] for options in made] == [3, 2]
    assert made[0]["precision"] == "bf16"  # for which there may be a plan
    with torch.no_grad():
        pipe.transformer.decoder_blocks[0].adaLN_modulation[1].weight.add_(0.1)
    changed = draw()
    want = sample(pipe.transformer, [1], seed=0, steps=2, precision="bf16")
    assert torch.equal(changed, want) and not torch.equal(changed, first)


def test_classes_are_called_by_index_or_by_name(pipe):
    want = pipe([0, 0, 0, 3], seed=0, output_type="pt", num_inference_steps=2).images
    named = pipe(["tench", "tinca TINCA", 0, "3"], seed=0, output_type="pt", num_inference_steps=2).images
    assert torch.equal(named, want)
    one = [pipe(label, seed=0, output_type="pt", num_inference_steps=2).images for label in ("tench", 0)]
    assert torch.equal(*one)
    pipe.transformer.metadata.pop("class_names")
    with pytest.raises(ValueError, match=r"no class 'tench', and takes no text; want class indices in 0..9$"):
        pipe("tench")


def test_an_unconditional_model_is_told_the_number_of_images(tmp_path):
    pipe = EPGPipeline.from_pretrained(write_checkpoint(tmp_path / "model.safetensors", num_classes=0))
    assert len(pipe(3, num_inference_steps=2).images) == 3 and len(pipe(num_inference_steps=2).images) == 1
    images = pipe(2, generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt").images
    assert torch.equal(images, sample(pipe.transformer, 2, noise=noise_of(0), steps=2))
    with pytest.raises(ValueError, match="pass the number of images"):
        pipe("a dog")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": "a photo of a dog"}, "no class 'a photo of a dog', and takes no text; want class indices"),
        ({"prompt": "a dog"}, "no class 'a dog', and takes no text; want class indices in 0..9, or names such as 'ten"),
        ({"class_labels": ["tensh"]}, "no class 'tensh' .did you mean 'tench'"),
        ({}, "class_labels is missing; want class indices in 0..9"),
        ({"class_labels": [10, 11]}, "got label 11, want labels in 0..9"),
        ({"class_labels": [1.5]}, "got label 1.5"),
        ({"class_labels": [1], "negative_prompt": "ugly"}, "negative_prompt"),
        ({"class_labels": [1], "num_inference_steps": 1}, "steps is 1"),
        ({"class_labels": [1], "output_type": "latent"}, "want pil, np or pt"),
        ({"class_labels": [1], "seed": 1, "generator": torch.Generator()}, "want one of them"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        pipe(**arguments)
    assert "\n" not in str(caught.value)


def test_an_encoder_and_a_folder_that_is_taken_are_not_exported(checkpoint, folder, tmp_path, capsys):
    make_model(RCMViT).save_pretrained(tmp_path / "encoder")
    command = ["export", "--format", "diffusers", "--checkpoint"]
    fails(capsys, [*command, tmp_path / "encoder", "--output", tmp_path / "out"], "holds an RCMViT, want an EPGViT")
    assert not (tmp_path / "out").exists()
    before = snapshot(folder)
    fails(capsys, [*command, checkpoint, "--output", folder], "exists; nothing is overwritten")
    assert snapshot(folder) == before
    with pytest.raises(ValueError, match="is a file, want a folder"):
        EPGPipeline.from_pretrained(folder).save_pretrained(checkpoint)
    assert [path.name for path in export(checkpoint, tmp_path / "x.safetensors")] == ["x.safetensors"]
