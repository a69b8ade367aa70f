"""The gauge of sizes and the tiers' budgets say what they are for."""

import types

from tests.tiers import Tier
from tools import size


def test_growth_since_the_last_release_is_shown(tmp_path):
    for name, lines in {"epg_fast/models/blocks.py": 3, "epg_fast/config.py": 2, "tools/size.py": 4}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n" * lines)
    (tmp_path / "epg_fast/models/notes.md").write_text("no code\n")
    before = size.table(size.count(tmp_path))
    assert "| epg_fast               |     2 |      5 |" in before
    assert size.report(size.count(tmp_path), before).splitlines()[1].split() == ["epg_fast", "2", "5", "-"]

    (tmp_path / "epg_fast/models/encoder.py").write_text("x\n" * 7)
    (tmp_path / "tools/size.py").unlink()
    said = size.report(size.count(tmp_path), f"text\n\n{before}\n\ntext")
    assert "+7 lines, +1 files" in said and "-4 lines, -1 files" in said and "encoder 7, blocks 3" in said


def test_the_table_of_the_guide_can_be_read():
    found = size.ROW.findall((size.ROOT / "CONTRIBUTING.md").read_text())
    assert {"epg_fast", "epg_fast/ops", "kernels/csrc", "tests/ops"} <= {name for name, _, _ in found}


def test_a_tier_names_what_is_slow_and_that_it_is_over_its_budget():
    said, tier = [], Tier(budget=0)
    terminal = types.SimpleNamespace(section=said.append, write_line=lambda line, **colours: said.append(line))
    for name, seconds, marks in (("a", 4.0, {}), ("b", 5.0, {"slow": 1}), ("c", 1.0, {})):
        for duration in (seconds, 0.0):  # set-up and call
            tier.pytest_runtest_logreport(types.SimpleNamespace(nodeid=name, duration=duration, keywords=marks))
    tier.pytest_terminal_summary(terminal)
    assert [line.split()[-1] for line in said[1:4]] == ["b", "a", "c"]
    assert "above 3 s and not marked slow: a" in said and any(line.startswith("OVER BUDGET") for line in said)
