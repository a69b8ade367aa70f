"""`SamplingEngine` and `sample`: what they return depends on model, labels and seed, and on nothing else."""

import functools
import inspect
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

import epg_fast
from epg_fast import SamplingEngine
from epg_fast.config import CHURN, Sampler
from epg_fast.diffusion import SAMPLERS, STOCHASTIC, Denoiser, NoiseSchedule, PixelNormalization, autoguided, guided
from epg_fast.ops import philox_normal_of
from epg_fast.sampling import engine as engine_module
from epg_fast.sampling.outputs import quantize
from tests import networks
from tests.waiting import NothingIsRead

LABELS = [0, 1, 2, 3, 4, 0, 1]


make_model = functools.partial(networks.make_model, drop=0.5)


@pytest.fixture
def model():
    return make_model()


def churn(sampler):
    return {"s_churn": 40.0} if sampler == "edm_sde" else {}


GUIDES = {
    "none": {},
    "interval": {"guidance": 2.0, "interval": (0.1, 30.0)},
    "weak": {"guidance": 0.5},
    "edm": {"parameterization": "edm", "clamp": "data"},
}


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_is_the_plain_sampler_bit_for_bit_and_shows_the_estimates_on_the_way(model, sampler, guide):
    weak = make_model(depth=2) if guide == "weak" else None
    options = {"sampler": sampler, "steps": 5, "weak": weak} | GUIDES[guide] | churn(sampler)
    inputs = {"labels": LABELS[:3], "indices": [5, 6, 7], "seed": 3}
    networks = [model] if weak is None else [model, weak]
    networks[-1].blocks[0].eval()
    modes = [module.training for network in networks for module in network.modules()]
    got = epg_fast.sample(model, **inputs, **options)
    assert [module.training for network in networks for module in network.modules()] == modes
    model.eval()
    images, estimates = SamplingEngine(model, **options).trajectory(**inputs)

    denoiser = Denoiser(model, parameterization=options.get("parameterization", "x0"))
    seen, indices, shape = [], torch.tensor([5, 6, 7]), (3, 16, 16)
    if guide == "interval":
        denoiser = guided(denoiser, 2.0, (0.1, 30.0))
    elif guide == "weak":
        denoiser = autoguided(denoiser, weak.eval(), 0.5)

    def watched(x, sigma, y):
        seen.append((sigma, denoiser(x, sigma, y)))
        return seen[-1][1]

    more = {"clamp": PixelNormalization().bounds() if guide == "edm" else (-1.0, 1.0)} | churn(sampler)
    if sampler in STOCHASTIC:
        more["step_noise"] = lambda i: philox_normal_of(indices, 3, shape, i + 1)
    levels = NoiseSchedule().levels(1 if sampler == "onestep" else 5, 16)
    with torch.no_grad():
        noise = philox_normal_of(indices, 3, shape)
        want = SAMPLERS[sampler](watched, noise, levels, torch.tensor(LABELS[:3]), **more)
    assert torch.equal(got, PixelNormalization().denormalize(want)) and torch.equal(images, got)
    assert got.std() > (0.02 if guide == "edm" else 0.05)
    assert list(estimates) == list(dict.fromkeys(sigma for sigma, _ in seen))
    for sigma, denoised in dict(seen).items():
        assert torch.equal(estimates[sigma], PixelNormalization().denormalize(denoised.clamp(*more["clamp"])))
    assert (len(seen) > len(estimates)) == (sampler == "heun")  # of two at a level it is the later


def test_a_trajectory_is_of_one_batch_and_records_no_graph(model, monkeypatch):
    engine = SamplingEngine(model, steps=4, batch_size=3)
    with pytest.raises(ValueError, match="trajectory: got 4 images, want at most a batch of 3"):
        engine.trajectory([0, 1, 2, 3])
    want = engine([1, 2, 2], indices=[0, 1, 1])[:2]
    engine.batch_size, engine.cuda_graphs = 4, True  # one image more is drawn, to fill up a size that is recorded
    monkeypatch.setattr(engine_module, "GraphedFunction", None)
    images, estimates = engine.trajectory([1, 2])
    assert_close(images, want, rtol=0, atol=1e-3)
    assert len(estimates) == 4 and {x.shape for x in estimates.values()} == {images.shape}


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"sampler": "heun", "steps": 32}, 62),
        ({"sampler": "heun", "steps": 32, "guidance": 2.5}, 74),  # of which 12 are unconditional (SPEC 7)
        ({"sampler": "euler", "steps": 5}, 4),
        ({"sampler": "edm_sde", "steps": 5, "s_churn": 10.0}, 7),
        ({"sampler": "onestep"}, 1),
        ({"steps": 5, "weak": True}, 16),
    ],
)
def test_network_evaluations_are_counted(options, want):
    model = make_model(image_size=256, patch_size=64)
    options |= {"weak": model} if "weak" in options else {}
    assert SamplingEngine(model, **options).evaluations == want


def test_the_command_line_has_every_sampler_and_each_of_its_options():
    assert set(get_args(Sampler)) == set(SAMPLERS)
    common = {"denoiser", "noise", "sigmas", "y", "clamp", "step_noise", "generator", "trajectory", "steps_backend"}
    for name, function in SAMPLERS.items():
        own = {*inspect.signature(function).parameters} - common
        assert own == (set(CHURN) if name == "edm_sde" else set())


@pytest.mark.parametrize("sampler", ["heun", "euler_sde", "edm_sde"])
def test_an_image_does_not_depend_on_the_batch_it_is_in(model, sampler):
    options = {"sampler": sampler, "steps": 4, "guidance": 2.0} | churn(sampler)
    engine = SamplingEngine(model, batch_size=3, **options)
    whole = epg_fast.sample(model, LABELS, **options)
    assert whole.shape == (7, 3, 16, 16) and whole.min() >= 0 and whole.max() <= 1
    assert_close(engine(LABELS), whole, rtol=0, atol=1e-3)
    assert_close(engine(LABELS[4:6], range(4, 6)), whole[4:6], rtol=0, atol=1e-3)
    assert_close(engine([LABELS[i] for i in (6, 2)], indices=[6, 2]), whole[[6, 2]], rtol=0, atol=1e-3)
    assert not torch.equal(engine(LABELS, seed=1), whole)
    assert whole.flatten(1).unique(dim=0).shape[0] == 7


def test_a_large_run_streams_in_order_and_on_a_cpu_no_batch_waits_for_the_next(model, monkeypatch):
    engine = SamplingEngine(model, steps=3, batch_size=3)
    whole, drawn, draw = engine(LABELS), [], engine._draw
    monkeypatch.setattr(engine, "_draw", lambda inputs: drawn.append(len(inputs[0])) or draw(inputs))
    parts = []
    for part, images in engine.stream(LABELS):
        parts.append(part)
        assert torch.equal(images, whole[part]) and len(drawn) == len(parts)
    assert parts == [slice(0, 3), slice(3, 6), slice(6, 7)] and drawn == [3, 3, 1]
    for part, pixels in engine.stream(LABELS, as_uint8=True):
        assert pixels.dtype == "uint8" and (pixels == quantize(whole[part]).numpy()).all()


def test_threads_that_share_an_engine_get_their_own_images(model):
    engine = SamplingEngine(model, steps=4, guidance=2.0, batch_size=3)
    want = [engine([label] * 3, seed=label) for label in range(4)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda label: engine([label] * 3, seed=label), [0, 1, 2, 3] * 3))
    for i, images in enumerate(got):
        assert torch.equal(images, want[i % 4])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nobody_waits_for_the_device_within_a_trajectory(sampler, precision):
    model = make_model()
    options = {"weak": make_model()} if sampler == "euler" else {"guidance": 2.0} if sampler != "onestep" else {}
    engine = SamplingEngine(
        model, sampler=sampler, steps=3, precision=precision, clamp="data", **options, **churn(sampler)
    )
    inputs = torch.arange(2), torch.tensor([0]), torch.tensor([1, 2])
    engine._trajectory(*inputs)
    with NothingIsRead(), torch.no_grad():
        engine._trajectory(*inputs)


class _Replayed:
    """Stands in for a CUDA graph: what was read from anything but its own inputs stays as it was when recorded."""

    made = []

    def __init__(self, function, inputs, pool):
        self.pool = pool
        self._inputs, self._function = [x.clone() for x in inputs], function
        self.made.append([tuple(x.shape) for x in inputs])

    def __call__(self, *inputs):
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        return self._function(*self._inputs)


def test_graphs_are_recorded_once_per_size_and_the_last_batch_is_filled_up(model, monkeypatch):
    options = {"steps": 3, "guidance": 2.0, "batch_size": 3}
    want = SamplingEngine(model, **options)(LABELS, seed=4)
    monkeypatch.setattr(engine_module, "GraphedFunction", _Replayed)
    monkeypatch.setattr(_Replayed, "made", [])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    engine = SamplingEngine(model, **options)
    engine.cuda_graphs = True
    assert_close(engine(LABELS, seed=4), want, rtol=0, atol=1e-3)
    assert_close(engine(LABELS, seed=4), want, rtol=0, atol=1e-3)
    assert not torch.equal(engine(LABELS, seed=5), want)
    assert _Replayed.made == [[(3,), (1,), (3,)]]
    engine([1])
    engine([1], noise=torch.randn(1, 3, 16, 16))
    assert _Replayed.made[1:] == [[(1,), (1,), (1,)], [(1,), (1,), (1,), (1, 3, 16, 16)]]


def test_where_no_graph_can_be_recorded_the_engine_goes_on_without_and_says_why(model, monkeypatch, log):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")

    want = epg_fast.sample(model, LABELS, steps=3)
    assert not log.messages
    engine = SamplingEngine(model, steps=3, batch_size=3, cuda_graphs=True)
    monkeypatch.setattr(engine_module, "GraphedFunction", refuse)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    engine.cuda_graphs = True
    assert_close(engine(LABELS), want, rtol=0, atol=1e-3)
    assert log.messages == [
        "no CUDA graphs: the network is on cpu",
        "no CUDA graphs: operation not permitted when stream is capturing; launching kernels one by one",
    ]


OTHER_SETTINGS = [
    {"guidance": 1.5},
    {"guidance": 1.0},
    {"guidance": 3.0, "interval": (0.0, 5.0)},
    {"steps": 5},
    {"sampler": "euler", "clamp": "none"},
    {"sampler": "edm_sde", "s_churn": 40.0},
    {"sampler": "onestep"},
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("weak", [False, True])
def test_other_settings_of_an_engine_are_an_engine_of_those_settings_bit_for_bit(model, precision, weak):
    options = {"batch_size": 3, "precision": precision, "weak": make_model() if weak else None}
    first = SamplingEngine(model, steps=4, guidance=2.0, interval=(0.1, 10.0), **options)
    before = first(LABELS)
    for settings in OTHER_SETTINGS:
        anew = {"steps": 4, "guidance": 2.0, "interval": (0.1, 10.0)} | settings
        want = SamplingEngine(model, **anew, **options)
        got = first.with_settings(**settings)
        assert got.model is first.model and got.evaluations == want.evaluations
        assert torch.equal(got(LABELS, seed=3), want(LABELS, seed=3)), settings
    assert torch.equal(first(LABELS), before)
    churned = first.with_settings(sampler="edm_sde", s_churn=40.0)
    assert torch.equal(churned.with_settings(sampler="heun")(LABELS), before)
    assert not torch.equal(churned.with_settings(s_churn=0.0)(LABELS), churned(LABELS))
    with pytest.raises(ValueError, match="s_churn is 1.0: no option of heun"):
        first.with_settings(s_churn=1.0)


def test_graphs_go_with_their_engine_and_share_memory_with_those_that_are_there(model, monkeypatch):
    class Recorded:
        """Keeps no reference to the engine, as a CUDA graph does not."""

        def __init__(self, function, inputs, pool):
            self.pool, self.images = pool, function(*inputs)

        def __call__(self, *_):
            return self.images

    monkeypatch.setattr(engine_module, "GraphedFunction", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    first = SamplingEngine(model, steps=3, batch_size=3)
    first.cuda_graphs = True
    second = first.with_settings(guidance=2.0)
    first([1, 2, 3])
    second([1, 2, 3])
    (a,), (b,) = first._recorded.values(), second._recorded.values()
    assert a.pool is b.pool
    pool, gone = a.pool, weakref.ref(b)
    del a, b, second
    assert gone() is None  # at once, without the garbage collector
    third = first.with_settings(guidance=3.0)
    third([1, 2, 3])
    assert next(iter(third._recorded.values())).pool is pool
    del first, third
    alone = SamplingEngine(model, steps=3, batch_size=3).with_settings(steps=4)
    alone.cuda_graphs = True
    alone([1, 2, 3])
    assert next(iter(alone._recorded.values())).pool is not pool


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["blocks", "network"])
def test_compiled_batches_share_one_size_are_the_same_and_serve_other_settings(model, compile, monkeypatch):
    # "network" compiles the conditioning beside the network
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    options = {"steps": 4, "guidance": 2.0, "batch_size": 4}
    engine = SamplingEngine(model, **options, compile=compile)
    want = SamplingEngine(model, **options)(LABELS)
    assert_close(engine(LABELS), want, rtol=0, atol=1e-3)
    assert not counters["graph_break"]
    # for each of 4 and 2 x 4 images: one encoder block, decoder blocks with and without a skip; and the noise
    assert counters["stats"]["unique_graphs"] == {"blocks": 2 * 3 + 1, "network": 2 * 2 + 1}[compile]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for settings in ({}, {"guidance": 3.0}, {"guidance": 1.0}, {"steps": 6, "interval": (0.0, 5.0)}):
            want = SamplingEngine(model, **options | settings)(LABELS)
            assert_close(engine.with_settings(**settings)(LABELS), want, rtol=0, atol=1e-3)
    assert model.blocks[0]._compiled_call_impl is None  # the user's network stays as it is


def test_the_checkpoint_says_how_it_is_to_be_used_and_clamping_is_an_option(model):
    with torch.no_grad():  # estimates a little beyond the range of the data
        model.out.weight /= model(torch.randn(8, 3, 16, 16), torch.zeros(8), torch.zeros(8).long()).std()
    images = {c: epg_fast.sample(model, [0, 1], steps=4, clamp=c) for c in ("official", "data", "none")}
    assert not torch.equal(images["official"], images["data"]) and not torch.equal(images["data"], images["none"])
    meaning = {"normalization": "simple", "parameterization": "edm"}
    explicit = epg_fast.sample(model, [0, 1], steps=4, **meaning)
    model.metadata = meaning
    assert torch.equal(epg_fast.sample(model, [0, 1], steps=4), explicit)
    assert not torch.equal(explicit, images["official"])


def test_a_weaker_model_of_another_meaning_or_shape_is_refused(model):
    with pytest.raises(ValueError, match="the weaker model has num_classes 4, want 5"):
        epg_fast.sample(model, [0], steps=3, weak=make_model(num_classes=4))
    weak = make_model()
    for metadata in ({"parameterization": "edm"}, {"normalization": "simple"}, {"noise": {"sigma_max": 40.0}}):
        weak.metadata = metadata
        with pytest.raises(ValueError, match="autoguidance: the weaker model has"):
            epg_fast.sample(model, [0], steps=3, weak=weak, guidance=0.5)
    weak.metadata = {"parameterization": "edm", "normalization": None, "noise": {}}
    epg_fast.sample(model, [0], steps=3, weak=weak, guidance=0.5, parameterization="edm")


def test_guidance_that_no_level_sees_is_said_to_do_nothing(model, log):
    SamplingEngine(model, sampler="onestep", guidance=5.0)
    SamplingEngine(model, steps=5, guidance=5.0, interval=(100.0, 200.0))
    SamplingEngine(model, steps=32, guidance=5.0)
    SamplingEngine(model, steps=5, weak=make_model(), guidance=5.0)
    assert len(log.messages) == 2 and all("guidance 5 does nothing" in line for line in log.messages)


def test_steps_of_the_extension_are_an_option(model):
    if not epg_fast.ops.extension_status()[0]:
        pytest.skip("the extension is not built")
    for sampler in ("heun", "euler"):
        want = epg_fast.sample(model, [0, 1], sampler=sampler, steps=4)
        engine = SamplingEngine(model, sampler=sampler, steps=4, ops="steps=extension")
        assert torch.equal(engine([0, 1]), want)
        plain, (images, estimates) = SamplingEngine(model, sampler=sampler, steps=4), engine.trajectory([0, 1])
        assert torch.equal(images, want)
        assert all(torch.equal(x, estimates[s]) for s, x in plain.trajectory([0, 1])[1].items())


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([5, 6], {}, "got label 6, want labels in 0..4"),
        ([], {}, "got no labels"),
        ([0.5], {}, "got label 0.5"),
        (3, {}, "got the number 3, want labels"),
        ([0], {"steps": 1}, "steps is 1, want an integer: heun needs at least 2"),
        ([0], {"sampler": "ddim"}, "sampler 'ddim': want one of heun, euler, onestep"),
        ([0], {"s_churn": 1.0}, "s_churn is 1.0: no option of heun; edm_sde has s_churn"),
        ([0], {"sampler": "edm_sde", "s_noise": -1.0}, "s_noise is -1.0, want at least 0"),
        ([0], {"batch_size": 0}, "batch_size is 0"),
        ([0], {"clamp": "x"}, "official, data or none"),
        ([0], {"normalization": "imagenett"}, "imagenet"),
        ([0], {"parameterization": "eps"}, "x0, edm"),
        ([0], {"precision": "fp4"}, "want one of fp32, tf32, bf16, fp16, fp8"),
        ([0], {"compile": "on"}, "want one of auto, off, blocks, network"),
        ([0], {"guidance": float("nan")}, "guidance is nan"),
        ([0], {"indices": [-1]}, r"indices are \[-1\].*, want 1 numbers, none of them negative"),
        ([0], {"seed": -1}, "seed is -1"),
        ([0], {"noise": torch.zeros(1, 3, 8, 8)}, r"noise has shape \[1, 3, 8, 8\], want \[1, 3, 16, 16\]"),
        ([0], {"weak": torch.nn.Linear(2, 2)}, "got a Linear, want an EPGViT"),
    ],
)
def test_a_bad_request_says_what_is_wanted(model, labels, options, message):
    with pytest.raises(ValueError, match=message):
        epg_fast.sample(model, labels, **({"steps": 2} | options))


def test_unconditional_models_are_sampled_by_number_and_cannot_be_guided():
    model = make_model(num_classes=0)
    assert epg_fast.sample(model, 3, steps=2).shape == (3, 3, 16, 16)
    with pytest.raises(ValueError, match="unconditional"):
        epg_fast.sample(model, [0, 1], steps=2)
    with pytest.raises(ValueError, match="needs a class-conditional network"):
        epg_fast.sample(model, 2, steps=2, guidance=2.0)


def test_networks_that_cannot_be_sampled_are_refused(model):
    with pytest.raises(ValueError, match="has 1 channels, want 3"):
        epg_fast.sample(make_model(in_channels=1), [0], steps=2)
    model.metadata = {"noise": {"sigma": 1}}
    with pytest.raises(ValueError, match="noise schedule is {'sigma': 1}, want a mapping of sigma_min"):
        epg_fast.sample(model, [0], steps=2)
    model.metadata = {}
    torch.nn.init.constant_(model.out.bias, float("nan"))
    assert epg_fast.sample(model, [0], steps=2).isnan().all()
    with pytest.raises(ValueError, match="NaN"):  # which has no colour
        list(SamplingEngine(model, steps=2).stream([0], as_uint8=True))
