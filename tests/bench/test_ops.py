"""Operations are measured against their rivals, and what is wrong is not reported."""

from bench import ops
from bench.results import read_json
from tests.ops.kernel_checks import DEVICE


def measure(tmp_path, *flags):
    code = ops.main(["--output", str(tmp_path / "ops.json"), *flags])
    path = tmp_path / "ops.json"
    return code, read_json(path)["rows"] if path.exists() else []


def test_a_variant_has_its_time_and_its_share_of_what_the_machine_can_do(tmp_path, monkeypatch):
    for name in ("large_copy", "large_product"):
        monkeypatch.setattr(ops, name, lambda device: 1e15)
    code, rows = measure(tmp_path, "--ops", "euler_step", "patch_loss", "--variants", "eager", "--main-shapes")
    kinds = [(row["job"], row["shape"].partition("], ")[2], row["dtype"]) for row in rows]
    steps = ["forward", "forward+backward"]
    tokens = ("bf16 tokens, fp32 images", "fp32")
    wanted = [("patch_loss", f"{s}, {form}", t) for form in ("denoising", "consistency") for t in tokens for s in steps]
    assert code == 0 and kinds == [*wanted, ("euler_step", "forward", "fp32")]
    for row in rows:
        assert 0 < row["p20"] <= row["median"] <= row["p80"] and row["unit"] == "us"
        assert 0 < row["details"]["percent_of_copy"] < 100 and row["details"]["tflops"] == 0  # no products


def test_a_wrong_variant_is_named_and_not_reported(tmp_path, monkeypatch, capsys):
    name = "eager" if DEVICE == "cpu" else "compile"
    wrong = ops.Rival(lambda x, denoised, **_: 2 * x)
    monkeypatch.setattr(ops, "variants_of", lambda measured: {name: wrong})
    code, rows = measure(tmp_path, "--ops", "euler_step", "--main-shapes")
    assert code == 1 and not rows and "output 0: error" in capsys.readouterr().err
