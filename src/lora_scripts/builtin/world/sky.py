"""The four times: what they do to the sky and how they tint everything below it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_scripts.builtin.world.shapes import RGB, Point, Shape, ellipse, mix

if TYPE_CHECKING:
    from random import Random


@dataclass(frozen=True)
class Mood:
    """Sky colours from top to horizon, the tint of the land and the slight tint of the subject."""

    sky: tuple[RGB, RGB, RGB]
    tint: RGB
    land_tint: float
    subject_tint: float
    cloud: RGB
    lamp: RGB | None = None

    def land(self, colour: RGB) -> RGB:
        """A background colour in this light."""
        return mix(colour, self.tint, self.land_tint)

    def subject(self, colour: RGB) -> RGB:
        """A subject's colour in this light; kept slight, so that the colour's word stays true."""
        return mix(colour, self.tint, self.subject_tint)


MOODS: dict[str, Mood] = {
    "day": Mood(((84, 176, 240), (146, 210, 248), (214, 240, 250)), (255, 255, 240), 0.0, 0.0, (255, 255, 255)),
    "sunset": Mood(
        ((112, 70, 150), (240, 116, 108), (255, 208, 124)), (226, 92, 70), 0.34, 0.05, (250, 158, 138), (255, 226, 140)
    ),
    "night": Mood(
        ((10, 14, 48), (24, 34, 86), (52, 66, 128)), (22, 30, 92), 0.56, 0.08, (52, 62, 112), (255, 220, 110)
    ),
    "rain": Mood(((98, 108, 122), (132, 142, 154), (168, 176, 184)), (116, 126, 142), 0.36, 0.05, (86, 94, 108)),
}


def _cloud(x: float, y: float, scale: float, colour: RGB) -> list[Shape]:
    bumps = ((-0.1, 0.0, 0.075, 0.04), (0.0, -0.03, 0.09, 0.062), (0.1, 0.0, 0.075, 0.042), (0.0, 0.015, 0.15, 0.03))
    return [
        Shape(ellipse(x + dx * scale, y + dy * scale, rx * scale, ry * scale, 20), colour, "sky")
        for dx, dy, rx, ry in bumps
    ]


def _star(x: float, y: float, r: float) -> list[Point]:
    return [
        (x + r * k * math.cos(i * math.pi / 4), y + r * k * math.sin(i * math.pi / 4))
        for i, k in enumerate((1, 0.36) * 4)
    ]


def sky_shapes(time: str, rng: Random) -> list[Shape]:
    """Sun, moon, stars and clouds, from back to front."""
    mood = MOODS[time]
    side = -1 if rng.random() < 0.5 else 1
    x, y = 0.5 + side * rng.uniform(0.2, 0.34), rng.uniform(0.13, 0.19)
    shapes: list[Shape] = []
    if time == "day":
        shapes.append(Shape(ellipse(x, y, 0.13, 0.13), mix(mood.sky[0], (255, 246, 190), 0.55), "sky"))
        shapes.append(Shape(ellipse(x, y, 0.085, 0.085), (255, 226, 92), "sky"))
        shapes += _cloud(
            0.5 - side * rng.uniform(0.12, 0.32), rng.uniform(0.1, 0.16), rng.uniform(1.0, 1.4), mood.cloud
        )
        shapes += _cloud(
            0.5 + side * rng.uniform(0.0, 0.1), rng.uniform(0.24, 0.34), rng.uniform(0.7, 0.95), mood.cloud
        )
    elif time == "sunset":
        y = rng.uniform(0.26, 0.36)
        for r, strength in ((0.3, 0.25), (0.21, 0.5)):
            shapes.append(Shape(ellipse(x, y, r, r), mix((246, 140, 112), (255, 214, 130), strength), "sky"))
        shapes.append(Shape(ellipse(x, y, 0.13, 0.13), (255, 238, 168), "sky"))
        for _ in range(2):
            cx, cy, w = rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.28), rng.uniform(0.14, 0.24)
            shapes.append(Shape(ellipse(cx, cy, w, 0.022, 20), mood.cloud, "sky"))
    elif time == "night":
        for i in range(11):
            star = _star((i + rng.random()) / 11, rng.uniform(0.04, 0.4), rng.uniform(0.016, 0.028))
            shapes.append(Shape(star, (250, 244, 200), "sky"))
        shapes.append(Shape(ellipse(x, y, 0.14, 0.14), mix(mood.sky[0], (150, 160, 220), 0.22), "sky"))
        shapes.append(Shape(ellipse(x, y, 0.095, 0.095), (250, 244, 208), "sky"))
        shapes.append(
            Shape(ellipse(x - side * 0.045, y - 0.02, 0.082, 0.082), mix(mood.sky[0], (150, 160, 220), 0.22), "sky")
        )
    else:
        for i in range(4):
            cx, cy = (i + rng.random()) / 4, rng.uniform(0.03, 0.12)
            shapes += _cloud(cx, cy, rng.uniform(1.3, 1.8), mix(mood.cloud, (70, 78, 92), rng.random() * 0.5))
    return shapes


def rain_streaks(rng: Random, count: int = 22) -> list[Shape]:
    """Slanted streaks over the whole picture, thick enough to survive scaling down."""
    shapes = []
    for i in range(count):
        x, y = (i + rng.random()) / count * 1.15, rng.uniform(0.1, 0.95)
        length = rng.uniform(0.08, 0.13)
        shapes.append(Shape([(x, y), (x - length * 0.35, y + length)], (198, 212, 228), "rain", 0.0115))
    return shapes
