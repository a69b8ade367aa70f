"""Small images judged without a network: accuracy and a Frechet distance, and how they are to be read."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from epg_fast.config import EvaluateConfig
from epg_fast.evaluation import evaluate_images, frechet_distance, load_images
from epg_fast.wording import import_extra
from tests.evaluation.samples import save_npz, save_pngs


@pytest.fixture(scope="module")
def arrays(digits):
    """(train pixels, train labels, test pixels, test labels) of the digits, pixels in [0, 1]."""
    return *load_images(digits / "train", 8), *load_images(digits / "test", 8)


def enlarged(features, size=32):
    levels = np.rint(features * 255).astype(np.uint8).reshape(-1, 8, 8)
    return np.stack(
        [np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")) for x in levels]
    )


def config(digits, **fields):
    return EvaluateConfig(**{"train": str(digits / "train"), "test": str(digits / "test")} | fields)


@pytest.fixture(scope="module")
def real_result(digits, arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "samples.npz"
    save_npz(enlarged(arrays[0][::3]), arrays[1][::3], path, sampler="heun", steps=18, s_max=float("inf"))
    return evaluate_images(config(digits, samples=str(path)))


def test_enlarged_real_digits_score_like_real_ones(real_result):
    assert real_result["accuracy"] > 0.98 and real_result["classifier_accuracy"] > 0.98
    resized = real_result["baselines"]["real_resized_frechet_distance"]
    assert 0.15 < resized < 0.3
    assert real_result["frechet_distance"] == pytest.approx(resized, abs=0.05)
    assert real_result["baselines"]["real_frechet_distance"] < 0.12


def test_the_distance_is_that_of_the_principal_components_of_the_training_images(arrays, real_result):
    pca = pytest.importorskip("sklearn.decomposition").PCA(20, svd_solver="full").fit(arrays[0])
    chosen = np.linspace(0, len(arrays[0]) - 1, 449).round().astype(int)
    drawn, held_out = pca.transform(arrays[0][chosen]), pca.transform(arrays[2])
    wanted = frechet_distance(drawn.mean(axis=0), np.cov(drawn.T), held_out.mean(axis=0), np.cov(held_out.T))
    assert real_result["baselines"]["real_frechet_distance"] == pytest.approx(wanted, rel=1e-9)


def test_recall_counts_each_class_by_itself(digits, arrays, tmp_path):
    test_x, test_y = arrays[2:]
    images = np.concatenate([test_x[test_y == 0][:8], test_x[test_y == 1][:4]])
    labels = np.array([0] * 6 + [3] * 2 + [1] * 4)
    save_npz(enlarged(images, 8), labels, tmp_path / "s.npz")
    result = evaluate_images(config(digits, samples=str(tmp_path / "s.npz"), components=5, bootstrap=0))
    assert result["per_class_recall"] == {"0": 1.0, "1": 1.0, "3": 0.0}
    assert result["accuracy"] == pytest.approx(10 / 12)
    # of the real size: compared as they are
    assert result["baselines"]["real_resized_frechet_distance"] is None


def test_result_states_sizes_and_protocol_and_survives_json(real_result):
    assert json.loads(json.dumps(real_result, allow_nan=False)) == real_result
    assert [real_result[key] for key in ("num_samples", "num_train", "num_test")] == [449, 1347, 450]
    assert (real_result["stored_size"], real_result["size"], real_result["components"]) == (32, 8, 20)
    sampling = real_result["protocol"]["sampling"]
    assert (sampling["num"], sampling["sampler"], sampling["steps"], sampling["s_max"]) == (449, "heun", 18, "inf")
    assert "449 samples of 32x32 pixels, compared as 8x8 grayscale" in real_result["protocol"]["text"]
    assert "450 held-out real images (as stored)" in real_result["protocol"]["text"]


def test_class_means_pass_the_accuracy_and_fail_the_distance(digits, arrays, tmp_path, real_result):
    train_x, train_y = arrays[:2]
    means = np.stack([train_x[train_y == label].mean(axis=0) for label in range(10)])
    labels = np.repeat(np.arange(10), 40)
    save_pngs(enlarged(means)[labels], labels, tmp_path)
    result = evaluate_images(config(digits, samples=str(tmp_path)))
    assert result["accuracy"] == 1 and result["frechet_distance"] > 1.2
    baselines = real_result["baselines"]
    assert baselines["class_means_accuracy"] == 1
    assert baselines["class_means_frechet_distance"] == pytest.approx(result["frechet_distance"], abs=0.05)


def test_missing_settings_and_unequal_classes_are_named(digits, arrays, tmp_path):
    other = str(tmp_path / "other")
    (tmp_path / "other" / "zero").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "other" / "zero" / "a.png")
    save_pngs(enlarged(arrays[0][:5]), np.full(5, 3), tmp_path / "some")
    save_npz(enlarged(arrays[0][:2]), np.array([3, 10]), tmp_path / "s.npz")
    for samples, fields, message in (
        ("s.npz", {"test": None}, "--test is missing; pass --train and --test"),
        ("s.npz", {"test": other}, "same class folders.*'zero'"),
        ("s.npz", {"train": other, "test": other}, "one class, zero, want two at least.*--reference"),
        ("some", {}, r"1 class folders and .* 10"),  # they would be renumbered
        ("s.npz", {}, r"labels that no training image has: \[10\]"),
        ("s.npz", {"components": 0}, r"components is 0, want 1 to 64"),
        ("s.npz", {"components": 65}, r"components is 65, want 1 to 64"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_images(config(digits, samples=str(tmp_path / samples), **fields))


def test_a_missing_extra_is_reported_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install 'epg_fast\[demo\]'"):
        import_extra("sklearn.svm")


@pytest.mark.slow
def test_importing_the_package_needs_no_extra():
    program = (
        "import sys, epg_fast.evaluation, epg_fast.evaluation.probe\n"
        "print([m for m in ('sklearn', 'scipy', 'matplotlib', 'torch_fidelity') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
