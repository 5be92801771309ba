"""Six styles, each painting the same display list with its own ground, lines and fills.

All painters take a composed picture and the size in pixels, and return an RGB image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from lora_scripts.builtin.world.picture import (
    Picture,
    paint,
    paint_background,
    paint_subjects,
    sky_gradient,
    subject_mask,
    trace,
)
from lora_scripts.builtin.world.shapes import RGB, Shape, mix

Array = NDArray[np.float32]


def _noise(picture: Picture, cells: int, side: int, octave: int = 0) -> Image.Image:
    """Smooth noise (mode "L", mean near 128) with about `cells` bumps along a side."""
    generator = np.random.default_rng([int(picture.rng.random() * 2**32), octave])
    small = generator.integers(0, 256, (cells + 2, cells + 2), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def _array(image: Image.Image) -> Array:
    return np.asarray(image, dtype=np.float32)


def _image(array: Array) -> Image.Image:
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))


def _edges(mask: Image.Image, radius: float) -> Image.Image:
    """The inner edge of a mask: bright at the border, fading inwards over the radius in pixels."""
    return ImageChops.multiply(mask, ImageChops.invert(mask.filter(ImageFilter.GaussianBlur(radius)))).point(
        lambda v: min(255, v * 2)
    )


def _warp(image: Image.Image, picture: Picture, strength: float, cells: int) -> Image.Image:
    """The image with every pixel moved by smooth noise of up to strength pixels, so that edges wobble."""
    side = image.size[0]
    dx = (_array(_noise(picture, cells, side, 1)) / 127.5 - 1) * strength
    dy = (_array(_noise(picture, cells, side, 2)) / 127.5 - 1) * strength
    ys, xs = np.mgrid[0:side, 0:side]
    pixels = np.asarray(image)
    return Image.fromarray(
        pixels[np.clip(ys + np.rint(dy), 0, side - 1).astype(int), np.clip(xs + np.rint(dx), 0, side - 1).astype(int)]
    )


def _brush(
    pen: ImageDraw.ImageDraw, shapes: Iterable[Shape], side: int, width: float, colour: int, phase: float
) -> None:
    """Outlines whose width swells and thins along the stroke, as a soft brush leaves them."""
    for number, shape in enumerate(shapes):
        points = [(x * side, y * side) for x, y in shape.points]
        if not shape.width:
            points = [*points, points[0]]
        travelled = phase + number * 1.7
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            length = math.hypot(x1 - x0, y1 - y0)
            steps = max(1, int(length / (side * 0.006)))
            for k in range(steps):
                x, y = x0 + (x1 - x0) * k / steps, y0 + (y1 - y0) * k / steps
                travelled += length / steps / side * 9
                r = width * side * (0.55 + 0.45 * math.sin(travelled))
                if r > 0.35:
                    pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _ink_wash(picture: Picture, size: int) -> Image.Image:
    side = 2 * size
    paper: RGB = (246, 240, 226)
    grey = _array(paint_background(picture, side).filter(ImageFilter.GaussianBlur(side * 0.012)).convert("L")) / 255
    night = 0.55 if picture.scene.time == "night" else 0.8
    wash = np.clip(night + (1 - night) * 1.25 * grey, 0, 1) * (0.94 + 0.06 * _array(_noise(picture, 6, side)) / 127.5)
    canvas = _image(np.array(paper, dtype=np.float32) * np.clip(wash, 0, 1)[..., None])
    lines = Image.new("L", (side, side), 0)
    _brush(
        ImageDraw.Draw(lines), [s for s in picture.land if s.role in ("far", "prop", "ground")], side, 0.0035, 130, 0
    )
    paint(ImageDraw.Draw(lines), picture.rain, side, 60)
    canvas.paste((70, 68, 74), (0, 0), lines)
    for shapes in picture.subjects:
        rims = [s for s in shapes if s.rim]
        body = Image.new("L", (side, side), 0)
        paint(ImageDraw.Draw(body), rims, side, 255)
        tinted = Image.new("RGB", (side, side), paper)
        pen = ImageDraw.Draw(tinted)
        for s in shapes:
            dark = s.colour == picture.tones["dark"]
            paint(pen, [s], side, (56, 52, 58) if dark else mix(mix(s.colour, (120, 116, 112), 0.25), paper, 0.3))
        canvas.paste(tinted.filter(ImageFilter.GaussianBlur(side * 0.006)), (0, 0), body)
        strokes = Image.new("L", (side, side), 0)
        pen_l = ImageDraw.Draw(strokes)
        _brush(pen_l, rims, side, 0.0105, 255, picture.rng.uniform(0, 6))
        paint(pen_l, [s for s in shapes if s.colour == picture.tones["dark"] and not s.rim], side, 255)
        canvas.paste((34, 31, 36), (0, 0), strokes.filter(ImageFilter.GaussianBlur(0.6)))
    return canvas.reduce(2)


def _neon(picture: Picture, size: int) -> Image.Image:
    side = 2 * size
    canvas = sky_gradient(((10, 6, 26), (16, 8, 36), (22, 10, 44)), side)
    back = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(back)
    for i, shape in enumerate(s for s in picture.sky + picture.land if s.role != "shadow"):
        paint(pen, [shape], side, (12, 7, 30))
        trace(pen, [shape], side, 0.008, (200, 30, 170) if i % 2 else (20, 160, 200))
    paint(pen, picture.rain, side, (30, 110, 180))
    back = back.point(lambda v: int(v * 0.62))
    front = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(front)
    inside = Image.new("L", (side, side), 0)
    glow, core = picture.tones["base"], mix(picture.tones["light"], (255, 255, 255), 0.45)
    for shapes in picture.subjects:
        rims = [s for s in shapes if s.rim]
        paint(ImageDraw.Draw(inside), rims, side, 255)
        trace(pen, rims, side, 0.034, glow)
        paint(pen, rims, side, mix(glow, (10, 6, 26), 0.86))
        trace(pen, [s for s in shapes if not s.rim], side, 0.011, mix(glow, (10, 6, 26), 0.2))
    back.paste((12, 7, 30), (0, 0), inside)
    thin = Image.new("RGB", (side, side))
    for shapes in picture.subjects:
        pen = ImageDraw.Draw(thin)
        rims = [s for s in shapes if s.rim]
        trace(pen, rims, side, 0.02, core)
        paint(pen, rims, side, (0, 0, 0))
    lights = ImageChops.lighter(back, ImageChops.lighter(front, thin))
    halo = lights.resize((size, size), Image.Resampling.BOX)
    near = halo.filter(ImageFilter.GaussianBlur(size * 0.02))
    far = halo.filter(ImageFilter.GaussianBlur(size * 0.06))
    result = ImageChops.add(canvas.resize((size, size), Image.Resampling.BOX), halo)
    return ImageChops.add(ImageChops.add(result, near.point(lambda v: int(v * 0.6))), far.point(lambda v: int(v * 0.7)))


def _blueprint(picture: Picture, size: int) -> Image.Image:
    side = 3 * size
    ground: RGB = (24, 74, 150)
    canvas = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(canvas)
    step = side / 16
    for i in range(17):
        line, width = (mix(ground, (255, 255, 255), 0.3), 3) if i % 4 == 0 else (mix(ground, (255, 255, 255), 0.14), 3)
        pen.line((i * step, 0, i * step, side), fill=line, width=width)
        pen.line((0, i * step, side, i * step), fill=line, width=width)
    lines = Image.new("L", (side, side), 0)
    pen_l = ImageDraw.Draw(lines)
    for shape in picture.sky + picture.land:
        paint(pen_l, [shape], side, 0)
        trace(pen_l, [shape], side, 0.008, 150)
    paint(pen_l, picture.rain, side, 110)
    canvas.paste((214, 230, 250), (0, 0), lines)
    for shapes in picture.subjects:
        rims = [s for s in shapes if s.rim]
        trace(pen, rims, side, 0.036, (246, 250, 255))
        paint(pen, rims, side, mix(ground, picture.tones["base"], 0.45))
        trace(pen, [s for s in shapes if not s.rim], side, 0.009, (200, 220, 246))
    return canvas.reduce(3)


def _pixel_art(picture: Picture, size: int) -> Image.Image:
    cells, factor = 32, 4
    side = cells * factor
    back = paint_background(picture, side).reduce(factor)
    front = Image.new("RGB", (side, side), picture.tones["base"])
    for shapes in picture.subjects:
        paint(ImageDraw.Draw(front), shapes, side)
    mask = subject_mask(picture, side, 0.0).reduce(factor).point(lambda v: 255 if v > 110 else 0)
    outline = mask.filter(ImageFilter.MaxFilter(3))
    back.paste((26, 20, 40), (0, 0), outline)
    back.paste(front.reduce(factor), (0, 0), mask)
    limited = back.quantize(20, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    return limited.resize((size, size), Image.Resampling.NEAREST)


def _watercolour(picture: Picture, size: int) -> Image.Image:
    side = 2 * size
    paper = np.array((250, 247, 238), dtype=np.float32)
    wobble = side * 0.014
    back = _warp(paint_background(picture, side), picture, wobble, 9).filter(ImageFilter.GaussianBlur(side * 0.008))
    bloom = _array(_noise(picture, 5, side)) / 255
    strength = (0.5 + 0.3 * bloom)[..., None] * (1.1 if picture.scene.time == "night" else 0.8)
    colours = paper + (_array(back) - paper) * strength
    subject = Image.new("RGB", (side, side))
    paint_subjects(subject, picture, side)
    flat = Image.new("RGB", (side, side), picture.tones["base"])
    for shapes in picture.subjects:
        paint(ImageDraw.Draw(flat), shapes, side)
    flat = _warp(flat, picture, wobble * 0.5, 9).filter(ImageFilter.GaussianBlur(side * 0.007))
    mask = _warp(subject_mask(picture, side, 0.004), picture, wobble * 0.5, 9).filter(ImageFilter.GaussianBlur(1.0))
    rim = _array(_edges(mask, side * 0.02))[..., None] / 255
    tint = paper + (_array(flat) - paper) * (0.72 + 0.25 * bloom)[..., None]
    tint = tint * (1 - 0.45 * rim)
    halo = _array(mask.filter(ImageFilter.GaussianBlur(side * 0.02)))[..., None] / 255
    colours = colours + (paper - colours) * halo * 0.75
    inside = _array(mask)[..., None] / 255
    colours = colours * (1 - inside) + tint * inside
    grain = (_array(_noise(picture, 40, side, 3)) / 127.5 - 1)[..., None] * 5
    border = _warp(_vignette(side), picture, side * 0.02, 12).filter(ImageFilter.GaussianBlur(2))
    frame = _array(border)[..., None] / 255
    return _image(paper + (colours - paper) * frame + grain).reduce(2)


def _vignette(side: int) -> Image.Image:
    """White inside, black along an uneven paper margin."""
    frame = Image.new("L", (side, side), 0)
    margin = side * 0.03
    ImageDraw.Draw(frame).rectangle((margin, margin, side - margin, side - margin), fill=255)
    return frame


def _woodcut(picture: Picture, size: int) -> Image.Image:
    side = 3 * size
    cream, black = (244, 234, 208), (28, 24, 26)
    tone = paint_background(picture, side)
    for_lines = ImageDraw.Draw(tone)
    for shape in picture.land:
        trace(for_lines, [shape], side, 0.004, None)
    grey = _array(tone.convert("L").filter(ImageFilter.GaussianBlur(side * 0.006))) / 255
    ys, xs = np.mgrid[0:side, 0:side].astype(np.float32) / side
    wave = 0.5 + 0.5 * np.sin(
        (ys * 26 + 0.35 * np.sin(xs * 7) + _array(_noise(picture, 8, side)) / 255 * 0.35) * 2 * math.pi
    )
    lift = 0.28 if picture.scene.time == "night" else 0.0
    carved = np.where(wave < np.clip((grey - 0.25 + lift) * 1.6, 0.08, 1.0), 255, 0).astype(np.uint8)
    canvas = Image.new("RGB", (side, side), black)
    canvas.paste(cream, (0, 0), Image.fromarray(carved))
    lines = Image.new("L", (side, side), 0)
    pen_l = ImageDraw.Draw(lines)
    for shape in picture.land:
        paint(pen_l, [shape], side, 0)
        trace(pen_l, [shape], side, 0.008, 255)
    canvas.paste(black, (0, 0), lines)
    pen = ImageDraw.Draw(canvas)
    spot = mix(picture.tones["base"], (120, 90, 60), 0.12) if picture.scene.colour != "white" else (252, 250, 244)
    diagonal = (((xs + ys) * 30) % 1.0 < 0.4).astype(np.uint8) * 255
    for shapes in picture.subjects:
        rims = [s for s in shapes if s.rim]
        trace(pen, rims, side, 0.075, cream)
        trace(pen, rims, side, 0.04, black)
        shadow = Image.new("L", (side, side), 0)
        pen_s = ImageDraw.Draw(shadow)
        for s in shapes:
            dark = s.colour in (picture.tones["dark"], picture.tones["wood"])
            pale = s.role == "detail" and not dark
            paint(pen, [s], side, black if dark else cream if pale else spot)
            paint(pen_s, [s], side, 255 if s.role == "shade" and not s.width else 0)
        canvas.paste(black, (0, 0), ImageChops.multiply(shadow, Image.fromarray(diagonal)))
    return canvas.reduce(3)


PAINTERS: dict[str, Callable[[Picture, int], Image.Image]] = {
    "ink wash": _ink_wash,
    "neon": _neon,
    "blueprint": _blueprint,
    "pixel art": _pixel_art,
    "watercolour": _watercolour,
    "woodcut": _woodcut,
}
