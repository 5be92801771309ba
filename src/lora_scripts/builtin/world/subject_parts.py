"""The shapes of the twelve subjects, each a few large parts.

A subject is drawn in its own coordinates: x is centred near 0, y runs from 0 (top) to 1 (ground). Tones name the
colour of a part: "base", "light", "shade", "deep", "pale" and "spot" come from the scene's colour, others are neutral.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lora_scripts.builtin.world.shapes import Point, bounds, clip, ellipse, round_box, spline, tube

if TYPE_CHECKING:
    from collections.abc import Callable


class Part(NamedTuple):
    """One part in the subject's own coordinates; width is positive for a line, rim marks the silhouette."""

    points: list[Point]
    tone: str
    width: float = 0.0
    rim: bool = False


def _solid(points: list[Point], lit: tuple[float, float] = (-0.16, -0.16), tone: str = "base") -> list[Part]:
    """A body part with a shadow crescent: the shape in shade, then its overlap with an ellipse moved to the light."""
    x0, y0, x1, y1 = bounds(points)
    w, h = x1 - x0, y1 - y0
    sun = ellipse((x0 + x1) / 2 + lit[0] * w, (y0 + y1) / 2 + lit[1] * h, 0.64 * w, 0.64 * h, 24)
    inner = clip(points, sun)
    return [Part(points, "shade", rim=True), *([Part(inner, tone)] if len(inner) > 2 else [])]


def _flat(points: list[Point], tone: str = "base") -> Part:
    return Part(points, tone, rim=True)


def _eye(x: float, y: float, r: float) -> list[Part]:
    """A dark eye with a glint."""
    return [
        Part(ellipse(x, y, r, r * 1.15, 14), "dark"),
        Part(ellipse(x - r * 0.3, y - r * 0.4, r * 0.36, r * 0.36, 8), "cream"),
    ]


def _cat() -> list[Part]:
    tail = tube([(0.18, 0.93), (0.42, 0.93), (0.5, 0.74), (0.4, 0.6), (0.44, 0.5)], 0.065, 0.055)
    body = spline([(-0.15, 0.45), (-0.27, 0.7), (-0.29, 0.95), (0, 0.995), (0.29, 0.95), (0.27, 0.7), (0.15, 0.45)])
    head = spline(
        [(-0.3, 0.3), (-0.2, 0.13), (0, 0.1), (0.2, 0.13), (0.3, 0.3), (0.22, 0.46), (0, 0.51), (-0.22, 0.46)]
    )
    parts = [_flat(tail, "shade"), *_solid(body)]
    parts += [Part(spline([(-0.1, 0.5), (-0.13, 0.66), (0, 0.76), (0.13, 0.66), (0.1, 0.5)]), "light")]
    parts += [Part([(-0.07, 0.78), (-0.07, 0.97)], "deep", 0.022), Part([(0.07, 0.78), (0.07, 0.97)], "deep", 0.022)]
    for side in (-1, 1):
        parts += [_flat([(side * 0.27, 0.28), (side * 0.275, 0.0), (side * 0.07, 0.14)], "base")]
        parts += [Part([(side * 0.235, 0.2), (side * 0.24, 0.06), (side * 0.13, 0.14)], "deep")]
    parts += _solid(head)
    parts += [*_eye(-0.12, 0.28, 0.042), *_eye(0.12, 0.28, 0.042)]
    parts += [Part(ellipse(0, 0.395, 0.1, 0.07, 18), "light"), Part([(-0.035, 0.36), (0.035, 0.36), (0, 0.4)], "dark")]
    return parts


def _fish() -> list[Part]:
    tail = spline([(0.36, 0.5), (0.72, 0.16), (0.66, 0.5), (0.72, 0.86)])
    top = spline([(-0.2, 0.22), (0.02, 0.02), (0.3, 0.1), (0.22, 0.32)])
    low = spline([(-0.08, 0.76), (0.06, 0.98), (0.24, 0.94), (0.16, 0.7)])
    body = spline(
        [
            (-0.66, 0.52),
            (-0.44, 0.26),
            (-0.08, 0.15),
            (0.26, 0.3),
            (0.48, 0.5),
            (0.26, 0.7),
            (-0.08, 0.85),
            (-0.44, 0.76),
        ]
    )
    parts = [_flat(tail, "shade"), _flat(top, "shade"), _flat(low, "shade"), *_solid(body, (-0.06, -0.2))]
    parts += [Part([(0.52, 0.5), (0.64, 0.34)], "deep", 0.02), Part([(0.52, 0.5), (0.64, 0.66)], "deep", 0.02)]
    parts += [Part(clip(body, ellipse(-0.72, 0.5, 0.42, 0.5)), "light")]
    parts += [Part(spline([(-0.04, 0.46), (0.16, 0.42), (0.22, 0.56), (0.02, 0.64)]), "deep")]
    parts += [Part(ellipse(-0.44, 0.44, 0.075, 0.085, 18), "cream"), *_eye(-0.45, 0.445, 0.048)]
    parts += [Part(spline([(-0.62, 0.6), (-0.54, 0.63), (-0.47, 0.6)], False), "dark", 0.022)]
    return parts


def _bird() -> list[Part]:
    body = spline(
        [
            (-0.42, 0.3),
            (-0.3, 0.1),
            (-0.1, 0.08),
            (0.06, 0.24),
            (0.26, 0.42),
            (0.36, 0.6),
            (0.2, 0.8),
            (-0.06, 0.86),
            (-0.3, 0.74),
            (-0.4, 0.5),
        ]
    )
    tail = [(0.2, 0.5), (0.62, 0.44), (0.6, 0.6), (0.2, 0.74)]
    wing = spline([(-0.14, 0.42), (0.06, 0.38), (0.3, 0.48), (0.46, 0.66), (0.2, 0.72), (-0.06, 0.64)])
    parts = [Part([(-0.1, 0.84), (-0.12, 0.985), (-0.2, 0.985)], "dark", 0.03, True)]
    parts += [Part([(0.06, 0.84), (0.06, 0.985), (-0.02, 0.985)], "dark", 0.03, True)]
    parts += [_flat([(-0.38, 0.22), (-0.62, 0.32), (-0.38, 0.4)], "grey"), _flat(tail, "shade"), *_solid(body)]
    parts += [Part(clip(body, ellipse(-0.26, 0.62, 0.2, 0.24)), "light")]
    parts += [Part(wing, "shade"), Part(wing, "deep", 0.018)]
    parts += [Part(ellipse(-0.24, 0.26, 0.07, 0.07, 18), "cream"), *_eye(-0.245, 0.26, 0.046)]
    return parts


def _butterfly() -> list[Part]:
    parts: list[Part] = []
    for side in (-1, 1):
        low = spline(
            [
                (s * side, y)
                for s, y in ((0.03, 0.52), (0.3, 0.54), (0.46, 0.7), (0.38, 0.92), (0.2, 0.96), (0.06, 0.76))
            ]
        )
        up = spline(
            [
                (s * side, y)
                for s, y in ((0.03, 0.5), (0.12, 0.26), (0.36, 0.06), (0.6, 0.08), (0.62, 0.34), (0.44, 0.56))
            ]
        )
        parts += [_flat(low, "shade"), *_solid(up, (-0.12 * side, 0.1))]
        parts += [
            Part(ellipse(side * 0.42, 0.28, 0.1, 0.1, 18), "light"),
            Part(ellipse(side * 0.28, 0.76, 0.08, 0.08, 16), "light"),
        ]
        parts += [Part(spline([(0, 0.28), (side * 0.06, 0.12), (side * 0.16, 0.04)], False), "dark", 0.026)]
    parts += [
        Part(spline([(0, 0.2), (0.055, 0.3), (0.05, 0.6), (0, 0.86), (-0.05, 0.6), (-0.055, 0.3)]), "dark", rim=True)
    ]
    return parts


def _elephant() -> list[Part]:
    parts: list[Part] = []
    for x in (-0.1, 0.4):
        parts += [_flat(round_box(x - 0.08, 0.6, x + 0.08, 0.97, 0.05), "deep")]
    for x in (-0.24, 0.26):
        parts += [_flat(round_box(x - 0.1, 0.6, x + 0.1, 0.995, 0.05), "shade")]
    body = spline(
        [(-0.36, 0.4), (-0.18, 0.16), (0.16, 0.1), (0.46, 0.24), (0.54, 0.5), (0.46, 0.76), (0.1, 0.8), (-0.26, 0.78)]
    )
    trunk = tube([(-0.5, 0.4), (-0.64, 0.6), (-0.6, 0.82), (-0.72, 0.9)], 0.12, 0.055)
    head = spline(
        [(-0.66, 0.36), (-0.56, 0.14), (-0.34, 0.08), (-0.18, 0.26), (-0.26, 0.5), (-0.46, 0.58), (-0.62, 0.52)]
    )
    ear = spline([(-0.3, 0.18), (-0.12, 0.1), (0.06, 0.24), (0.04, 0.5), (-0.12, 0.62), (-0.26, 0.46)])
    parts += [
        Part(spline([(0.5, 0.4), (0.62, 0.5), (0.62, 0.64)], False), "deep", 0.04, True),
        *_solid(body, (-0.06, -0.2)),
    ]
    parts += [_flat(trunk), *_solid(head, (-0.1, -0.16)), Part(trunk, "base")]
    parts += [Part(ear, "shade"), Part(ear, "deep", 0.02), Part(clip(ear, ellipse(-0.1, 0.34, 0.1, 0.2)), "light")]
    parts += [Part(spline([(-0.46, 0.52), (-0.42, 0.64), (-0.52, 0.7), (-0.5, 0.6), (-0.54, 0.54)]), "cream", rim=True)]
    return [*parts, *_eye(-0.46, 0.32, 0.04)]


def _robot() -> list[Part]:
    parts = [_flat(round_box(side * 0.14 - 0.09, 0.78, side * 0.14 + 0.09, 0.995, 0.04), "shade") for side in (-1, 1)]
    parts += [
        _flat(tube([(side * 0.26, 0.54), (side * 0.4, 0.58), (side * 0.42, 0.76)], 0.065, 0.075), "shade")
        for side in (-1, 1)
    ]
    parts += [Part([(0, 0.1), (0, 0.03)], "dark", 0.03, True), _flat(ellipse(0, 0.04, 0.05, 0.045, 16))]
    parts += [_flat(round_box(-0.09, 0.4, 0.09, 0.54, 0.02), "grey")]
    parts += [*_solid(round_box(-0.3, 0.48, 0.3, 0.86, 0.09)), *_solid(round_box(-0.34, 0.1, 0.34, 0.44, 0.1))]
    parts += [Part(round_box(-0.25, 0.18, 0.25, 0.37, 0.07), "dark")]
    parts += [Part(ellipse(side * 0.12, 0.27, 0.055, 0.06, 18), "cream") for side in (-1, 1)]
    parts += [Part(round_box(-0.17, 0.56, 0.17, 0.72, 0.04), "light")]
    parts += [Part(ellipse(x, 0.64, 0.032, 0.032, 12), "deep") for x in (-0.09, 0.0, 0.09)]
    return parts


def _car() -> list[Part]:
    body = spline(
        [
            (-0.76, 0.8),
            (-0.78, 0.58),
            (-0.66, 0.48),
            (-0.42, 0.44),
            (-0.24, 0.14),
            (0.02, 0.08),
            (0.28, 0.14),
            (0.48, 0.44),
            (0.72, 0.5),
            (0.78, 0.64),
            (0.76, 0.82),
            (0.4, 0.86),
            (-0.4, 0.86),
        ]
    )
    parts = [*_solid(body, (-0.04, -0.24))]
    parts += [Part(spline([(-0.32, 0.44), (-0.2, 0.22), (-0.03, 0.17), (-0.03, 0.44)], steps=3), "glass")]
    parts += [Part(spline([(0.05, 0.17), (0.22, 0.21), (0.36, 0.44), (0.05, 0.44)], steps=3), "glass")]
    parts += [Part([(-0.72, 0.6), (0.74, 0.6)], "light", 0.035), Part([(0.01, 0.46), (0.01, 0.8)], "deep", 0.02)]
    parts += [Part(ellipse(-0.71, 0.6, 0.05, 0.06, 14), "cream")]
    for x in (-0.43, 0.44):
        parts += [
            Part(ellipse(x, 0.83, 0.165, 0.165, 26), "dark", rim=True),
            Part(ellipse(x, 0.83, 0.085, 0.085, 18), "grey"),
        ]
    return parts


def _sailboat() -> list[Part]:
    hull = [(-0.46, 0.76), (0.5, 0.76), (0.42, 0.9), (0.3, 0.985), (-0.3, 0.985), (-0.4, 0.9)]
    main = [*spline([(0.0, 0.02), (0.14, 0.2), (0.36, 0.46), (0.42, 0.68)], False), (0.0, 0.68)]
    jib = [*spline([(-0.06, 0.12), (-0.14, 0.34), (-0.26, 0.54), (-0.38, 0.68)], False), (-0.06, 0.68)]
    parts = [Part([(-0.03, 0.0), (-0.03, 0.8)], "wood", 0.04, True), *_solid(main), _flat(jib, "light")]
    parts += [Part([(0.0, 0.5), (0.36, 0.5)], "light", 0.05), Part(hull, "shade", rim=True)]
    parts += [Part([(-0.46, 0.76), (0.5, 0.76), (0.47, 0.82), (-0.435, 0.82)], "cream")]
    return parts


def _rocket() -> list[Part]:
    body = spline(
        [
            (0, 0.0),
            (0.15, 0.16),
            (0.22, 0.4),
            (0.2, 0.68),
            (0.13, 0.88),
            (-0.13, 0.88),
            (-0.2, 0.68),
            (-0.22, 0.4),
            (-0.15, 0.16),
        ]
    )
    parts = [_flat([(-0.12, 0.86), (0.12, 0.86), (0.16, 0.98), (-0.16, 0.98)], "grey")]
    for side in (-1, 1):
        parts += [
            _flat(
                spline(
                    [(side * s, y) for s, y in ((0.17, 0.56), (0.34, 0.72), (0.38, 0.99), (0.26, 0.9), (0.14, 0.86))]
                ),
                "shade",
            )
        ]
    parts += _solid(body, (-0.22, -0.04))
    parts += [Part(clip(body, [(-1, -1), (1, -1), (1, 0.2), (-1, 0.2)]), "shade")]
    parts += [Part(clip(body, [(-1, 0.7), (1, 0.7), (1, 0.77), (-1, 0.77)]), "light")]
    parts += [Part(ellipse(0, 0.42, 0.12, 0.115, 24), "dark"), Part(ellipse(0, 0.42, 0.085, 0.08, 22), "glass")]
    parts += [_flat(round_box(-0.035, 0.74, 0.035, 0.98, 0.03), "deep")]
    return parts


def _umbrella() -> list[Part]:
    dome = spline([(-0.56, 0.52), (-0.5, 0.32), (-0.3, 0.14), (0, 0.07), (0.3, 0.14), (0.5, 0.32), (0.56, 0.52)], False)
    scallops = [
        (x + 0.14 * (1 - k / 4) - 0.14 * (k / 4) - 0.0, 0.52 - 0.06 * (1 - (k / 2 - 1) ** 2))
        for x in (0.42, 0.14, -0.14, -0.42)
        for k in range(5)
    ]
    canopy = dome + scallops
    parts = [Part(spline([(0, 0.1), (0, 0.86), (0.04, 0.95), (0.12, 0.96), (0.16, 0.88)], False), "wood", 0.055, True)]
    parts += [Part([(0, 0.09), (0, 0.02)], "wood", 0.045, True), *_solid(canopy, (-0.1, -0.1))]
    left = [
        *spline([(0, 0.07), (-0.2, 0.2), (-0.28, 0.5)], False),
        (-0.14, 0.47),
        (0, 0.5),
        *spline([(0, 0.5), (-0.01, 0.25), (0, 0.07)], False),
    ]
    right = [
        *spline([(0, 0.07), (0.36, 0.22), (0.52, 0.5)], False),
        (0.42, 0.47),
        (0.28, 0.5),
        *spline([(0.28, 0.5), (0.2, 0.2), (0, 0.07)], False),
    ]
    return [*parts, Part(left, "light"), Part(right, "shade")]


def _mushroom() -> list[Part]:
    stem = spline([(-0.13, 0.5), (-0.13, 0.74), (-0.2, 0.93), (0, 0.995), (0.2, 0.93), (0.13, 0.74), (0.13, 0.5)])
    cap = spline(
        [
            (-0.52, 0.56),
            (-0.46, 0.3),
            (-0.26, 0.08),
            (0, 0.02),
            (0.26, 0.08),
            (0.46, 0.3),
            (0.52, 0.56),
            (0.26, 0.63),
            (0, 0.65),
            (-0.26, 0.63),
        ]
    )
    parts = [_flat(stem, "pale"), Part(clip(stem, ellipse(0.2, 0.8, 0.16, 0.4)), "grey")]
    parts += [*_solid(cap, (-0.08, -0.16))]
    for x, y, r in ((-0.24, 0.32, 0.085), (0.08, 0.2, 0.075), (0.3, 0.42, 0.07), (-0.02, 0.47, 0.06)):
        parts += [Part(ellipse(x, y, r, r * 0.92, 18), "spot")]
    return parts


def _teapot() -> list[Part]:
    body = spline(
        [
            (-0.42, 0.62),
            (-0.34, 0.36),
            (-0.16, 0.24),
            (0.16, 0.24),
            (0.34, 0.36),
            (0.42, 0.62),
            (0.3, 0.9),
            (0, 0.96),
            (-0.3, 0.9),
        ]
    )
    spout = tube([(-0.3, 0.72), (-0.5, 0.62), (-0.56, 0.42), (-0.66, 0.32)], 0.12, 0.055)
    handle = spline([(0.32, 0.38), (0.54, 0.34), (0.64, 0.54), (0.54, 0.74), (0.36, 0.78)], False)
    parts = [Part(handle, "shade", 0.09, True), _flat(spout, "base")]
    parts += [_flat(round_box(-0.22, 0.9, 0.22, 0.99, 0.03), "deep"), *_solid(body)]
    parts += [_flat(spline([(-0.22, 0.25), (-0.14, 0.15), (0, 0.12), (0.14, 0.15), (0.22, 0.25), (0, 0.28)]), "light")]
    parts += [_flat(ellipse(0, 0.08, 0.065, 0.06, 18), "shade")]
    parts += [Part(spline([(-0.28, 0.62), (-0.24, 0.44), (-0.12, 0.36)], False), "light", 0.06)]
    return parts


BUILDERS: dict[str, Callable[[], list[Part]]] = {
    "cat": _cat,
    "fish": _fish,
    "bird": _bird,
    "butterfly": _butterfly,
    "elephant": _elephant,
    "robot": _robot,
    "car": _car,
    "sailboat": _sailboat,
    "rocket": _rocket,
    "umbrella": _umbrella,
    "mushroom": _mushroom,
    "teapot": _teapot,
}
