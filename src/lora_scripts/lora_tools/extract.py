"""A LoRA taken from two checkpoints: for each layer the nearest low-rank change from the base to the tuned weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Literal

from lora_scripts.errors import ModelError
from lora_scripts.lora_tools.finished import rounded
from lora_scripts.lora_tools.ranks import LayerCut, Losses, RankChoice

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_scripts.adapters.weights import LoRATensors
    from lora_scripts.models.layer_files import LayerFiles

__all__ = ["Extracted", "Which", "chosen_layers", "extract_lora", "require_same_architecture"]

Which = Literal["attention", "linear", "all"]

_ATTENTION = re.compile(r"\.(attn[12]\.to_(q|k|v|out\.0)|self_attn\.(q_proj|k_proj|v_proj|out_proj))$")
_LINEAR = re.compile(r"\.(attentions|encoder\.layers)\.")
_REST = re.compile(r"\.(resnets|downsamplers|upsamplers)\.")


@dataclass
class Extracted:
    """What came of it.

    Attributes:
        weights: of the layers that differ.
        unchanged: how many of the layers asked for are equal in both checkpoints.
        covered: squared Frobenius norm of the difference in the layers asked for.
        outside: the same of all other layers of U-Net and text encoders, which the LoRA has nothing of.
    """

    weights: dict[str, LoRATensors] = field(default_factory=dict)
    losses: Losses = field(default_factory=Losses)
    unchanged: int = 0
    covered: float = 0.0
    outside: float = 0.0


def require_same_architecture(tuned: LayerFiles, base: LayerFiles) -> None:
    """Does nothing where both have the same layers in the same shapes.

    Raises:
        ModelError: says what is different.
    """
    names = f"{tuned.source.name} and {base.source.name}"
    if tuned.source.family != base.source.family:
        from lora_scripts.models.sd_layout import LAYOUTS

        titles = [LAYOUTS[files.source.family].title for files in (tuned, base)]
        raise ModelError(f"{names}: the first is {titles[0]}, the second {titles[1]}. A LoRA needs two of one kind.")
    for layer in sorted({*tuned.shapes, *base.shapes}):
        shapes = tuned.shapes.get(layer), base.shapes.get(layer)
        if shapes[0] != shapes[1]:
            said = " and ".join("missing" if shape is None else str(list(shape)) for shape in shapes)
            raise ModelError(f"{names}: are built differently: {layer} is {said}. A LoRA needs two of one kind.")


def chosen_layers(known: Iterable[str], which: Which, *, text_encoders: bool) -> list[str]:
    """The layers that a LoRA is made for.

    Args:
        known: all layers that a kohya file has a place for.
        which: "attention" the four projections of every attention; "linear" all layers of the transformer blocks and of the
            text encoders; "all" those and the convolutions and time projections of the U-Net's residual blocks.
    """
    patterns = {"attention": (_ATTENTION,), "linear": (_LINEAR,), "all": (_LINEAR, _REST)}[which]
    return [
        layer
        for layer in known
        if (text_encoders or layer.startswith("unet.")) and any(pattern.search(layer) for pattern in patterns)
    ]


def extract_lora(
    tuned: LayerFiles, base: LayerFiles, layers: Iterable[str], linear: RankChoice, conv: RankChoice, dtype: torch.dtype
) -> Extracted:
    """The LoRA that comes nearest to tuned - base, layer by layer; a layer that is equal in both is left out.

    Where the tuned checkpoint is stored in a narrower number format, the base is rounded to it first: a layer that was not
    trained then differs by nothing rather than by rounding.

    Args:
        linear, conv: for layers with 1x1 kernels or none, and for those with larger ones.
        dtype: of the matrices that come out.
    Raises:
        ModelError: a checkpoint is damaged or quantised.
    """
    import torch

    from lora_scripts.adapters.spectrum import spectrum_of_matrix

    wanted = set(layers)
    found = Extracted()
    generator = torch.Generator().manual_seed(0)
    alpha = float(_highest(base.shapes, wanted, linear, conv))
    for layer, shape in base.shapes.items():
        change = _difference(tuned, base, layer)
        size = float(change.double().square().sum())
        if layer not in wanted:
            found.outside += size
        elif not size:
            found.unchanged += 1
        else:
            choice = conv if prod(shape[2:]) > 1 else linear
            spectrum = spectrum_of_matrix(change, choice.highest, generator)
            rank = choice.of(spectrum)
            found.weights[layer] = rounded(spectrum.cut(rank, alpha / rank), dtype)
            found.losses.cuts.append(LayerCut(layer, min(change.flatten(1).shape), rank, size, spectrum.lost(rank)))
            found.covered += size
    return found


def _highest(shapes: Mapping[str, tuple[int, ...]], layers: Iterable[str], linear: RankChoice, conv: RankChoice) -> int:
    """The highest rank that can come out: one alpha for all layers, as diffusers misreads other files."""
    choices = {layer: conv if prod(shapes[layer][2:]) > 1 else linear for layer in layers}
    return max(min(choice.highest, shapes[layer][0], prod(shapes[layer][1:])) for layer, choice in choices.items())


def _difference(tuned: LayerFiles, base: LayerFiles, layer: str) -> Tensor:
    new, old = tuned.weight(layer), base.weight(layer)
    stored = tuned.dtype(layer)
    if stored.itemsize < base.dtype(layer).itemsize:
        old = old.to(stored).float()
    return new.sub_(old)
