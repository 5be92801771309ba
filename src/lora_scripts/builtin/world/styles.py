"""The table of styles. Every painter takes a composed picture and the size in pixels, and returns an RGB image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.builtin.world import styles_light, styles_paper

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from lora_scripts.builtin.world.picture import Picture

PAINTERS: dict[str, Callable[[Picture, int], Image.Image]] = {
    "ink wash": styles_paper.ink_wash,
    "neon": styles_light.neon,
    "blueprint": styles_light.blueprint,
    "pixel art": styles_light.pixel_art,
    "watercolour": styles_paper.watercolour,
    "woodcut": styles_paper.woodcut,
}
