"""Line charts as inline SVG. The curves stretch with the page; labels are HTML beside them, so text never does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lora_scripts.report.markup import Html, el, join, zh

__all__ = ["Series", "count", "decimal", "line_chart", "power", "ticks"]

_MAX_POINTS = 700
"""More points than a screen has columns only make the file bigger."""
_BUSY = 40
"""How often a curve may cross its own range before it is drawn thinner."""
_WIDTH, _HEIGHT = 1000.0, 300.0


@dataclass(frozen=True)
class Series:
    """One curve. `look` is a class of the style sheet: "line", "faint" or "second"."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    look: str = "line"


def line_chart(
    title: str,
    chinese: str,
    series: Sequence[Series],
    show: Callable[[float], str],
    unit: str = "",
    marks: Sequence[tuple[float, str]] = (),
    limit: tuple[float, str] | None = None,
    from_zero: bool = False,
    wide: bool = False,
) -> Html | None:
    """A figure with the curves over the steps, or None when they hold no finite number.

    Args:
        show: writes a value for labels.
        marks: (x, what) drawn as small marks on the x axis: checkpoints.
        from_zero: start the y axis at zero, for amounts whose size matters more than their movement.
        limit: (y, what) drawn as a dashed line when it lies in the plot.
    """
    drawn = [_thin(each) for each in series]
    finite = [y for each in drawn for y in each.ys if math.isfinite(y)]
    if not finite:
        return None
    last_x = max(x for each in drawn for x in each.xs)
    first_x = 0.0 if last_x > 0 else last_x - 1
    y_ticks = ticks(*_range([0.0, *finite] if from_zero else finite))
    low, high = y_ticks[0], y_ticks[-1]
    outside = sum(y > high for y in finite)

    def across(x: float) -> float:
        return (x - first_x) / (last_x - first_x)

    def down(y: float) -> float:
        return 1 - (y - low) / (high - low)

    shapes: list[Html] = [_line(0, down(y), 1, down(y), "grid") for y in y_ticks]
    shapes += [_line(across(x), 0.965, across(x), 1, "mark") for x, _ in marks if first_x <= x <= last_x]
    labels: list[Html] = []
    if limit is not None and low < limit[0] < high:
        shapes.append(_line(0, down(limit[0]), 1, down(limit[0]), "limit"))
        labels.append(el("span", limit[1], class_="limit-label", style=f"top:{down(limit[0]):.2%}"))
    shapes += [el("path", d=_path(each, across, down), class_=_look(each)) for each in drawn]
    x_ticks = [x for x in ticks(first_x, last_x, 6) if x <= last_x and x == round(x)]
    readings = _readings(series, show, unit)
    notes = [f"{count(outside)} of the points lie above the edge."] if outside else []
    notes += [f"Marks on the axis: {marks[0][1]}."] if marks else []
    hover = [
        {"name": each.name, "look": each.look, "x": each.xs, "y": [_json(y, show) for y in each.ys]} for each in drawn
    ]
    return el(
        "figure",
        el(
            "figcaption",
            el("span", el("b", title), " ", zh(chinese), class_="chart-title"),
            el("span", (el("span", el("i", class_=each.look), each.name) for each in drawn), class_="legend")
            if len(drawn) > 1
            else None,
        ),
        el(
            "div",
            el("div", (_label(show(y), "top", down(y)) for y in y_ticks), class_="y-axis"),
            el(
                "div",
                el(
                    "svg",
                    shapes,
                    viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
                    preserveAspectRatio="none",
                    role="img",
                    aria_label=f"{title}: {readings}",
                ),
                labels,
                class_="area",
                data_hover=json.dumps(hover, separators=(",", ":"), ensure_ascii=False),
                data_last=f"{last_x:g}",
                data_first=f"{first_x:g}",
            ),
            el("div", (_label(count(x), "left", across(x)) for x in x_ticks), class_="x-axis"),
            class_="plot",
        ),
        el("p", " ".join([readings, *notes]), class_="reading"),
        class_="chart wide" if wide else "chart",
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that enclose low..high, about so many."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / max(about - 1, 1)
    power_of_ten = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power_of_ten for factor in (1, 2, 2.5, 5, 10) if factor * power_of_ten >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def decimal(value: float) -> str:
    """Three digits that matter: 0.0812, 1.25, 310."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    shown = f"{value:,.{min(digits, 6)}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def power(value: float) -> str:
    """2e-4: how learning rates are written in configs."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def count(value: float) -> str:
    """1,200 with its thousands apart."""
    return f"{value:,.0f}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The part of the y axis to show: from zero where that costs little, and without a few extreme peaks."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[math.ceil(0.98 * len(ordered)) - 1]
    if high > 3 * usual > 0:
        high = 1.5 * usual
    if 0 <= low < 0.6 * high:
        low = 0.0
    if high - low < 1e-3 * abs(high):
        # A constant: let it run through the middle instead of filling the plot with rounding errors.
        low, high = (0.0, 2 * high) if high > 0 else (low - 1, high + 1)
    return low, high


def _thin(series: Series) -> Series:
    """The series with at most about `_MAX_POINTS` points: of each stretch, its lowest and highest."""
    n = len(series.xs)
    if n <= _MAX_POINTS:
        return series
    kept: list[int] = []
    num_stretches = _MAX_POINTS // 2
    for i in range(num_stretches):
        stretch = range(i * n // num_stretches, (i + 1) * n // num_stretches)
        known = [j for j in stretch if math.isfinite(series.ys[j])] or [stretch[0]]
        kept += sorted({min(known, key=series.ys.__getitem__), max(known, key=series.ys.__getitem__)})
    return Series(series.name, [series.xs[i] for i in kept], [series.ys[i] for i in kept], series.look)


def _path(series: Series, across: Callable[[float], float], down: Callable[[float], float]) -> str:
    """SVG path data; a number that is not finite interrupts the curve, a single point becomes a dot."""
    words: list[str] = []
    pen_down = False
    for x, y in zip(series.xs, series.ys, strict=True):
        if math.isfinite(y):
            words.append(f"{'L' if pen_down else 'M'}{across(x) * _WIDTH:.1f} {down(y) * _HEIGHT:.1f}")
            if not pen_down:
                words.append("h0")
        pen_down = math.isfinite(y)
    return "".join(words)


def _look(series: Series) -> str:
    """The curve's class; thinner where it goes up and down so often that it would become a block."""
    ys = [y for y in series.ys if math.isfinite(y)]
    travelled = sum(abs(b - a) for a, b in pairwise(ys))
    return f"{series.look} dense" if travelled > _BUSY * (max(ys, default=0) - min(ys, default=0)) else series.look


def _readings(series: Sequence[Series], show: Callable[[float], str], unit: str) -> str:
    """The curve in words, of the most important series (the last one drawn)."""
    ys = [y for y in series[-1].ys if math.isfinite(y)]
    if not ys:
        return ""
    unit = f" {unit}" if unit else ""
    return f"First {show(ys[0])}{unit}, last {show(ys[-1])}{unit}, lowest {show(min(ys))}, highest {show(max(ys))}."


def _json(y: float, show: Callable[[float], str]) -> str | None:
    return show(y) if math.isfinite(y) else None


def _line(x1: float, y1: float, x2: float, y2: float, look: str) -> Html:
    d = f"M{x1 * _WIDTH:.1f} {y1 * _HEIGHT:.1f}L{x2 * _WIDTH:.1f} {y2 * _HEIGHT:.1f}"
    return el("path", d=d, class_=look)


def _label(words: str, side: str, share: float) -> Html:
    return join(el("span", words, style=f"{side}:{share:.2%}"))
