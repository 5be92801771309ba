"""The tensors of one layer, read from its file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_scripts.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_scripts.adapter_files.adapter_file import AdapterLayer
    from lora_scripts.adapters.weights import LayerChange

__all__ = ["read_change"]

_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}


def read_change(layer: AdapterLayer) -> LayerChange:
    """The change of one layer; see AdapterFile.layer."""
    import torch

    from lora_scripts.adapters.parts import change_from_parts
    from lora_scripts.models.weights_file import read_tensors

    path, shape = layer.header.path, layer.model_shape
    if layer.fault:
        raise ModelError(layer.fault)
    if layer.shape is not None and shape is not None and not _fits(layer.shape, shape):
        raise ModelError(_other_shape(layer, shape))
    names = {key: part for part, key in layer.parts.items() if part != "alpha"}
    parts: dict[str, Tensor] = {names[key]: tensor for key, tensor in read_tensors(layer.header, names)}
    if layer.alpha is not None:
        parts["alpha"] = torch.tensor(layer.alpha, dtype=torch.float64)
    try:
        return change_from_parts(parts, shape)
    except ModelError as error:
        raise ModelError(
            f"{path}: {layer.file_name}: {error}. The file is damaged or of an unknown kind; fetch or export it again."
        ) from None


def _fits(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """A 1x1 convolution and a linear layer are the same thing, and so are a flat kernel and a square one."""
    if len(given) == len(wanted):
        return given == wanted
    return given[0] == wanted[0] and math.prod(given[1:]) == math.prod(wanted[1:])


def _other_shape(layer: AdapterLayer, shape: tuple[int, ...]) -> str:
    assert layer.shape is not None
    given, name = layer.shape, layer.file_name
    hint = "It was made for another base model."
    if "attn2" in name and name.endswith(("to_k", "to_v")):
        hint = f"It was made for {_WIDTHS.get(given[1], 'another base model')}; this base is another."
    return (
        f"{layer.header.path}: {name} changes a layer of shape {list(given[: len(shape)])}, but this model's layer is "
        f"{list(shape)}. {hint}"
    )
