"""Styles made of light, lines and blocks: neon, blueprint and pixel art.

They draw the display list again with their own lines; only pixel art starts from the plain look.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from lora_scripts.builtin.world.picture import (
    Picture,
    paint,
    paint_background,
    sky_gradient,
    subject_mask,
    trace,
)
from lora_scripts.builtin.world.shapes import RGB, Shape, bounds, mix

if TYPE_CHECKING:
    from collections.abc import Iterable


def _outlined(
    pen: ImageDraw.ImageDraw, shapes: Iterable[Shape], side: int, width: float, line: RGB | int, fill: RGB | int
) -> None:
    """Outlines that hide what lies behind them, from back to front; width is the visible part of the line."""
    for shape in shapes:
        trace(pen, [shape], side, 2 * width, line)
        paint(pen, [shape], side, fill)


def _subject_lines(
    pen: ImageDraw.ImageDraw, shapes: list[Shape], side: int, widths: tuple[float, float], colours: tuple[RGB, RGB, RGB]
) -> None:
    """One subject as line art: a bold silhouette, then its inner lines.

    widths: silhouette, inner lines. colours: silhouette, inner lines, fill.
    """
    _outlined(pen, [s for s in shapes if s.rim], side, widths[1], colours[1], colours[2])
    # The silhouette goes around everything, so it is drawn on its own and the inside pasted back.
    inside = Image.new("L", (side, side), 0)
    rims = [s for s in shapes if s.rim]
    trace(ImageDraw.Draw(inside), rims, side, 2 * widths[0], 255)
    paint(ImageDraw.Draw(inside), rims, side, 0)
    pen.bitmap((0, 0), inside, fill=colours[0])
    for shape in shapes:
        if shape.rim or shape.role == "body":
            continue
        if shape.width:
            paint(pen, [shape], side, colours[1])
        else:
            trace(pen, [shape], side, widths[1], colours[1])


def neon(picture: Picture, size: int) -> Image.Image:
    """Glowing tubes on near-black: the subject in its colour, the background in magenta and cyan."""
    side = 2 * size
    magenta, cyan, dark = (176, 20, 150), (14, 124, 164), (10, 6, 24)
    back = Image.new("RGB", (side, side), dark)
    pen = ImageDraw.Draw(back)
    trace(pen, picture.sky, side, 0.018, magenta)
    paint(pen, picture.sky, side, dark)
    for i, shape in enumerate(picture.land):
        lit = shape.role == "window" and picture.scene.time == "night"
        _outlined(pen, [shape], side, 0.0075, cyan if i % 2 else magenta, (150, 110, 30) if lit else dark)
    paint(pen, picture.rain, side, (16, 84, 128))
    glow = picture.tones["base"]
    core = mix(picture.tones["light"], (255, 255, 255), 0.35)
    front = back.copy()
    pen = ImageDraw.Draw(front)
    body = mix(dark, picture.tones["base"], 0.13)
    for shapes in picture.subjects:
        rims = [s for s in shapes if s.rim]
        trace(pen, rims, side, 0.07, dark)
        _subject_lines(pen, shapes, side, (0.021, 0.008), (glow, mix(glow, dark, 0.3), body))
        hot = Image.new("L", (side, side), 0)
        trace(ImageDraw.Draw(hot), rims, side, 0.028, 255)
        trace(ImageDraw.Draw(hot), rims, side, 0.012, 0)
        paint(ImageDraw.Draw(hot), rims, side, 0)
        pen.bitmap((0, 0), hot, fill=core)
    lights = front.reduce(2)
    near = lights.filter(ImageFilter.GaussianBlur(size * 0.015)).point(lambda v: int(max(v - 12, 0) * 0.5))
    far = lights.filter(ImageFilter.GaussianBlur(size * 0.05)).point(lambda v: int(max(v - 14, 0) * 0.5))
    night = sky_gradient(((4, 2, 14), (12, 4, 26), (26, 6, 40)), size)
    return ImageChops.add(ImageChops.lighter(lights, night), ImageChops.add(near, far))


def blueprint(picture: Picture, size: int) -> Image.Image:
    """White lines on a blue ground with a grid; the subject is hatched with a pencil of its colour."""
    side = 3 * size
    ground, white = (22, 68, 146), (246, 250, 255)
    canvas = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(canvas)
    for i in range(17):
        at = round(i * side / 16)
        line = mix(ground, white, 0.26 if i % 4 == 0 else 0.13)
        pen.line((at, 0, at, side), fill=line, width=3)
        pen.line((0, at, side, at), fill=line, width=3)
    lines = Image.new("L", (side, side), 0)
    pen_l = ImageDraw.Draw(lines)
    trace(pen_l, picture.sky, side, 0.016, 160)
    paint(pen_l, picture.sky, side, 0)
    _outlined(pen_l, picture.land, side, 0.0075, 160, 0)
    paint(pen_l, picture.rain, side, 120)
    canvas.paste((206, 224, 250), (0, 0), lines)
    hatch = Image.new("L", (side, side), 0)
    pen_h = ImageDraw.Draw(hatch)
    step = side // 32
    for i in range(-32, 33):
        pen_h.line((i * step, side, i * step + side, 0), fill=255, width=max(1, step * 5 // 8))
    for shapes in picture.subjects:
        rims = [s for s in shapes if s.rim]
        inside = Image.new("L", (side, side), 0)
        paint(ImageDraw.Draw(inside), rims, side, 255)
        # White pencil would swallow the white lines, so it presses less.
        press = 0.55 if picture.scene.colour == "white" else 1.0
        canvas.paste(mix(ground, picture.tones["light"], 0.42 * press), (0, 0), inside)
        canvas.paste(mix(ground, picture.tones["light"], press), (0, 0), ImageChops.multiply(inside, hatch))
        inner = Image.new("L", (side, side), 0)
        pen_i = ImageDraw.Draw(inner)
        _outlined(pen_i, rims, side, 0.007, 255, 0)
        trace(pen_i, [s for s in shapes if not s.rim and s.role not in ("body", "light")], side, 0.01, 255)
        outer = Image.new("L", (side, side), 0)
        trace(ImageDraw.Draw(outer), rims, side, 0.036, 255)
        paint(ImageDraw.Draw(outer), rims, side, 0)
        canvas.paste(white, (0, 0), ImageChops.lighter(inner, outer))
    return canvas.reduce(3)


def pixel_art(picture: Picture, size: int) -> Image.Image:
    """32 x 32 blocks, 24 colours and a dark outline of one block."""
    cells, factor = 32, 4
    side = cells * factor
    back = paint_background(picture, side).reduce(factor)
    front = Image.new("RGB", (side, side), picture.tones["base"])
    for shapes in picture.subjects:
        # Subject by subject, so that neighbours keep a line between them.
        paint(ImageDraw.Draw(front), shapes, side)
        alone = subject_mask(_only(picture, shapes), side, 0.0).reduce(factor).point(lambda v: 255 if v > 110 else 0)
        back.paste((26, 20, 40), (0, 0), alone.filter(ImageFilter.MaxFilter(3)))
        back.paste(front.reduce(factor), (0, 0), alone)
        _stamp_eyes(back, shapes, picture)
    limited = back.quantize(24, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    return limited.resize((size, size), Image.Resampling.NEAREST)


def _stamp_eyes(blocks: Image.Image, shapes: list[Shape], picture: Picture) -> None:
    """Small dark and light details as whole blocks, which averaging would wash out."""
    cells = blocks.size[0]
    stamped = (picture.tones["dark"], picture.tones["cream"])
    for shape in shapes:
        x0, y0, x1, y1 = bounds(shape.points)
        small = max(x1 - x0, y1 - y0) < 3.2 / cells
        if small and not shape.rim and not shape.width and shape.colour in stamped:
            at = (int((x0 + x1) / 2 * cells), int((y0 + y1) / 2 * cells))
            if 0 <= at[0] < cells and 0 <= at[1] < cells and (x1 - x0) * cells > 0.9:
                blocks.putpixel(at, shape.colour)


def _only(picture: Picture, shapes: list[Shape]) -> Picture:
    """The picture with one of its subjects."""
    return Picture(picture.scene, picture.mood, picture.tones, [], [], [], [shapes], [], picture.rng)
