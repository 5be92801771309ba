"""Polygons and the geometry that makes them: the display list from which every style draws.

Points are (x, y) with y downwards. A picture's coordinates run from 0 to 1 on both axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

Point = tuple[float, float]
RGB = tuple[int, int, int]


@dataclass(slots=True)
class Shape:
    """One polygon, or an open line when width is positive.

    role: "sky", "far", "ground", "prop" or "shadow" in the background; "body", "shade", "light", "detail" or "line"
    in a subject. width is a fraction of the picture's side. Shapes with `rim` make up the silhouette.
    """

    points: Sequence[Point]
    colour: RGB
    role: str
    width: float = 0.0
    rim: bool = False


def mix(a: RGB, b: RGB, amount: float) -> RGB:
    """a at amount 0, b at amount 1."""
    return (
        int(a[0] + (b[0] - a[0]) * amount),
        int(a[1] + (b[1] - a[1]) * amount),
        int(a[2] + (b[2] - a[2]) * amount),
    )


def ellipse(cx: float, cy: float, rx: float, ry: float, num_points: int = 28) -> list[Point]:
    """An ellipse as a polygon."""
    step = 2 * math.pi / num_points
    return [(cx + rx * math.cos(i * step), cy + ry * math.sin(i * step)) for i in range(num_points)]


def spline(points: Sequence[Point], closed: bool = True, steps: int = 6) -> list[Point]:
    """A smooth curve through all points (uniform Catmull-Rom)."""
    n = len(points)
    smooth: list[Point] = []
    for i in range(n if closed else n - 1):
        if closed:
            p0, p1, p2, p3 = (points[(i + k) % n] for k in (-1, 0, 1, 2))
        else:
            p0, p1, p2, p3 = (points[min(max(i + k, 0), n - 1)] for k in (-1, 0, 1, 2))
        for s in range(steps):
            t = s / steps
            a, b, c, d = -t + 2 * t * t - t**3, 2 - 5 * t * t + 3 * t**3, t + 4 * t * t - 3 * t**3, t**3 - t * t
            smooth.append(
                (
                    0.5 * (a * p0[0] + b * p1[0] + c * p2[0] + d * p3[0]),
                    0.5 * (a * p0[1] + b * p1[1] + c * p2[1] + d * p3[1]),
                )
            )
    if not closed:
        smooth.append(points[-1])
    return smooth


def tube(points: Sequence[Point], start: float, end: float) -> list[Point]:
    """A bent limb: the outline of a smooth line whose half width goes from start to end, with a round tip."""
    line = spline(points, closed=False, steps=5)
    left: list[Point] = []
    right: list[Point] = []
    for i, (x, y) in enumerate(line):
        (x0, y0), (x1, y1) = line[max(i - 1, 0)], line[min(i + 1, len(line) - 1)]
        length = math.hypot(x1 - x0, y1 - y0) or 1.0
        half = start + (end - start) * i / (len(line) - 1)
        nx, ny = -(y1 - y0) / length * half, (x1 - x0) / length * half
        left.append((x + nx, y + ny))
        right.append((x - nx, y - ny))
    angle = math.atan2(left[-1][1] - line[-1][1], left[-1][0] - line[-1][0])
    tip = [
        (line[-1][0] + end * math.cos(angle - k * math.pi / 6), line[-1][1] + end * math.sin(angle - k * math.pi / 6))
        for k in range(1, 6)
    ]
    return left + tip + right[::-1]


def round_box(x0: float, y0: float, x1: float, y1: float, r: float) -> list[Point]:
    """A rectangle with corners of radius r."""
    corners = ((x1 - r, y1 - r, 0), (x0 + r, y1 - r, 1), (x0 + r, y0 + r, 2), (x1 - r, y0 + r, 3))
    return [
        (cx + r * math.cos((q + k / 5) * math.pi / 2), cy + r * math.sin((q + k / 5) * math.pi / 2))
        for cx, cy, q in corners
        for k in range(6)
    ]


def clip(points: Sequence[Point], convex: Sequence[Point]) -> list[Point]:
    """The part of a polygon inside a convex polygon that runs clockwise on the screen, as `ellipse` does.

    Source: Sutherland and Hodgman 1974, Reentrant polygon clipping.
    """
    result = list(points)
    for (ax, ay), (bx, by) in zip(convex, [*convex[1:], convex[0]], strict=True):
        source, result = result, []
        for (px, py), (qx, qy) in zip([source[-1], *source[:-1]] if source else [], source, strict=True):
            p_side = (bx - ax) * (py - ay) - (by - ay) * (px - ax)
            q_side = (bx - ax) * (qy - ay) - (by - ay) * (qx - ax)
            if (p_side >= 0) != (q_side >= 0):
                t = p_side / (p_side - q_side)
                result.append((px + t * (qx - px), py + t * (qy - py)))
            if q_side >= 0:
                result.append((qx, qy))
    return result


def bounds(points: Sequence[Point]) -> tuple[float, float, float, float]:
    """The smallest x, smallest y, largest x and largest y."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    return min(xs), min(ys), max(xs), max(ys)
