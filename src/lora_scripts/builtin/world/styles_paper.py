"""Styles that live on paper: ink wash, watercolour and woodcut."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from lora_scripts.builtin.world.picture import Picture, paint, paint_background, subject_mask, trace
from lora_scripts.builtin.world.shapes import RGB, Shape, bounds, ellipse, mix

if TYPE_CHECKING:
    from collections.abc import Iterable

Array = NDArray[np.floating[Any]]


def _array(image: Image.Image) -> Array:
    return np.asarray(image, dtype=np.float32)


def _image(array: Array) -> Image.Image:
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))


def _noise(picture: Picture, cells: int, side: int) -> Array:
    """Smooth noise from -1 to 1 with about `cells` bumps along a side: [side, side]."""
    generator = np.random.default_rng(int(picture.rng.random() * 2**32))
    small = Image.fromarray(generator.integers(0, 256, (cells + 2, cells + 2), dtype=np.uint8))
    return _array(small.resize((side, side), Image.Resampling.BICUBIC)) / 127.5 - 1


def _warp(images: list[Image.Image], dx: Array, dy: Array) -> list[Image.Image]:
    """The images with every pixel fetched from (dx, dy) pixels away, so that straight edges wobble."""
    side = dx.shape[0]
    ys, xs = np.mgrid[0:side, 0:side]
    rows = np.clip(ys + np.rint(dy).astype(int), 0, side - 1)
    columns = np.clip(xs + np.rint(dx).astype(int), 0, side - 1)
    return [Image.fromarray(np.asarray(image)[rows, columns]) for image in images]


def _luminance(colour: RGB) -> float:
    return (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) / 255


def _silhouette(shapes: Iterable[Shape], side: int) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    paint(ImageDraw.Draw(mask), shapes, side, 255)
    return mask


def _brush(pen: ImageDraw.ImageDraw, shape: Shape, side: int, width: float, colour: int, phase: float) -> None:
    """An outline whose width swells and thins along the stroke, as a soft brush leaves it."""
    points = [(x * side, y * side) for x, y in shape.points]
    if not shape.width:
        points = [*points, points[0]]
    travelled = phase
    for (x0, y0), (x1, y1) in pairwise(points):
        length = math.hypot(x1 - x0, y1 - y0)
        steps = max(1, int(length / (side * 0.008)))
        for k in range(steps):
            x, y = x0 + (x1 - x0) * k / steps, y0 + (y1 - y0) * k / steps
            travelled += length / steps / side
            swell = 0.6 + 0.28 * math.sin(9 * travelled) + 0.12 * math.sin(23 * travelled)
            r = width * side * swell
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)


_WASH = {"day": (0.02, 0.1), "sunset": (0.24, 0.02), "night": (0.8, 0.52), "rain": (0.36, 0.12)}


def ink_wash(picture: Picture, size: int) -> Image.Image:
    """Grey washes and swelling brush lines on rice paper, the subject in a thin tint of its colour, a red seal."""
    side = 2 * size
    paper, ink = (246, 239, 222), (52, 50, 58)
    top, low = _WASH[picture.scene.time]
    sky = np.interp(np.linspace(0, 1, side), (0.0, 0.65), (top, low)).astype(np.float32)
    depth = _image(np.repeat((sky * 255)[:, None], side, axis=1))
    pen = ImageDraw.Draw(depth)
    # Sun, moon, stars and clouds are left as paper; rain clouds are the darkest wash.
    paint(pen, picture.sky, side, 135 if picture.scene.time == "rain" else 10)
    if picture.scene.time == "night":
        paint(pen, picture.sky[-1:], side, int(top * 235))
    rows = np.arange(side, dtype=np.float32)
    night = 0.25 if picture.scene.time == "night" else 0.0
    for shape in picture.land:
        strength = 0.06 + night + 0.85 * (1 - _luminance(shape.colour)) ** 1.4
        if shape.role == "window":
            strength = 0.05 if _luminance(shape.colour) > 0.6 else 0.7
        fade = np.full(side, strength, dtype=np.float32)
        if shape.role in ("far", "ground"):
            # A loaded brush: dark along the upper edge, running out downwards.
            first = bounds(shape.points)[1] * side
            fade = strength * np.clip(1.15 - (rows - first) / (0.3 * side), 0.3 + night, 1.0)
        wash = _image(np.repeat((fade * 255)[:, None], side, axis=1))
        depth.paste(wash, (0, 0), _silhouette([shape], side))
    soft = depth.filter(ImageFilter.GaussianBlur(side * 0.005))
    pen = ImageDraw.Draw(soft)
    for i, shape in enumerate(s for s in picture.land if s.role in ("prop", "far") and not s.width):
        if i % 3 == 0 and len(shape.points) < 40:
            _brush(pen, shape, side, 0.003, 190, i)
    paint(pen, picture.rain, side, 205 if picture.scene.time == "rain" else 0)
    wobble = side * 0.012
    (soft,) = _warp([soft], _noise(picture, 11, side) * wobble, _noise(picture, 11, side) * wobble)
    amount = _array(soft) / 255 * (1 + 0.22 * _noise(picture, 7, side)) * 0.82
    canvas = np.array(paper, dtype=np.float32) * (1 - amount[..., None]) + np.array(ink, np.float32) * amount[..., None]
    result = _image(canvas + 3 * _noise(picture, 24, side)[..., None])
    cloudy = 1 + 0.3 * _noise(picture, 6, side)
    for shapes in picture.subjects:
        rims = [s for s in shapes if s.rim]
        body = _silhouette(rims, side)
        glow = body.filter(ImageFilter.GaussianBlur(side * 0.03)).point(lambda v: int(v * 0.7))
        result.paste(paper, (0, 0), glow)
        flat = Image.new("RGB", (side, side), paper)
        pen_f = ImageDraw.Draw(flat)
        for s in shapes:
            dark = s.colour in (picture.tones["dark"], picture.tones["wood"])
            paint(pen_f, [s], side, (70, 66, 70) if dark else mix(s.colour, (128, 122, 116), 0.18))
        tint = _array(flat.filter(ImageFilter.GaussianBlur(side * 0.006)))
        pale = np.clip(0.72 * cloudy, 0.4, 0.95)[..., None]
        result.paste(_image(np.array(paper, np.float32) * (1 - pale) + tint * pale), (0, 0), body)
        strokes = Image.new("L", (side, side), 0)
        pen_s = ImageDraw.Draw(strokes)
        phase = picture.rng.uniform(0, 6)
        for i, s in enumerate(rims):
            paint(pen_s, [s], side, 0)
            _brush(pen_s, s, side, 0.0115, 255, phase + i)
        for s in shapes:
            if s.role == "line" and not s.rim:
                paint(pen_s, [s], side, 150)
        result.paste((32, 29, 34), (0, 0), strokes.filter(ImageFilter.GaussianBlur(0.7)))
        pen_r = ImageDraw.Draw(result)
        for s in shapes:
            if not s.rim and s.colour in (picture.tones["dark"], picture.tones["cream"]):
                paint(pen_r, [s], side, (40, 37, 42) if s.colour == picture.tones["dark"] else paper)
    seal = (0.9 * side, 0.045 * side, 0.96 * side, 0.125 * side)
    ImageDraw.Draw(result).rounded_rectangle(seal, side * 0.01, fill=(186, 52, 42))
    ImageDraw.Draw(result).line((0.93 * side, 0.06 * side, 0.93 * side, 0.11 * side), fill=paper, width=side // 80)
    return result.reduce(2)


def watercolour(picture: Picture, size: int) -> Image.Image:
    """Pale pigments that pool at their edges, with a paper margin and a few splashes."""
    side = 2 * size
    paper = np.array((252, 249, 241), dtype=np.float32)
    dx, dy = _noise(picture, 9, side) * side * 0.014, _noise(picture, 9, side) * side * 0.014
    frame = Image.new("L", (side, side), 0)
    edge = side * 0.035
    ImageDraw.Draw(frame).rectangle((edge, edge, side - edge, side - edge), fill=255)
    back, frame = _warp([paint_background(picture, side), frame], dx, dy)
    back = back.filter(ImageFilter.GaussianBlur(side * 0.005))
    frame = frame.filter(ImageFilter.GaussianBlur(side * 0.006))
    bloom = _noise(picture, 5, side) * 0.7 + _noise(picture, 14, side) * 0.3
    colours = _array(back)
    pooled = np.abs(colours - _array(back.filter(ImageFilter.GaussianBlur(side * 0.014)))).mean(axis=2)
    strength = (0.92 if picture.scene.time == "night" else 0.7) * (1 + 0.3 * bloom)
    colours = paper + (colours - paper) * np.clip(strength, 0, 1)[..., None]
    colours *= (1 - np.clip(pooled / 255, 0, 0.35) * 0.9)[..., None]
    margin = _array(frame)[..., None] / 255
    rim = _rim(frame, side * 0.016)[..., None]
    colours = paper + (colours * (1 - 0.22 * rim) - paper) * margin
    flat = Image.new("RGB", (side, side), picture.tones["base"])
    for shapes in picture.subjects:
        paint(ImageDraw.Draw(flat), shapes, side)
    flat, mask = _warp([flat, subject_mask(picture, side, 0.003)], dx * 0.45, dy * 0.45)
    mask = mask.filter(ImageFilter.GaussianBlur(side * 0.003))
    flat = flat.filter(ImageFilter.GaussianBlur(side * 0.004))
    pigment = _array(flat)
    inner = np.abs(pigment - _array(flat.filter(ImageFilter.GaussianBlur(side * 0.012)))).mean(axis=2) / 255
    tint = paper + (pigment - paper) * np.clip(0.84 + 0.3 * bloom, 0.5, 1.0)[..., None]
    tint *= (1 - 0.55 * _rim(mask, side * 0.012) - np.clip(inner, 0, 0.25))[..., None]
    gap = _array(mask.filter(ImageFilter.GaussianBlur(side * 0.012)))[..., None] / 255
    colours = colours + (paper - colours) * np.clip(gap * 1.5, 0, 1) * 0.8
    inside = _array(mask)[..., None] / 255
    colours = colours * (1 - inside) + tint * inside
    result = _image(colours + 4 * _noise(picture, 48, side)[..., None])
    splash = Image.new("L", (side, side), 0)
    rng = picture.rng
    drops = [(rng.uniform(0.06, 0.94), rng.uniform(0.72, 0.94), rng.uniform(0.005, 0.013)) for _ in range(6)]
    paint(ImageDraw.Draw(splash), [Shape(ellipse(x, y, r, r, 12), (0, 0, 0), "drop") for x, y, r in drops], side, 190)
    result.paste(picture.tones["base"], (0, 0), splash.filter(ImageFilter.GaussianBlur(0.8)))
    return result.reduce(2)


def _rim(mask: Image.Image, radius: float) -> Array:
    """1 just inside the border of a mask, fading inwards over the radius in pixels: [side, side]."""
    inside = _array(mask) / 255
    blurred = _array(mask.filter(ImageFilter.GaussianBlur(radius))) / 255
    return np.clip(2 * inside * (1 - blurred), 0, 1)


def _cuts(side: int) -> list[Image.Image]:
    """Carved tones from black to paper (mode "L", 255 is paper): wavy horizontal cuts of growing width."""
    ys, xs = np.mgrid[0:side, 0:side].astype(np.float32) / side
    wave = (ys * 24 + 0.22 * np.sin(xs * 11) + 0.12 * np.sin(xs * 23 + 1)) % 1.0
    return [Image.fromarray(((wave < duty) * 255).astype(np.uint8)) for duty in (0.0, 0.3, 0.52, 0.74, 1.0)]


def woodcut(picture: Picture, size: int) -> Image.Image:
    """A black and cream print with carved tones; the subject is printed in one spot colour."""
    side = 3 * size
    cream, black = (244, 233, 206), (30, 25, 27)
    cuts = _cuts(side)
    time = picture.scene.time
    plate = cuts[{"day": 4, "sunset": 3, "night": 0, "rain": 2}[time]].copy()
    if time == "sunset":
        plate.paste(cuts[2].crop((0, 0, side, side // 5)), (0, 0))
    pen = ImageDraw.Draw(plate)
    trace(pen, picture.sky, side, 0.016, 255 if time == "night" else 0)
    paint(pen, picture.sky, side, 0 if time == "rain" else 255)
    if time == "night":
        paint(pen, picture.sky[-1:], side, 0)
    if time == "sunset":
        paint(pen, picture.sky[2:3], side, 255)
    for shape in picture.land:
        tone = _luminance(shape.colour) * (1.25 if time == "night" else 1.0)
        if time in ("rain", "sunset"):
            # Both lights pull all land towards one grey; a print needs its contrast back.
            tone = 0.5 + 1.5 * (tone - 0.5)
        level = sum(tone > limit for limit in (0.3, 0.46, 0.6, 0.78))
        if shape.role == "window":
            level = 4 if tone > 0.55 else 0
        trace(pen, [shape], side, 0.013, 255 if level == 0 else 0)
        if shape.width:
            paint(pen, [shape], side, 0)
        else:
            plate.paste(cuts[level], (0, 0), _silhouette([shape], side))
    paint(pen, picture.rain, side, 255)
    canvas = Image.new("RGB", (side, side), black)
    canvas.paste(cream, (0, 0), plate)
    spot = (253, 251, 246) if picture.scene.colour == "white" else mix(picture.tones["base"], (120, 90, 60), 0.1)
    ys, xs = np.mgrid[0:side, 0:side].astype(np.float32) / side
    diagonal = Image.fromarray(((((xs + ys) * 26) % 1.0 < 0.42) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for shapes in picture.subjects:
        rims = [s for s in shapes if s.rim]
        trace(pen, rims, side, 0.074, cream)
        trace(pen, rims, side, 0.042, black)
        shadow = Image.new("L", (side, side), 0)
        pen_s = ImageDraw.Draw(shadow)
        for s in shapes:
            dark = s.colour in (picture.tones["dark"], picture.tones["wood"])
            pale = s.role == "detail" and not dark
            paint(pen, [s], side, black if dark else cream if pale else spot)
            paint(pen_s, [s], side, 255 if s.role == "shade" and not s.width else 0)
        for s in shapes:
            if s.role == "line" and not s.rim:
                paint(pen, [s], side, black)
        canvas.paste(black, (0, 0), ImageChops.multiply(shadow, diagonal))
        trace(pen, [s for s in shapes if s.role == "light" and not s.width], side, 0.009, black)
    return canvas.reduce(3)
