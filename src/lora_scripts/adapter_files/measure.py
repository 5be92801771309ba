"""How strong each layer of an adapter is, and whether its numbers are sound; one layer in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_scripts.adapter_files.layer_change import change_of_parts, read_parts
from lora_scripts.adapters.weights import LayerChange, LoRATensors
from lora_scripts.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_scripts.adapter_files.adapter_file import AdapterFile, AdapterLayer

__all__ = ["LayerFacts", "block_norms", "block_of", "change_norm", "measure"]

_COMPONENTS = {
    "unet": "U-Net",
    "transformer": "transformer",
    "text_encoder": "text encoder",
    "text_encoder_2": "text encoder 2",
    "text_encoder_3": "text encoder 3",
    "language_model": "model",
}
_UNET_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:[._](\d+))?")
_NUMBERED = re.compile(r"([a-z]\w*?(?:blocks?|layers))[._](\d+)")


@dataclass(frozen=True)
class LayerFacts:
    """What one layer's numbers say.

    Attributes:
        block: for people: "U-Net down 1", "text encoder 2".
        norm: Frobenius norm of the change at strength 1; None where it depends on the base model (DoRA, OFT) or cannot be
            told.
        broken: keys with numbers that are not finite, with their count.
        zero: keys that hold nothing but zeros.
        fault: why the layer cannot be read; empty for a sound one.
    """

    name: str
    block: str
    norm: float | None
    broken: Mapping[str, int]
    zero: tuple[str, ...]
    fault: str = ""

    @property
    def changes_nothing(self) -> bool:
        return self.norm == 0


def measure(file: AdapterFile) -> Iterator[LayerFacts]:
    """The facts of every layer, in the order of the file."""
    for layer in file.layers.values():
        yield _facts(layer)


def change_norm(change: LayerChange) -> float:
    """Frobenius norm of a change that needs no base weight.

    Of a plain LoRA without forming the product: |B A|^2 is the sum over the elementwise product of B'B and AA', both [R, R].
    """
    if isinstance(change, LoRATensors):
        down, up = change.lora_A.double().flatten(1), change.lora_B.double().flatten(1)
        squared = float(((up.T @ up) * (down @ down.T)).sum())
        return abs(change.scale) * math.sqrt(max(0.0, squared))
    return float(change.delta().norm())


def block_norms(facts: list[LayerFacts]) -> dict[str, tuple[float, int]]:
    """Block -> (norm of all its changes together, number of layers), in the order of the file."""
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for one in facts:
        if one.norm is not None:
            squares[one.block] = squares.get(one.block, 0.0) + one.norm**2
            counts[one.block] = counts.get(one.block, 0) + 1
    return {block: (math.sqrt(square), counts[block]) for block, square in squares.items()}


def _facts(layer: AdapterLayer) -> LayerFacts:
    import torch

    parts = read_parts(layer, finite=False)
    broken = {}
    zero = []
    for part, tensor in parts.items():
        values = tensor.float() if tensor.element_size() == 1 else tensor
        if values.is_floating_point() and (bad := int((~torch.isfinite(values)).sum())):
            broken[layer.parts[part]] = bad
        elif values.numel() and not values.any():
            zero.append(layer.parts[part])
    if layer.alpha is not None and not math.isfinite(layer.alpha):
        broken[layer.parts.get("alpha", "alpha")] = 1
    norm, fault = (None, layer.fault) if broken or layer.fault else _norm(layer, parts)
    return LayerFacts(layer.name, block_of(layer.name), norm, broken, tuple(zero), fault)


def _norm(layer: AdapterLayer, parts: dict[str, Tensor]) -> tuple[float | None, str]:
    """(norm, fault)."""
    if layer.kind == "oft" or "dora_scale" in parts:
        return None, ""
    try:
        return change_norm(change_of_parts(layer, parts)), ""
    except ModelError as error:
        return None, str(error)


def block_of(name: str) -> str:
    """The part of a model that a layer lies in, for people."""
    component, _, path = name.partition(".")
    title = _COMPONENTS.get(component, component)
    if component == "unet" and (found := _UNET_BLOCK.match(path)):
        return f"{title} {found[1]}{' ' + found[2] if found[2] and found[1] != 'mid' else ''}"
    if component.startswith("text_encoder"):
        return title
    found = _NUMBERED.search(path)
    return f"{title} {found[1].replace('_', ' ')} {found[2]}" if found else f"{title}, other layers"
