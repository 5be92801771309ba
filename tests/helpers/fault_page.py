"""The table of faults and the tests that inject them, written by a test run: `pytest --reliability-page=docs/reliability.md`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

ROWS = Path(__file__).parent.parent / "reliability" / "faults.yaml"
VARIABLE = "LORA_SCRIPTS_RELIABILITY_PAGE"

INTRO = """\
# Reliability

What can go wrong, what the product does, and which tests inject it. All of them run without a GPU, on small models.

This page is written by the test run itself: `pytest --reliability-page=docs/reliability.md`.
A test names the row it proves with `@pytest.mark.fault(N)`; the rows are in `tests/reliability/faults.yaml`.
"""


class FaultPage:
    """Collects what became of the tests of each row, and writes the page at the end."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._rows: dict[str, list[int]] = {}
        self._outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = set(read_rows())
        for item in items:
            rows = [number for mark in item.iter_markers("fault") for number in mark.args]
            if unknown := set(rows) - known:
                raise pytest.UsageError(f"{item.nodeid}: no such fault: {sorted(unknown)}; see {ROWS}")
            if rows:
                self._rows[item.nodeid] = rows

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self._rows and (report.when == "call" or not report.passed):
            worst = "failed" if self._outcomes.get(report.nodeid) == "failed" else report.outcome
            self._outcomes[report.nodeid] = worst

    def pytest_sessionfinish(self) -> None:
        self._target.write_text(self.page(), encoding="utf-8", newline="\n")

    def page(self) -> str:
        """The whole page as Markdown."""
        lines = [INTRO, "| # | fault | what the product does | tests | result |", "|---|---|---|---|---|"]
        for number, row in read_rows().items():
            tests = {test: outcome for test, outcome in self._outcomes.items() if number in self._rows[test]}
            names = sorted({test.split("[")[0].removeprefix("tests/") for test in tests})
            shown = "<br>".join(f"`{name}`" for name in names)
            lines.append(f"| {number} | {row['fault']} | {row['does']} | {shown} | {_result(list(tests.values()))} |")
        return "\n".join(lines) + "\n"


def _result(outcomes: list[str]) -> str:
    ran = [outcome for outcome in outcomes if outcome != "skipped"]
    if not ran:
        return "not tested"
    failed = ran.count("failed")
    skipped = f", {len(outcomes) - len(ran)} skipped here" if len(ran) < len(outcomes) else ""
    return f"{failed} of {len(ran)} failed{skipped}" if failed else f"{len(ran)} passed{skipped}"


def read_rows() -> dict[int, dict[str, str]]:
    """number -> {fault, does}."""
    rows: dict[int, dict[str, str]] = yaml.safe_load(ROWS.read_text("utf-8"))
    return rows


def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--reliability-page", type=Path, metavar="FILE", help="write the table of faults and tests there")


def configure(config: pytest.Config) -> None:
    chosen = config.getoption("--reliability-page") or os.environ.get(VARIABLE)
    if chosen:
        config.pluginmanager.register(FaultPage(Path(chosen)), "fault-page")
