"""The documents: nothing unfinished, no dead link, no command that does not exist."""

import re
from pathlib import Path

import pytest

from epg_fast.__main__ import _JOBS
from epg_fast.flags import RECIPES

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/SPEC.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_pictures_exist_and_nothing_is_left_open(name):
    text = (ROOT / name).read_text()
    assert "@@" not in text and "TODO" not in text
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / name).parent.joinpath(target).exists(), target


def test_commands_and_recipes_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    jobs = re.findall(r"(?:^|[`\s])epg-fast ([a-z-]+)|-m epg_fast ([a-z-]+)", text)
    assert jobs and {a or b for a, b in jobs} <= set(_JOBS)
    recipes = re.findall(r"--config ([a-z0-9_]+)", text)
    assert recipes and all((RECIPES / f"{name}.yaml").is_file() for name in recipes)
    assert set(re.findall(r"^make (\w+)", text, re.M)) == {"demo", "test", "bench"}
