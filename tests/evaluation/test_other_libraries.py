"""The figures are torch-fidelity's and clean-fid's, by their own code, where they compute the same thing.

Both import torchvision, of which hardly any of what is tested here makes use: where it is missing (or made for another
torch) a stand-in lets them be imported.
"""

import importlib
import importlib.util
import inspect
import sys
from unittest.mock import MagicMock
from urllib.error import URLError

import numpy as np
import pytest
import torch

from epg_fast.evaluation import frechet_distance, inception_score, precision_recall
from epg_fast.evaluation.kernel_distance import Kernel
from epg_fast.evaluation.networks import Dinov2, Inception

CPU = torch.device("cpu")
EPS = np.finfo(float).eps
TORCHVISION = ("", ".datasets", ".models", ".models.inception", ".transforms", ".transforms.functional")


def normalize(x, mean, std, inplace):
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (x - mean) / std


@pytest.fixture(scope="module")
def library():
    """Import a module of one of the two libraries by its dotted name, or skip the test."""
    others = ("torch_fidelity", "cleanfid")
    with pytest.MonkeyPatch.context() as patch:
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError):
            for name in TORCHVISION:
                patch.setitem(sys.modules, f"torchvision{name}", MagicMock())
            sys.modules["torchvision"].transforms.functional.normalize = normalize
        # clean-fid downloads with it.
        if importlib.util.find_spec("requests") is None:
            patch.setitem(sys.modules, "requests", MagicMock())

        def load(name):
            if importlib.util.find_spec(root := name.partition(".")[0]) is None:
                pytest.skip(f"{root} is not installed; `make install` has it")
            return importlib.import_module(name)

        yield load
    for name in [name for name in sys.modules if name.partition(".")[0] in others]:
        del sys.modules[name]


def features(num, dim, seed, shift=0.0):
    """Positive and correlated, as Inception's are; float32."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(num, dim)) @ np.random.default_rng(99).normal(size=(dim, dim)) / dim**0.5
    return torch.from_numpy(np.abs(mixed + shift).astype(np.float32))


def moments(rows):
    rows = rows.double().numpy()
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


@pytest.mark.parametrize(("num", "dim"), [(400, 32), (60, 96)], ids=["full rank", "fewer images than features"])
def test_fid(library, num, dim):
    fake, real = features(num, dim, 0, shift=0.3), features(num + 50, dim, 1)
    ours = frechet_distance(*moments(fake), *moments(real))
    metric = library("torch_fidelity.metric_fid")

    def their_fid(*sets):
        statistics = map(metric.fid_features_to_statistics, sets)
        return metric.fid_statistics_to_metric(*statistics, verbose=False)[metric.KEY_METRIC_FID]

    theirs = their_fid(fake.double(), real.double())
    # They take roots of eigenvalues of the product, each wrong by dim EPS |cov|^2: of one that is 0, by the root of it.
    size = max(np.linalg.norm(cov, 2) for _, cov in map(moments, (fake, real)))
    tolerance = dim * size * (1e-11 if num > dim else (dim * EPS) ** 0.5)
    assert ours > 1000 * tolerance and abs(ours - theirs) < tolerance
    # A general matrix root of a singular product is what clean-fid warns of.
    if num > dim:
        assert ours == pytest.approx(their_fid(fake, real), rel=1e-5)  # of means in float32, as it takes them itself
        assert abs(ours - library("cleanfid.fid").frechet_distance(*moments(fake), *moments(real))) < tolerance


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_kid(library, shift):
    fake, real = features(300, 64, 0, shift), features(350, 64, 1)
    ours = Kernel(fake, real, subsets=20, size=100)
    metric = library("torch_fidelity.metric_kid")

    def theirs(fake, real):
        found = metric.kid_features_to_metric(fake, real, kid_subsets=20, kid_subset_size=100, verbose=False)
        return found[metric.KEY_METRIC_KID_MEAN], found[metric.KEY_METRIC_KID_STD]

    # Means of kernels of about `scale`; the distance is what cancellation leaves of them.
    scale = (float(real.double().square().mean()) + 1) ** 3

    def equals_ours(*found, eps):
        wanted = (ours.value, ours.facts["std"])[: len(found)]
        return found == pytest.approx(wanted, rel=0, abs=100 * float(eps) * scale)

    assert equals_ours(*theirs(fake.double(), real.double()), eps=EPS)
    assert equals_ours(*theirs(fake, real), eps=np.finfo(np.float32).eps) and ours.facts["std"] > 1e-3
    # clean-fid draws from numpy's own generator, the subset of its second argument first.
    np.random.seed(2020)
    found = library("cleanfid.fid").kernel_distance(real.double().numpy(), fake.double().numpy(), 20, 100)
    assert equals_ours(found, eps=EPS)
    defaults, signature = library("torch_fidelity.defaults").DEFAULTS, inspect.signature(Kernel).parameters
    for name, their_name in (("subsets", "kid_subsets"), ("size", "kid_subset_size"), ("seed", "rng_seed")):
        assert signature[name].default == defaults[their_name]


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score(library, splits):
    logits = torch.from_numpy(np.random.default_rng(0).normal(scale=3, size=(500, 20)))
    metric = library("torch_fidelity.metric_isc")
    found = metric.isc_features_to_metric(logits, splits=splits)
    theirs = found[metric.KEY_METRIC_ISC_MEAN], found[metric.KEY_METRIC_ISC_STD]
    assert inception_score(logits.softmax(dim=1).numpy(), splits) == pytest.approx(theirs, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall(library, k):
    fake, real = features(300, 8, 0, shift=0.4), features(350, 8, 1)
    ours = precision_recall(real, fake, k)
    assert 0.05 < min(ours) < max(ours) < 0.95
    metric = library("torch_fidelity.metric_prc")
    for save_cpu_ram in (False, True):
        how = {"prc_neighborhood": k, "prc_batch_size": 100, "save_cpu_ram": save_cpu_ram, "verbose": False}
        found = metric.prc_features_to_metric(fake.double(), real.double(), **how)
        # shares, which they hold in float32
        assert (found["precision"], found["recall"]) == pytest.approx(ours, rel=1e-7)


class Images(list, torch.utils.data.Dataset):
    """uint8 [3, H, W] each, as torch-fidelity takes them."""


def noisy_colours(seed, num=6, size=16):
    """uint8 [N, 3, H, W]: noise of any contrast around any colour."""
    generator = torch.Generator().manual_seed(seed)
    colour = 255 * torch.rand(num, 3, 1, 1, generator=generator)
    contrast = torch.rand(num, 1, 1, 1, generator=generator)
    noise = torch.randn(num, 3, size, size, generator=generator)
    return (colour + 80 * contrast * noise).clip(0, 255).to(torch.uint8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_figures_of_images_with_its_own_inception(library, tmp_path):
    """`calculate_metrics` on images against our network and figures, with random weights in its architecture."""
    path = tmp_path / "weights.pth"
    torch.save(random_inception(library), path)
    fake, real = noisy_colours(0), noisy_colours(1)
    # Without FID, whose figure of 6 images is nothing but roots of the rounding errors of 2000 eigenvalues.
    how = dict.fromkeys(("isc", "kid", "prc"), True) | dict.fromkeys(("cuda", "cache", "verbose"), False)
    how |= {"isc_splits": 1, "kid_subset_size": 5, "kid_subsets": 5, "batch_size": 6}
    # Its own choice for precision and recall is VGG-16.
    how |= {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(path)}
    theirs = library("torch_fidelity").calculate_metrics(input1=Images(fake), input2=Images(real), **how)
    network = Inception(path, CPU)
    assert network.kind == "torch-fidelity" and network.num_features == 2048
    drawn, probabilities = network.rows(fake).values()
    wanted = network.features(real)
    assert inception_score(probabilities.numpy(), 1)[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert theirs["inception_score_mean"] > 1.1
    kid = Kernel(drawn, wanted, subsets=5, size=5)
    scale = (float(wanted.double().square().mean()) + 1) ** 3
    assert kid.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=0, abs=1e-5 * scale)
    shares = precision_recall(wanted, drawn)
    assert 0 < min(shares) < max(shares) < 1
    assert shares == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)


def random_inception(library):
    """A state dict of torch-fidelity's Inception, whose features tell images apart."""
    module = library("torch_fidelity.feature_extractor_inceptionv3")

    class Unloaded(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        network = Unloaded("inception", ["2048"])
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.nn.init.normal_(network.fc.weight)
    return network.state_dict()


HUBCONF = """
import torch

def dinov2_vits14(**kwargs):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 384, 14, stride=14), torch.nn.Flatten(2), torch.nn.Softmax(2))
    torch.nn.init.normal_(network[0].weight, std=0.05, generator=torch.Generator().manual_seed(1))
    return torch.nn.Sequential(network, torch.nn.AdaptiveMaxPool1d(1), torch.nn.Flatten())
"""


def test_dinov2_comes_from_the_folder_of_torch_hub_without_a_network(library, tmp_path, monkeypatch):
    library("torch_fidelity.feature_extractor_dinov2")
    monkeypatch.setenv("XFORMERS_DISABLED", "0")  # torch-fidelity sets it

    def unreachable(*args, **kwargs):
        raise URLError("unknown host")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(ValueError, match=r"gives no dinov2-vit-s-14 \(It looks like there is no internet connection"):
        Dinov2("dinov2-vit-s-14", CPU)
    (tmp_path / "facebookresearch_dinov2_main").mkdir()
    (tmp_path / "facebookresearch_dinov2_main/hubconf.py").write_text(HUBCONF)
    network = Dinov2("dinov2-vit-s-14", CPU)
    images = torch.randint(0, 256, (3, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # ImageNet's mean and deviation, as DINOv2 was trained with; nothing to resize.
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()[:, :, None, None]
    module = {}
    exec(HUBCONF, module)
    with torch.no_grad():
        wanted = module["dinov2_vits14"]().double()((images.double() / 255 - mean) / std)
    found = network.features(images)
    assert network.num_features == 384 and network.kind == "torch-fidelity" and len(network.description["sha256"]) == 64
    assert torch.allclose(found.double(), wanted, rtol=1e-4) and wanted.std(dim=0).mean() > 1e-4
    with pytest.raises(ValueError, match=r"gives no dinov2-vit-b-14 \(.*Cannot find callable dinov2_vitb14 in hubconf"):
        Dinov2("dinov2-vit-b-14", CPU)
