"""What a tier of tests takes: its budget, its slowest tests, and tests that belong to a slower tier.

`make check` leaves out what is marked `slow` or `kernels`, `make test` runs the slow ones too, `make kernels` the rest.
"""

import time
from collections import Counter

LIMIT = 3.0
"""Seconds above which a test is to be marked `slow`."""


class Tier:
    """Pytest's plugin for `--budget SECONDS`."""

    def __init__(self, budget: float):
        self.budget, self.begun = budget, time.monotonic()
        self.seconds, self.marked = Counter(), set()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if "slow" in report.keywords or "kernels" in report.keywords:
            self.marked.add(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter):
        took, say = time.monotonic() - self.begun, terminalreporter.write_line
        terminalreporter.section(f"{took:.0f} s of a budget of {self.budget:.0f} s")
        for name, seconds in self.seconds.most_common(10):
            say(f"{seconds:7.1f} s  {name}")
        late = [name for name, seconds in self.seconds.items() if seconds > LIMIT and name not in self.marked]
        if late:
            say(f"above {LIMIT:.0f} s and not marked slow: {', '.join(late)}", yellow=True)
        if took > self.budget:
            say(f"OVER BUDGET: {took:.0f} s, wanted at most {self.budget:.0f} s (two cores)", red=True)


def pytest_addoption(parser):
    parser.addoption(
        "--budget", type=float, metavar="SECONDS", help="what this tier may take; says so if it takes more"
    )


def pytest_configure(config):
    if (budget := config.getoption("--budget")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Tier(budget))
