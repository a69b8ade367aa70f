"""The notebook, which is a script, in its small form."""

import re
import runpy
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "digits.py"


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("agg")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EPG_NOTEBOOK_SMALL", "1")
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(NOTEBOOK))
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "network evaluations an image" in said and "\nthe same image\n" in said
    assert re.search(r"^plain: [\d.]+ ms .* differ by 0\.0e\+00 at most$", said, re.M)
    figures = r"[\d.]+ \+- [\d.]+, unguided [\d.]+; apart by [+-][\d.]+ \+- [\d.]+, (no )?more than chance$"
    for name in ("accuracy", "frechet_distance"):
        assert re.search(rf"^{name}: {figures}", said, re.M), said
