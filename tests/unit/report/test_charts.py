"""Axes, labels and paths of the charts."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from lora_scripts.report.charts import Series, decimal, line_chart, power, ticks


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0.31), (0.0812, 0.0829), (-3, 7), (0, 1e-4), (5, 5), (0, 0), (1, 40_000)]
)
def test_ticks_enclose_the_range_with_a_handful_of_round_numbers(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    steps = [b - a for a, b in pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_numbers_are_written_as_people_write_them() -> None:
    assert [decimal(value) for value in (0, 0.0812, 1.25, 310.4, 12_345.6)] == ["0", "0.0812", "1.25", "310", "12,346"]
    assert [power(value) for value in (0, 2e-4, 1.25e-5, 1.0)] == ["0", "2e-4", "1.25e-5", "1e0"]


def paths(chart: str, look: str) -> list[str]:
    return re.findall(rf'<path d="([^"]*)" class="{look}">', chart)


def test_curve_runs_from_the_first_to_the_last_value() -> None:
    chart = line_chart("Loss", "损失", [Series("loss", [0, 50, 100], [1.0, 0.5, 0.0])], decimal)
    assert chart is not None
    assert paths(chart, "line") == ["M0.0 0.0h0L500.0 150.0L1000.0 300.0"]
    assert "First 1, last 0, lowest 0, highest 1." in chart


def test_numbers_that_are_not_finite_interrupt_the_curve() -> None:
    values = [1.0, math.nan, 0.5, math.inf, 0.0]
    chart = line_chart("Loss", "损失", [Series("loss", [0, 25, 50, 75, 100], values)], decimal)
    assert chart is not None
    assert paths(chart, "line") == ["M0.0 0.0h0M500.0 150.0h0M1000.0 300.0h0"]


def test_chart_without_a_finite_number_is_left_out() -> None:
    assert line_chart("Loss", "损失", [Series("loss", [1, 2], [math.nan, math.nan])], decimal) is None
    assert line_chart("Loss", "损失", [Series("loss", [], [])], decimal) is None


def test_a_spike_is_cut_off_and_told() -> None:
    values = [0.1] * 99 + [50.0]
    chart = line_chart("Loss", "损失", [Series("loss", list(range(1, 101)), values)], decimal)
    assert chart is not None
    assert "1 of the points lie above the edge." in chart
    assert "highest 50." in chart
    assert ">50<" not in chart


def test_thinning_keeps_the_extremes_of_a_long_curve() -> None:
    values = [0.1] * 50_000
    values[12_345], values[40_001] = 0.25, 0.01
    chart = line_chart("Loss", "损失", [Series("loss", list(range(50_000)), values)], decimal)
    assert chart is not None
    (path,) = paths(chart, "line")
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", path)]
    assert len(heights) <= 701
    assert len(set(heights)) == 3


def test_single_report_and_a_constant_still_show_something() -> None:
    chart = line_chart("Speed", "速度", [Series("speed", [10], [3.0])], decimal)
    assert chart is not None
    assert paths(chart, "line") == ["M1000.0 150.0h0"]
