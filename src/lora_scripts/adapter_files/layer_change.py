"""The tensors of one layer, read from its file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_scripts.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_scripts.adapter_files.adapter_file import AdapterLayer
    from lora_scripts.adapters.weights import LayerChange

__all__ = ["change_of_parts", "read_change", "read_parts"]

_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}


def read_change(layer: AdapterLayer) -> LayerChange:
    """The change of one layer; see AdapterFile.layer."""
    shape = layer.model_shape
    if layer.fault:
        raise ModelError(layer.fault)
    if layer.shape is not None and shape is not None and not _fits(layer.shape, shape):
        raise ModelError(_other_shape(layer, shape))
    return change_of_parts(layer, read_parts(layer))


def read_parts(layer: AdapterLayer, *, finite: bool = True) -> dict[str, Tensor]:
    """The layer's tensors by kohya's or LyCORIS's names, in the file's dtype; alpha is left out.

    Args:
        finite: False to look at a layer that may be broken.
    Raises:
        ModelError: numbers that are not finite; the file became shorter.
    """
    from lora_scripts.models.weights_file import read_tensors

    names = {key: part for part, key in layer.parts.items() if part != "alpha"}
    return {
        # PEFT has a convolution's lengths as [1, out, 1, 1], which elsewhere would mean lengths by input channel.
        names[key]: tensor.flatten() if "lora_magnitude_vector" in key else tensor
        for key, tensor in read_tensors(layer.header, names, finite=finite)
    }


def change_of_parts(layer: AdapterLayer, parts: dict[str, Tensor]) -> LayerChange:
    """The change that a layer's tensors make, with the alpha that acts.

    Raises:
        ModelError: a kind that is not read, or tensors that do not fit each other or the model.
    """
    import torch

    from lora_scripts.adapters.parts import change_from_parts

    if layer.alpha is not None:
        parts = {**parts, "alpha": torch.tensor(layer.alpha, dtype=torch.float64)}
    try:
        return change_from_parts(parts, layer.model_shape)
    except ModelError as error:
        raise ModelError(
            f"{layer.header.path}: {layer.file_name}: {error}. The file is damaged or of an unknown kind; fetch or export it "
            "again."
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
