"""`evaluate --reference`: figures against independent computations, what is recorded, and every unsuitable file."""

import numpy as np
import pytest
import torch

from epg_fast.config import EvaluateConfig
from epg_fast.evaluation import evaluate_images, frechet_distance, inception_score, judge, precision_recall
from epg_fast.evaluation import reference as references
from epg_fast.evaluation.networks import Inception
from epg_fast.evaluation.reference import open_reference
from tests.evaluation.samples import pictures, save_npz, save_pngs

SIZE = 8
FAKE, REAL = pictures(0, 60, SIZE, contrast=25), pictures(1, 80, SIZE)
NOTE = {"labels": "balanced", "sampler": "heun", "steps": 18, "guidance": 1.5, "interval": [0.19, 1.61], "seed": 7}


@pytest.fixture(scope="module")
def features(tiny_inception):
    network = Inception(tiny_inception, torch.device("cpu"))

    def of(images):
        return (*network.rows(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).values(),)

    return of


def moments(features):
    features = features.double().numpy()
    return features.mean(axis=0), np.cov(features, rowvar=False)


@pytest.fixture
def files(tmp_path, tiny_inception):
    """Paths of samples and of references of every kind."""
    save_npz(FAKE, np.arange(60) % 10, tmp_path / "samples.npz", **NOTE)
    save_npz(REAL, np.arange(80) % 10, tmp_path / "real.npz")
    save_pngs(REAL, np.arange(80) // 8, tmp_path / "folder")
    save_pngs(REAL, np.zeros(80, int), tmp_path / "flat")
    (tmp_path / "inception.pt").symlink_to(tiny_inception)
    return tmp_path


def config(files, reference="real.npz", samples="samples.npz", **fields):
    paths = {"samples": samples, "reference": reference, "inception": "inception.pt"}
    return EvaluateConfig(**{name: str(files / path) for name, path in paths.items()}, device="cpu", **fields)


@pytest.mark.parametrize(("neighbors", "splits"), [(3, 10), (1, 2)])
def test_figures_equal_those_of_independent_computations(files, features, neighbors, splits):
    result = evaluate_images(config(files, batch_size=7, neighbors=neighbors, splits=splits))
    (fake, probabilities), (real, _) = features(FAKE), features(REAL)
    assert result["fid"] == pytest.approx(frechet_distance(*moments(fake), *moments(real)), rel=1e-5)
    score = inception_score(probabilities.numpy(), splits)
    assert (result["inception_score"], result["inception_score_std"]) == pytest.approx(score, rel=1e-5)
    assert (result["precision"], result["recall"]) == precision_recall(real, fake, neighbors)
    assert result["fid"] > 10 and precision_recall(real, fake, 1) != precision_recall(real, fake, 3)
    sampling = result["protocol"]["sampling"]
    assert sampling.items() >= (NOTE | {"num": 60, "evaluations": None, "checkpoint": None}).items()
    network = result["protocol"]["judging"]["judges"]["inception"]["network"]
    assert network["kind"] == "torchscript" and len(network["sha256"]) == 64
    assert "60 samples of 8x8 pixels, 6 features of the torchscript network" in result["protocol"]["text"]
    assert f"FID: against 80 reference images. Inception Score: {splits} splits" in result["protocol"]["text"]


def test_any_batch_size_and_every_kind_of_reference_give_the_same_figures(files):
    names = ("fid", "fid_infinity", "inception_score", "precision", "recall")
    expected = evaluate_images(config(files))
    for reference, batch_size in (("real.npz", 11), ("folder", 64), ("flat/0000", 80)):
        result = evaluate_images(config(files, reference, batch_size=batch_size))
        # sums of 80 float64 terms, whose cancellation in a covariance of levels costs some thousand times eps
        assert [result[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-9)
    again = evaluate_images(config(files))
    assert again["protocol"]["judging"].pop("seconds") != expected["protocol"]["judging"].pop("seconds") > 0
    assert again == expected


def test_stored_statistics_are_what_fid_is_measured_against(files, features):
    mu, sigma = moments(features(pictures(5, 300, SIZE, contrast=60))[0])
    fake, real = features(FAKE)[0], features(REAL)[0]
    want = pytest.approx(frechet_distance(*moments(fake), mu, sigma), rel=1e-5)
    np.savez(files / "adm.npz", arr_0=REAL, mu=mu, sigma=sigma, mu_s=np.zeros(9), sigma_s=np.zeros((9, 9)))
    result = evaluate_images(config(files, "adm.npz"))
    assert result["fid"] == want != pytest.approx(frechet_distance(*moments(fake), *moments(real)), rel=0.01)
    assert (result["precision"], result["recall"]) == precision_recall(real, fake)
    assert "against the mean and covariance stored in the reference" in result["protocol"]["text"]
    np.savez(files / "stats.npz", mu=mu, sigma=sigma)  # without images there is no precision
    result = evaluate_images(config(files, "stats.npz"))
    assert result["fid"] == want and "no images (arr_0)" in result["missing"]["precision"]
    assert result["precision"] is None and result["recall"] is None and result["num_reference_images"] is None
    assert "Precision and recall: not computed" in result["protocol"]["text"]


def test_of_large_sets_images_at_even_distances_are_compared(files, features, monkeypatch):
    for module in (judge, references):
        monkeypatch.setattr(module, "MOST_COMPARED", 21)
    result = evaluate_images(config(files, batch_size=13))
    fake, real = features(FAKE)[0], features(REAL)[0]
    chosen = [np.linspace(0, n - 1, 21).round().astype(int) for n in (80, 60)]
    assert (result["precision"], result["recall"]) == precision_recall(real[chosen[0]], fake[chosen[1]])
    assert result["fid"] == pytest.approx(frechet_distance(*moments(fake), *moments(real)), rel=1e-5)
    assert "21 samples and 21 reference images, 3 neighbours" in result["protocol"]["text"]


def test_what_would_say_little_is_said(files, log):
    save_npz(FAKE[:40], np.arange(40) % 10, files / "forty.npz", **NOTE)
    result = evaluate_images(config(files, compare=str(files / "forty.npz"), bootstrap=0))
    differs = {name: found["differs"] for name, found in result["compared"].items() if isinstance(found, dict)}
    assert {name for name, verdict in differs.items() if verdict is None} == {"fid", "inception_score", "recall"}
    said = "\n".join(log.messages)
    assert f"\nfid {result['fid']:.5g} +- {result['spread']['fid']:.2g} (60 images)" in said
    assert "holds 60 images and" in said and "give equal numbers" in said and "do not determine" not in said
    save_npz(FAKE[:6], np.arange(6), files / "few.npz", **NOTE)
    result = evaluate_images(config(files, samples="few.npz", splits=1, bootstrap=0))
    assert result["spread"]["fid"] is None and "fid_infinity" not in result
    result = evaluate_images(config(files, samples="real.npz", bootstrap=0))
    assert result["fid"] == pytest.approx(0, abs=1e-6) and (result["precision"], result["recall"]) == (1, 1)
    for text in ("6 samples do not determine a covariance of 6 features", "is judged against itself"):
        assert any(text in message for message in log.messages)


def test_a_kept_reference_is_seen_anew_when_its_images_have_changed(files, monkeypatch):
    def kept():
        judge.open_judges(config(files, "flat/0000"), (SIZE, SIZE), torch.device("cpu"), files / "cache")
        return sorted(path.name for path in (files / "cache").iterdir())

    first, calls, see = kept(), [], judge.see
    monkeypatch.setattr(judge, "see", lambda *arguments: calls.append(1) or see(*arguments))
    assert kept() == first and len(first) == 1 and not calls
    path = next((files / "flat" / "0000").iterdir())
    path.write_bytes(path.read_bytes() + b" ")
    assert len(kept()) == 2 and calls == [1]


MU, SIGMA = np.zeros(6), np.full((6, 6), 0.5)
UNSUITABLE = [
    ({"images": REAL}, r"expected arr_0 \(images\), or mu and sigma \(statistics\), found \['images'\]"),
    ({"mu": MU}, r"expected sigma, found \['mu'\]"),
    ({"mu": np.zeros(5), "sigma": SIGMA}, r"mu must be floating point \[6\].* got float64 \[5\]"),
    ({"mu": MU * np.nan, "sigma": SIGMA}, "mu or sigma holds values that are not finite"),
    ({"mu": MU, "sigma": SIGMA + np.eye(6, k=1)}, "sigma is not symmetric"),
    ({"mu": MU, "sigma": -np.eye(6)}, "sigma has variances below 0"),
    ({"arr_0": REAL[:, :7]}, "its images are 8x7, the samples 8x8; take a reference of the samples' size"),
    ({"arr_0": REAL, "mu": np.zeros(2048), "sigma": SIGMA}, r"got float64 \[2048\]; take statistics of this"),
    ({"arr_0": REAL[:3]}, "holds 3 images, want more than the 3 neighbours"),
]
FEW = [
    (9, {}, r"few\.npz holds 9 images, want at least 10: one per split.*--splits \(now 10\)"),
    (1, {"splits": 1, "neighbors": 1}, "holds 1 images, want at least 2"),
    (3, {"splits": 1}, "want at least 4: .* more than there are neighbours"),
    (60, {"repeats": 7}, "repeats is 7, which does not divide the 60 images"),
    (60, {"repeats": 10}, "holds 6 images in each of the repeats, want at least 10"),
]


def test_unsuitable_references_and_samples_are_refused_before_the_network_runs(files, monkeypatch):
    monkeypatch.setattr(judge.NetworkJudge, "rows", None)
    for arrays, message in UNSUITABLE:
        np.savez(files / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=rf"bad\.npz.*{message}"):
            evaluate_images(config(files, "bad.npz"))
    for num, fields, message in FEW:
        save_npz(FAKE[:num], np.arange(num), files / "few.npz")
        with pytest.raises(ValueError, match=message):
            evaluate_images(config(files, samples="few.npz", **fields))
    with pytest.raises(ValueError, match=r"folder holds class folders, .*; give the samples\.npz"):
        evaluate_images(config(files, samples="folder", repeats=2))


def test_float32_statistics_become_float64(tmp_path):
    sigma = np.cov(np.random.default_rng(0).normal(size=(50, 6)), rowvar=False).astype(np.float32)
    sigma[0, 1] *= 1 + 1e-6
    np.savez(tmp_path / "stats.npz", mu=np.ones(6, np.float32), sigma=sigma)
    mean, covariance = open_reference(tmp_path / "stats.npz", 6, (8, 8)).statistics
    assert mean.dtype == covariance.dtype == np.float64 and np.array_equal(covariance, sigma)
