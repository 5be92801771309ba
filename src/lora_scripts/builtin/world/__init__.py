"""The illustrated world: scenes with five known attributes, their drawings and their captions.

The built-in Stable Diffusion, BLIP and CLIP are trained on these pictures and measured against the attributes.
Everything is a function of its arguments: the same scene, seed, style and size give the same pixels.
"""

from lora_scripts.builtin.world.captions import canonical_caption, caption, read_caption
from lora_scripts.builtin.world.drawing import draw, draw_with_mask
from lora_scripts.builtin.world.scene import (
    ATTRIBUTES,
    COLOURS,
    COUNTS,
    PLACES,
    STYLES,
    SUBJECTS,
    TIMES,
    Scene,
    is_held_out,
    random_scene,
)

__all__ = [
    "ATTRIBUTES",
    "COLOURS",
    "COUNTS",
    "PLACES",
    "STYLES",
    "SUBJECTS",
    "TIMES",
    "Scene",
    "canonical_caption",
    "caption",
    "draw",
    "draw_with_mask",
    "is_held_out",
    "random_scene",
    "read_caption",
]
