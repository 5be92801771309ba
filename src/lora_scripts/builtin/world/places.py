"""The eight places: layouts that differ in horizon, colours and one large object each.

Every function returns background shapes from back to front. The ground on which subjects stand begins above y = 0.8.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_scripts.builtin.world.shapes import RGB, Point, Shape, ellipse, mix, round_box, spline, tube

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from lora_scripts.builtin.world.sky import Mood


def _hill(rng: Random, level: float, swing: float, waves: float, colour: RGB, role: str = "ground") -> Shape:
    """Land from a wavy line at height level down to the bottom edge."""
    phase, n = rng.uniform(0, 2 * math.pi), 16
    line: list[Point] = [(i / n, level + swing * math.sin(phase + waves * 2 * math.pi * i / n)) for i in range(n + 1)]
    return Shape([*line, (1, 1), (0, 1)], colour, role)


def _side(rng: Random) -> int:
    return -1 if rng.random() < 0.5 else 1


def _beach(rng: Random, mood: Mood) -> list[Shape]:
    sea, foam, sand = mood.land((32, 160, 186)), mood.land((232, 248, 246)), mood.land((244, 218, 158))
    shapes = [Shape([(0, 0.5), (1, 0.5), (1, 1), (0, 1)], sea, "far")]
    shapes.append(Shape([(0, 0.56), (1, 0.56), (1, 1), (0, 1)], mix(sea, foam, 0.22), "far"))
    shapes.append(Shape([(0, 0.62), (1, 0.62), (1, 1), (0, 1)], mix(sea, foam, 0.42), "far"))
    shore = _hill(rng, 0.72, 0.018, 1.5, sand)
    shapes += [Shape([(x, y - 0.03) for x, y in shore.points], foam, "far"), shore]
    side = _side(rng)
    foot, bend = 0.5 + side * rng.uniform(0.38, 0.44), rng.uniform(0.03, 0.1)
    top = (foot - side * bend, rng.uniform(0.24, 0.3))
    trunk = tube([(foot, 0.84), (foot + side * 0.03, 0.55), top], 0.034, 0.022)
    shapes.append(Shape(trunk, mood.land((150, 104, 66)), "prop"))
    for i, angle in enumerate((-2.9, -2.3, -0.85, -0.25, 0.35, 2.8)):
        reach = rng.uniform(0.2, 0.26)
        tip = (top[0] + reach * math.cos(angle), top[1] + reach * math.sin(angle) * 0.7 + 0.06)
        mid = ((top[0] + tip[0]) / 2, (top[1] + tip[1]) / 2)
        leaf = spline([top, (mid[0], mid[1] - 0.07), tip, (mid[0], mid[1] - 0.015)], steps=5)
        shapes.append(Shape(leaf, mood.land((40, 142, 84) if i % 2 else (62, 166, 92)), "prop"))
    return shapes


def _forest(rng: Random, mood: Mood) -> list[Shape]:
    far, mid, near = mood.land((116, 168, 128)), mood.land((62, 124, 84)), mood.land((34, 84, 62))
    trunk = mood.land((98, 66, 50))
    shapes: list[Shape] = []
    for row, (count, height, colour) in enumerate(((7, 0.42, far), (6, 0.56, mid))):
        for i in range(count):
            x, h, w = (i + rng.uniform(0.2, 0.8)) / count, height * rng.uniform(0.85, 1.15), 0.11 + 0.02 * row
            base = 0.74
            for k in range(3):
                y = base - h * k * 0.27
                half = w * (1 - 0.22 * k)
                shapes.append(Shape([(x - half, y), (x + half, y), (x, y - h * 0.46)], colour, "far"))
    shapes.append(_hill(rng, 0.73, 0.012, 1.3, mood.land((70, 104, 58))))
    shapes.append(_hill(rng, 0.86, 0.014, 1.7, mood.land((92, 124, 62))))
    for x in (
        rng.uniform(-0.01, 0.05),
        rng.uniform(0.95, 1.01),
        rng.uniform(0.15, 0.21) if rng.random() < 0.5 else rng.uniform(0.79, 0.85),
    ):
        w = 0.055 if 0.1 < x < 0.9 else 0.075
        shapes.append(
            Shape([(x - w * 0.8, -0.1), (x + w * 0.8, -0.1), (x + w * 1.1, 0.86), (x - w * 1.1, 0.86)], trunk, "prop")
        )
    for i in range(6):
        x = i / 5 + rng.uniform(-0.05, 0.05)
        shapes.append(Shape(ellipse(x, -0.01, 0.15, rng.uniform(0.09, 0.14), 20), near, "prop"))
    return shapes


def _city(rng: Random, mood: Mood) -> list[Shape]:
    shapes: list[Shape] = []
    lit = mood.lamp or mood.land((214, 232, 240))
    x = -0.03
    while x < 1.0:
        w, top = rng.uniform(0.1, 0.15), rng.uniform(0.3, 0.46)
        shapes.append(Shape([(x, top), (x + w, top), (x + w, 0.8), (x, 0.8)], mood.land((150, 158, 188)), "far"))
        x += w
    x = -0.06
    while x < 1.0:
        w, top = rng.uniform(0.17, 0.22), rng.uniform(0.34, 0.56)
        wall = mood.land(((98, 104, 136), (120, 104, 118), (86, 110, 130))[int(rng.random() * 3)])
        shapes.append(Shape([(x, top), (x + w, top), (x + w, 0.8), (x, 0.8)], wall, "prop"))
        rows = int((0.72 - top) / 0.1)
        for row in range(rows):
            for column in (0.16, 0.58):
                wx, wy = x + w * column, top + 0.04 + row * 0.1
                glow = lit if rng.random() < 0.72 else mix(wall, (20, 22, 40), 0.35)
                shapes.append(
                    Shape(
                        [(wx, wy), (wx + w * 0.26, wy), (wx + w * 0.26, wy + 0.055), (wx, wy + 0.055)], glow, "window"
                    )
                )
        x += w + 0.012
    shapes.append(Shape([(0, 0.74), (1, 0.74), (1, 1), (0, 1)], mood.land((186, 184, 188)), "ground"))
    shapes.append(Shape([(0, 0.79), (1, 0.79), (1, 1), (0, 1)], mood.land((96, 98, 110)), "ground"))
    shift = rng.uniform(-0.1, 0.1)
    for i in range(4):
        x = shift + i * 0.3
        shapes.append(
            Shape(
                [(x, 0.94), (x + 0.16, 0.94), (x + 0.15, 0.965), (x - 0.01, 0.965)],
                mood.land((236, 232, 214)),
                "ground",
            )
        )
    return shapes


def _desert(rng: Random, mood: Mood) -> list[Shape]:
    shapes: list[Shape] = []
    side = _side(rng)
    mx, top = 0.5 - side * rng.uniform(0.2, 0.3), rng.uniform(0.36, 0.42)
    mesa: list[Point] = [
        (mx - 0.22, 0.66),
        (mx - 0.17, top),
        (mx + 0.13, top),
        (mx + 0.17, top + 0.1),
        (mx + 0.24, top + 0.1),
        (mx + 0.3, 0.66),
    ]
    shapes.append(Shape(mesa, mood.land((196, 110, 78)), "far"))
    for level, colour in ((0.6, (240, 180, 106)), (0.7, (230, 158, 84)), (0.82, (246, 192, 116))):
        shapes.append(_hill(rng, level, 0.03, 0.8, mood.land(colour)))
    x, tall, green = 0.5 + side * rng.uniform(0.34, 0.41), rng.uniform(0.36, 0.44), mood.land((70, 132, 86))
    shapes.append(Shape(round_box(x - 0.042, 0.84 - tall, x + 0.042, 0.86, 0.04), green, "prop"))
    shapes.append(Shape(tube([(x, 0.66), (x - 0.11, 0.65), (x - 0.115, 0.53)], 0.03, 0.03), green, "prop"))
    shapes.append(Shape(tube([(x, 0.6), (x + 0.1, 0.59), (x + 0.105, 0.46)], 0.03, 0.03), green, "prop"))
    return shapes


def _mountains(rng: Random, mood: Mood) -> list[Shape]:
    shapes: list[Shape] = []
    snow = mood.land((244, 248, 252))
    shift = rng.uniform(-0.08, 0.08)
    for x, top, half, colour in (
        (0.5, 0.3, 0.42, (150, 160, 196)),
        (0.16, 0.2, 0.36, (112, 120, 160)),
        (0.82, 0.14, 0.42, (98, 106, 148)),
    ):
        x, top = x + shift + rng.uniform(-0.04, 0.04), top + rng.uniform(-0.03, 0.05)
        body, dark = mood.land(colour), mood.land(mix(colour, (50, 56, 90), 0.4))
        shapes.append(Shape([(x - half, 0.76), (x, top), (x + half, 0.76)], body, "far"))
        shapes.append(Shape([(x, top), (x + half, 0.76), (x + half * 0.1, 0.76), (x + half * 0.2, 0.5)], dark, "far"))
        k, h = 0.3, 0.76 - top
        cap: list[Point] = [
            (x, top),
            (x + half * k, top + h * k),
            (x + half * k * 0.4, top + h * k * 0.75),
            (x, top + h * k * 1.15),
            (x - half * k * 0.4, top + h * k * 0.75),
            (x - half * k, top + h * k),
        ]
        shapes.append(Shape(cap, snow, "far"))
    shapes.append(_hill(rng, 0.7, 0.025, 1.0, mood.land((104, 138, 108))))
    shapes.append(_hill(rng, 0.82, 0.015, 1.0, mood.land((148, 150, 150))))
    side = _side(rng)
    for dx, r in ((0.4, 0.08), (0.48, 0.12)):
        x = 0.5 + side * dx
        shapes.append(
            Shape(
                [(x - r, 0.86), (x - r * 0.6, 0.86 - r * 0.9), (x + r * 0.3, 0.86 - r), (x + r, 0.86)],
                mood.land((120, 122, 130)),
                "prop",
            )
        )
    return shapes


def _meadow(rng: Random, mood: Mood) -> list[Shape]:
    shapes = [_hill(rng, 0.5, 0.04, 0.8, mood.land((158, 208, 118)), "far")]
    shapes.append(_hill(rng, 0.62, 0.04, 0.7, mood.land((128, 194, 88))))
    shapes.append(_hill(rng, 0.76, 0.02, 0.9, mood.land((104, 178, 70))))
    post = mood.land((240, 234, 220))
    for y in (0.6, 0.665):
        shapes.append(Shape([(0, y), (1, y), (1, y + 0.024), (0, y + 0.024)], post, "prop"))
    shift = rng.uniform(0, 0.17)
    for i in range(6):
        x = i * 0.18 + shift - 0.06
        shapes.append(
            Shape([(x, 0.72), (x, 0.57), (x + 0.022, 0.545), (x + 0.044, 0.57), (x + 0.044, 0.72)], post, "prop")
        )
    petals: tuple[RGB, ...] = ((250, 236, 120), (250, 250, 244), (244, 150, 170))
    for i in range(12):
        x, y = (i + rng.uniform(0.1, 0.9)) / 12, rng.uniform(0.8, 0.97)
        shapes.append(Shape(ellipse(x, y, 0.016, 0.014, 10), mood.land(petals[i % 3]), "prop"))
    return shapes


def _fir(x: float, base: float, h: float, mood: Mood) -> list[Shape]:
    green, snow = mood.land((52, 104, 104)), mood.land((246, 250, 255))
    shapes = [
        Shape(
            [(x - 0.015, base + 0.03), (x + 0.015, base + 0.03), (x + 0.015, base - 0.02), (x - 0.015, base - 0.02)],
            mood.land((96, 70, 60)),
            "prop",
        )
    ]
    for k in range(3):
        y, half = base - h * 0.26 * k, h * (0.3 - 0.06 * k)
        top = y - h * 0.46
        shapes.append(Shape([(x - half, y), (x + half, y), (x, top)], green, "prop"))
        shapes.append(Shape([(x - half * 0.5, y - h * 0.23), (x + half * 0.5, y - h * 0.23), (x, top)], snow, "prop"))
    return shapes


def _snow(rng: Random, mood: Mood) -> list[Shape]:
    shapes = [_hill(rng, 0.55, 0.04, 0.9, mood.land((196, 214, 234)), "far")]
    shapes.append(_hill(rng, 0.66, 0.03, 0.7, mood.land((220, 232, 244))))
    for side in (-1, 1):
        shapes += _fir(0.5 + side * rng.uniform(0.24, 0.3), 0.68, rng.uniform(0.24, 0.3), mood)
        shapes += _fir(0.5 + side * rng.uniform(0.4, 0.46), 0.76, rng.uniform(0.4, 0.5), mood)
    shapes.append(_hill(rng, 0.78, 0.02, 0.8, mood.land((238, 244, 250))))
    return shapes


def _lake(rng: Random, mood: Mood) -> list[Shape]:
    shapes = [_hill(rng, 0.4, 0.04, 1.1, mood.land((104, 156, 132)), "far")]
    shapes.append(_hill(rng, 0.45, 0.02, 1.6, mood.land((66, 122, 100)), "far"))
    water = mood.land((58, 124, 190))
    shapes.append(Shape([(0, 0.49), (1, 0.49), (1, 1), (0, 1)], water, "far"))
    for y in (0.53, 0.6, 0.68, 0.75):
        x, w = rng.uniform(0.1, 0.9), rng.uniform(0.16, 0.3)
        shapes.append(Shape(ellipse(x, y, w, 0.012, 20), mix(water, mood.sky[2], 0.5), "far"))
    shapes.append(_hill(rng, 0.82, 0.02, 0.8, mood.land((112, 134, 70))))
    shapes.append(_hill(rng, 0.9, 0.015, 1.1, mood.land((134, 152, 82))))
    side = _side(rng)
    for i in range(5):
        x = 0.5 + side * (0.3 + 0.045 * i + rng.uniform(-0.01, 0.01))
        top, lean = rng.uniform(0.46, 0.6), rng.uniform(-0.02, 0.02)
        shapes.append(Shape([(x, 0.88), (x + lean, top)], mood.land((76, 112, 58)), "prop", 0.014))
        shapes.append(Shape(ellipse(x + lean, top, 0.018, 0.055, 14), mood.land((112, 72, 50)), "prop"))
    return shapes


_PLACES: dict[str, Callable[[Random, Mood], list[Shape]]] = {
    "beach": _beach,
    "forest": _forest,
    "city": _city,
    "desert": _desert,
    "mountains": _mountains,
    "meadow": _meadow,
    "snow": _snow,
    "lake": _lake,
}


def place_shapes(place: str, mood: Mood, rng: Random) -> list[Shape]:
    """The land and its objects, from back to front."""
    return _PLACES[place](rng, mood)
