"""Subjects in the picture: their colours, and their parts moved to where they stand."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from lora_scripts.builtin.world.shapes import RGB, Point, Shape, bounds, mix
from lora_scripts.builtin.world.subject_parts import BUILDERS, Part

if TYPE_CHECKING:
    from collections.abc import Sequence

# light side, base, shadow side: three steps of one hue, so that shading never turns into another colour's word
_INKS: dict[str, tuple[RGB, RGB, RGB]] = {
    "red": ((244, 78, 66), (222, 36, 40), (168, 18, 36)),
    "orange": ((255, 164, 62), (250, 132, 20), (206, 94, 8)),
    "yellow": ((255, 236, 96), (252, 214, 28), (216, 168, 10)),
    "green": ((96, 206, 92), (44, 168, 62), (22, 118, 54)),
    "blue": ((82, 150, 248), (34, 98, 226), (22, 62, 166)),
    "purple": ((172, 96, 226), (132, 52, 194), (92, 30, 146)),
    "pink": ((255, 176, 208), (255, 132, 182), (226, 92, 148)),
    "white": ((255, 255, 255), (246, 246, 248), (200, 206, 218)),
}
_OUTLINE: RGB = (38, 32, 48)
_NEUTRALS: dict[str, RGB] = {
    "dark": (44, 38, 54),
    "grey": (150, 152, 162),
    "glass": (206, 226, 234),
    "cream": (252, 244, 226),
    "wood": (104, 84, 78),
}


_HOVER = {"fish": 0.1, "butterfly": 0.14}


@cache
def parts_of(subject: str) -> tuple[Part, ...]:
    """The parts of a subject from back to front."""
    return tuple(BUILDERS[subject]())


@cache
def span_of(subject: str) -> tuple[float, float]:
    """The leftmost and rightmost x of a subject."""
    x0, _, x1, _ = bounds([p for part in parts_of(subject) for p in part.points])
    return x0, x1


def aspect_of(subject: str) -> float:
    """Width of a subject over its height."""
    x0, x1 = span_of(subject)
    return x1 - x0


def hover_of(subject: str) -> float:
    """How far the subject floats above the ground, as a fraction of its height."""
    return _HOVER.get(subject, 0.0)


def palette(colour: str) -> dict[str, RGB]:
    """The tones of a subject in one colour."""
    light, base, shade = _INKS[colour]
    spot = mix(shade, _INKS[colour][1], 0.2) if colour == "white" else _NEUTRALS["cream"]
    return _NEUTRALS | {
        "light": light,
        "base": base,
        "shade": shade,
        "deep": mix(shade, _OUTLINE, 0.3),
        "pale": mix(_NEUTRALS["cream"], light, 0.25),
        "spot": spot,
        "outline": _OUTLINE,
    }


_ROLES = {"base": "body", "light": "light", "shade": "shade", "deep": "shade", "pale": "light"}


def place_subject(
    subject: str, tones: dict[str, RGB], centre: float, ground: float, height: float, mirror: bool
) -> list[Shape]:
    """The subject's shapes in the picture, standing (or floating) above the point (centre, ground)."""
    sx = -height if mirror else height
    top = ground - height * (1 + hover_of(subject))
    centre -= sum(span_of(subject)) / 2 * sx
    shapes = []
    for part in parts_of(subject):
        points: Sequence[Point] = [(centre + x * sx, top + y * height) for x, y in part.points]
        role = "line" if part.width else _ROLES.get(part.tone, "detail")
        shapes.append(Shape(points, tones[part.tone], role, part.width * height, part.rim))
    return shapes
