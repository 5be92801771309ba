"""From a scene to a display list, and the plain painter that all styles build on."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from lora_scripts.builtin.world.places import place_shapes
from lora_scripts.builtin.world.scene import ATTRIBUTES, Scene
from lora_scripts.builtin.world.shapes import RGB, Shape, ellipse, mix
from lora_scripts.builtin.world.sky import MOODS, Mood, rain_streaks, sky_shapes
from lora_scripts.builtin.world.subjects import aspect_of, hover_of, palette, place_subject

if TYPE_CHECKING:
    from collections.abc import Iterable

_HEIGHTS = {1: (0.58, 0.68), 2: (0.44, 0.48), 3: (0.35, 0.38)}
_OUTLINE_WIDTH = 0.013


@dataclass
class Picture:
    """A composed scene before any style has drawn it.

    sky, land and rain are background shapes from back to front; subjects holds one list of shapes per subject.
    """

    scene: Scene
    mood: Mood
    tones: dict[str, RGB]
    sky: list[Shape]
    land: list[Shape]
    shadows: list[Shape]
    subjects: list[list[Shape]]
    rain: list[Shape]
    rng: Random


def _spots(scene: Scene, rng: Random) -> list[tuple[float, float, float, bool]]:
    """Centre, ground line, height and mirroring of each subject, from left to right.

    Wide subjects in groups overlap a little and stand at different depths, since side by side they would be tiny.
    """
    count, aspect = scene.count, aspect_of(scene.subject)
    crowd = 0.0 if count == 1 else min(max(aspect - 0.8, 0.0), 0.4) / 0.4
    slot = 0.96 / count
    room = 0.84 if count == 1 else slot * (1.0 + crowd * (0.1 if count == 2 else 0.22))
    margin = 0.02 + crowd * (0.02 if count == 2 else 0.04)
    spots = []
    for i in range(count):
        height = min(rng.uniform(*_HEIGHTS[count]), room / aspect * rng.uniform(0.94, 1.0))
        reach = min(max(slot - aspect * height - 0.05, 0.0) / 2, 0.09 if count == 1 else 0.03)
        centre = margin + (1 - 2 * margin) / count * (i + 0.5) + rng.uniform(-reach, reach)
        depth = crowd * (0.06 if count == 2 else 0.1) * (i % 2)
        spots.append((centre, rng.uniform(0.895, 0.935) - depth, height, rng.random() < 0.5))
    return spots


def compose(scene: Scene, seed: int) -> Picture:
    """The scene laid out: the same for every style and size."""
    number = seed
    for name, values in ATTRIBUTES.items():
        number = number * len(values) + values.index(getattr(scene, name))
    rng = Random(number)  # noqa: S311 (drawing, not secrets)
    mood = MOODS[scene.time]
    sky = sky_shapes(scene.time, rng)
    land = place_shapes(scene.place, mood, rng)
    tones = {name: mood.subject(tone) for name, tone in palette(scene.colour).items()}
    ground_colour = next(s.colour for s in reversed(land) if s.role == "ground")
    spots = sorted(_spots(scene, rng), key=lambda spot: spot[1])
    shadows: list[Shape] = []
    subjects: list[list[Shape]] = []
    for centre, ground, height, mirror in spots:
        half = aspect_of(scene.subject) * height * (0.36 if hover_of(scene.subject) else 0.44)
        shadows.append(Shape(ellipse(centre, ground, half, 0.024, 24), mix(ground_colour, (24, 22, 44), 0.4), "shadow"))
        subjects.append(place_subject(scene.subject, tones, centre, ground, height, mirror))
    rain = rain_streaks(rng) if scene.time == "rain" else []
    return Picture(scene, mood, tones, sky, land, shadows, subjects, rain, rng)


def paint(pen: ImageDraw.ImageDraw, shapes: Iterable[Shape], side: int, colour: RGB | int | None = None) -> None:
    """Fills the shapes on a canvas of side pixels, each in its own colour or all in one."""
    for shape in shapes:
        points = [(x * side, y * side) for x, y in shape.points]
        fill = shape.colour if colour is None else colour
        if shape.width:
            pen.line(points, fill=fill, width=max(1, round(shape.width * side)), joint="curve")
            if len(points) > 2:
                r = shape.width * side / 2
                for x, y in (points[0], points[-1]):
                    pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        else:
            pen.polygon(points, fill=fill)


def trace(
    pen: ImageDraw.ImageDraw, shapes: Iterable[Shape], side: int, width: float, colour: RGB | int | None = None
) -> None:
    """Draws the outlines of the shapes, width being a fraction of the side."""
    pixels = max(1, round(width * side))
    for shape in shapes:
        points = [(x * side, y * side) for x, y in shape.points]
        fill = shape.colour if colour is None else colour
        if shape.width:
            pen.line(points, fill=fill, width=max(1, round(shape.width * side)) + pixels, joint="curve")
        else:
            pen.line([*points, points[0], points[1]], fill=fill, width=pixels, joint="curve")


def sky_gradient(colours: tuple[RGB, RGB, RGB], side: int, horizon: float = 0.62) -> Image.Image:
    """Top, middle and horizon colour blended smoothly; below the horizon the last colour stays."""
    rows = np.linspace(0.0, 1.0, 48) / horizon
    column = np.stack([np.interp(rows, (0.0, 0.5, 1.0), [c[k] for c in colours]) for k in range(3)], axis=-1)
    strip = Image.fromarray(np.rint(column).astype(np.uint8)[:, None, :])
    return strip.resize((1, side), Image.Resampling.BILINEAR).resize((side, side), Image.Resampling.NEAREST)


def _ground_shade(side: int) -> Image.Image:
    """A factor for the land: 1 at the horizon, a little darker and cooler towards the bottom edge."""
    low = (230, 231, 238)
    white = (255, 255, 255)
    return sky_gradient((white, white, low), side, horizon=1.0)


def paint_background(picture: Picture, side: int) -> Image.Image:
    """Sky, land and rain in the plain look."""
    canvas = sky_gradient(picture.mood.sky, side)
    pen = ImageDraw.Draw(canvas)
    paint(pen, picture.sky, side)
    paint(pen, picture.land, side)
    canvas = ImageChops.multiply(canvas, _ground_shade(side))
    paint(ImageDraw.Draw(canvas), picture.rain, side)
    return canvas


def paint_subjects(canvas: Image.Image, picture: Picture, side: int) -> None:
    """Adds shadows and outlined subjects to the canvas."""
    pen = ImageDraw.Draw(canvas)
    paint(pen, picture.shadows, side)
    for shapes in picture.subjects:
        trace(pen, (s for s in shapes if s.rim), side, 2 * _OUTLINE_WIDTH, picture.tones["outline"])
        paint(pen, shapes, side)


def subject_mask(picture: Picture, side: int, grow: float = _OUTLINE_WIDTH) -> Image.Image:
    """255 where a subject or its outline is (mode "L")."""
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    for shapes in picture.subjects:
        rims = [s for s in shapes if s.rim]
        paint(pen, rims, side, 255)
        if grow:
            trace(pen, rims, side, 2 * grow, 255)
    return mask
