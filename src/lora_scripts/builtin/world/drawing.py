"""Pictures of scenes, plain or in a style."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.builtin.world.picture import Picture, compose, paint_background, paint_subjects, subject_mask
from lora_scripts.builtin.world.styles import PAINTERS

if TYPE_CHECKING:
    from PIL import Image

    from lora_scripts.builtin.world.scene import Scene

_SUPERSAMPLING = 3


def _paint(picture: Picture, style: str | None, size: int) -> Image.Image:
    if style is not None:
        return PAINTERS[style](picture, size)
    canvas = paint_background(picture, size * _SUPERSAMPLING)
    paint_subjects(canvas, picture, size * _SUPERSAMPLING)
    return canvas.reduce(_SUPERSAMPLING)


def _compose(scene: Scene, seed: int, style: str | None) -> Picture:
    if style is not None and style not in PAINTERS:
        raise ValueError(f"style: {style!r} is not one of {tuple(PAINTERS)}")
    if seed < 0:
        raise ValueError(f"seed: {seed} is negative")
    return compose(scene, seed)


def draw(scene: Scene, seed: int, style: str | None = None, size: int = 128) -> Image.Image:
    """An RGB picture of the scene, size x size pixels.

    Args:
        seed: 0 or more; decides positions, sizes and the shapes of the background. The layout does not depend on the
            style, so one seed in two styles shows one scene drawn twice.
        style: one of `STYLES`, or None for the plain look of the base models.
    Raises:
        ValueError: the style is unknown or the seed negative.
    """
    return _paint(_compose(scene, seed, style), style, size)


def draw_with_mask(
    scene: Scene, seed: int, style: str | None = None, size: int = 128
) -> tuple[Image.Image, Image.Image]:
    """The picture that `draw` gives, and a mask (mode "L", 255 inside) of the subjects with their outlines."""
    picture = _compose(scene, seed, style)
    mask = subject_mask(picture, size * _SUPERSAMPLING).reduce(_SUPERSAMPLING)
    return _paint(picture, style, size), mask
