"""Values for the blocks of a model: `unet.down: 4` means every layer whose name begins so, the longest beginning wins.

A block may be written as the model names it, `unet.down_blocks.1`, or shorter, `unet.down.1`; `text_encoder` is all of that part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

from lora_scripts.errors import TargetError

__all__ = ["block_of", "block_value", "check_blocks", "short_name"]

Value = TypeVar("Value")
_SHORT = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}
_LEFT_OUT = frozenset({"text_model", "encoder", "model"})
"""Levels of transformers' models that hold one thing only, left out of short names where they stand in front."""


def short_name(layer: str) -> str:
    """`unet.down.1.attentions.0.proj_in` from `unet.down_blocks.1.attentions.0.proj_in`."""
    component, *parts = layer.split(".")
    while parts and parts[0] in _LEFT_OUT:
        parts = parts[1:]
    return ".".join([component, *(_SHORT.get(part, part) for part in parts)])


def block_of(layer: str, blocks: Iterable[str]) -> str | None:
    """The longest of the blocks that the layer lies in; None for none of them."""
    inside = [block for block in blocks if _begins(layer, block) or _begins(short_name(layer), short_name(block))]
    return max(inside, key=lambda block: short_name(block).count("."), default=None)


def block_value(layer: str, values: Mapping[str, Value], default: Value) -> Value:
    """The value for the layer: that of the longest block it lies in."""
    block = block_of(layer, values)
    return default if block is None else values[block]


def check_blocks(setting: str, blocks: Iterable[str], layers: Iterable[str]) -> None:
    """Does nothing when every block has a layer that can be trained in it.

    Raises:
        TargetError: one has none; tells the nearest names and all blocks.
    """
    layers = list(layers)
    known = sorted({".".join(short_name(layer).split(".")[:depth]) for layer in layers for depth in (1, 2, 3)})
    known = [name for name in known if name not in {short_name(layer) for layer in layers}]
    for block in blocks:
        if not any(block_of(layer, [block]) for layer in layers):
            nearest = get_close_matches(short_name(block), known, 3, 0.3) or known[:3]
            raise TargetError(
                f"{setting}: no layer that trains here lies in {block}. Nearest: {', '.join(nearest)}. "
                f"All blocks: {', '.join(known)}"
            )


def _begins(layer: str, block: str) -> bool:
    return layer == block or layer.startswith(block + ".")
