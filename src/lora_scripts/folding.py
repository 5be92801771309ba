"""LoRAs folded into the frozen weights of a loaded model, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_scripts.adapter_files.for_model import open_for_model
from lora_scripts.adapters.layer import weight_shape
from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.base_loras import named
from lora_scripts.errors import ModelError
from lora_scripts.export.names import layer_shapes
from lora_scripts.sampling.lora_set import put_beside

if TYPE_CHECKING:
    from torch import Tensor

    from lora_scripts.adapter_files.adapter_file import AdapterFile
    from lora_scripts.adapters.weights import LayerChange
    from lora_scripts.base_loras import LoRABeneath

__all__ = ["fold_base_loras"]


def fold_base_loras(components: Mapping[str, nn.Module], loras: Sequence[LoRABeneath]) -> list[str]:
    """Adds the LoRAs' weighted changes to the model's weights, before any adapter is attached; lines for people.

    Each change is taken with respect to the weight as it was, so that the order does not matter and the result is what several
    LoRAs do side by side. A layer's changes are summed in float32 and rounded once to the weight's number format; one layer
    at a time is in memory. A quantised layer keeps its weight and gets the changes beside it.

    Raises:
        ModelError: a LoRA is damaged, for another model or of a kind that cannot be used here; the message names the entry.
    """
    if not loras:
        return []
    shapes = layer_shapes(components)
    opened = [(lora, _open(lora, shapes)) for lora in loras]
    shared = _shared_weights(components)
    num_packed = 0
    for layer in dict.fromkeys(layer for _, file in opened for layer in file.layers):
        module = _module(components, layer)
        changes = [(lora, _read(lora, file, layer)) for lora, file in opened if layer in file.layers]
        if module.weight.is_floating_point() and tuple(module.weight.shape) == weight_shape(module):
            _fold_one(layer, module, changes, shared)
        else:
            _put_beside(layer, module, changes)
            num_packed += 1
    counts = ", ".join(f"{lora} ({len(file.layers)} layers)" for lora, file in opened)
    beside = f"; beside {num_packed} quantised layers" if num_packed else ""
    return [f"Base LoRAs folded into the frozen weights: {counts}{beside}."]


def _open(lora: LoRABeneath, shapes: Mapping[str, tuple[int, ...]]) -> AdapterFile:
    try:
        return open_for_model(lora.path, shapes)
    except ModelError as error:
        raise ModelError(f"base_loras: entry {lora.entry}: {error}") from None


def _read(lora: LoRABeneath, file: AdapterFile, layer: str) -> LayerChange:
    try:
        return file.layer(layer)
    except ModelError as error:
        raise ModelError(f"base_loras: entry {lora.entry}: {error}") from None


def _module(components: Mapping[str, nn.Module], layer: str) -> nn.Linear | nn.Conv2d:
    component, _, path = layer.partition(".")
    module: nn.Linear | nn.Conv2d = components[component].get_submodule(path)  # type: ignore[assignment]
    return module


def _shared_weights(components: Mapping[str, nn.Module]) -> set[int]:
    """Weights that several modules use: a head tied to the embeddings, which a LoRA of the head must not change."""
    seen: dict[int, int] = {}
    for root in components.values():
        for module in root.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {number for number, count in seen.items() if count > 1}


def _fold_one(
    layer: str,
    module: nn.Linear | nn.Conv2d,
    changes: Sequence[tuple[LoRABeneath, LayerChange]],
    shared: set[int],
) -> None:
    with torch.no_grad():
        weight = module.weight.detach().float()
        total = weight.clone()
        for lora, change in changes:
            total.add_(_delta(layer, lora, change, weight), alpha=lora.weight)
        rounded = total.to(module.weight.dtype)
        if not bool(rounded.isfinite().all()):
            raise ModelError(
                f"base_loras: {layer} with {named([lora for lora, _ in changes])} holds numbers that "
                f"{str(rounded.dtype).removeprefix('torch.')} cannot hold. Lower the weights, or set mixed_precision: fp32."
            )
        if id(module.weight) in shared:
            module.weight = nn.Parameter(rounded, requires_grad=False)
        else:
            module.weight.copy_(rounded)


def _delta(layer: str, lora: LoRABeneath, change: LayerChange, weight: Tensor) -> Tensor:
    delta = change.delta(weight).to(weight.device)
    if delta.shape != weight.shape or not bool(delta.isfinite().all()):
        what = "is not finite" if delta.shape == weight.shape else f"has the shape {list(delta.shape)}"
        raise ModelError(
            f"base_loras: entry {lora.entry}: {lora.path}: its change of {layer} {what}. The file is damaged or for another model."
        )
    return delta


def _put_beside(layer: str, module: nn.Module, changes: Sequence[tuple[LoRABeneath, LayerChange]]) -> None:
    """Low-rank changes at work beside a layer whose weight cannot be added to."""
    parts = []
    for lora, change in changes:
        if not isinstance(change, LoRATensors) or change.magnitude is not None:
            raise ModelError(
                f"base_loras: entry {lora.entry}: {lora.path}: {layer} is quantised, so only a plain LoRA can be put beside it, "
                "and this is another kind. Set quantization: none, or turn the file into a plain LoRA first: lora-scripts bake."
            )
        parts.append((change, lora.weight))
    put_beside(module, parts)
