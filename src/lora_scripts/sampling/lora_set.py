"""LoRAs at work on a loaded model: any number at once, each with its weights, and gone again without a trace.

The layers' own weights are never touched. A layer's low-rank changes run beside it, all LoRAs of one layer joined into one
pair of matrices, so that taking them away gives back the model bit by bit and costs the memory of the LoRAs alone. Changes of
other kinds are summed into one whole weight beside the layer's.

Legend for shapes: R sum of the ranks on one layer, in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lora_scripts.adapters.weights import LayerChange, LayerChanges, LoRATensors
from lora_scripts.errors import ModelError
from lora_scripts.export.names import split_layer, wrapped_layer

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

__all__ = ["LoRASet", "WeightedLoRA", "put_beside"]


@dataclass(frozen=True)
class WeightedLoRA:
    """A LoRA and how strongly it is to work."""

    weights: LayerChanges
    unet_weight: float = 1.0
    text_encoder_weight: float = 1.0

    def weight_of(self, component: str) -> float:
        return self.text_encoder_weight if component.startswith("text_encoder") else self.unet_weight


class LoRASet:
    """The LoRAs at work on a model; `with LoRASet(components, loras): ...` takes them away at the end."""

    def __init__(self, components: Mapping[str, nn.Module], loras: Sequence[WeightedLoRA] = ()) -> None:
        self._modules = {
            f"{component}.{path}": module
            for component, root in components.items()
            for path, module in root.named_modules()
        }
        self._handles: list[RemovableHandle] = []
        self.apply(loras)

    def apply(self, loras: Sequence[WeightedLoRA]) -> None:
        """Puts these LoRAs to work in place of those before; weight 0 costs nothing.

        Raises:
            ModelError: a LoRA changes a layer that the model lacks; the model is then without any LoRA.
        """
        self.remove()
        by_layer: dict[str, list[tuple[LayerChange, float]]] = {}
        for lora in loras:
            for layer, tensors in lora.weights.items():
                weight = lora.weight_of(split_layer(layer)[0])
                if weight != 0.0:
                    by_layer.setdefault(layer, []).append((tensors, weight))
        missing = [layer for layer in by_layer if layer not in self._modules]
        if missing:
            raise ModelError(
                f"{len(missing)} layers of the LoRA are not in this model, {missing[0]} among them. "
                "It was made for another base model."
            )
        for layer, parts in by_layer.items():
            module = self._modules[layer]
            low_rank = [(t, w) for t, w in parts if isinstance(t, LoRATensors) and t.magnitude is None]
            if low_rank:
                self._handles.append(put_beside(module, low_rank))
            whole = [(change, weight) for change, weight in parts if not any(change is t for t, _ in low_rank)]
            if whole:
                self._handles.append(module.register_forward_hook(_whole_path(module, whole)))

    def remove(self) -> None:
        """The model as it was before, bit by bit."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def put_beside(module: nn.Module, parts: Sequence[tuple[LoRATensors, float]]) -> RemovableHandle:
    """Low-rank changes with their weights at work beside a layer, which may be quantised, until the handle is removed."""
    return module.register_forward_hook(_side_path(module, *_joined(module, parts)))


def _joined(module: nn.Module, parts: Sequence[tuple[LoRATensors, float]]) -> tuple[Tensor, Tensor]:
    """One pair of matrices whose product is the weighted sum of all changes, scales included."""
    import torch

    parameter = wrapped_layer(module).weight
    down = torch.cat([tensors.lora_A.float() for tensors, _ in parts])
    up = torch.cat([tensors.lora_B.float() * (tensors.scale * weight) for tensors, weight in parts], dim=1)
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32  # a quantised weight is packed in bytes
    return down.to(parameter.device, dtype), up.to(parameter.device, dtype)


def _side_path(module: nn.Module, down: Tensor, up: Tensor) -> Callable[..., Tensor]:
    import torch.nn.functional as F

    inner = wrapped_layer(module)
    place = [down, up]

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if place[0].device != x.device:  # the model has been moved since
            place[:] = [tensor.to(x.device) for tensor in place]
        a, b = place
        x = x.to(a.dtype)
        if a.ndim == 4:
            change = F.conv2d(F.conv2d(x, a, None, inner.stride, inner.padding, inner.dilation, inner.groups), b)
        else:
            change = F.linear(F.linear(x, a), b)
        return output + change.to(output.dtype)

    return add


def _whole_path(module: nn.Module, parts: Sequence[tuple[LayerChange, float]]) -> Callable[..., Tensor]:
    """Adds what the weighted sum of whole changes does to the input."""
    from lora_scripts.adapters.dense import dense_weight
    from lora_scripts.adapters.layer import applied

    inner = wrapped_layer(module)
    weight = dense_weight(inner)
    change = weight.new_zeros(weight.shape)
    for part, strength in parts:
        change.add_(part.delta(weight), alpha=strength)
    place = [change.to(inner.weight.dtype if inner.weight.is_floating_point() else weight.dtype)]

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if place[0].device != x.device:  # the model has been moved since
            place[0] = place[0].to(x.device)
        return output + applied(inner, x.to(place[0].dtype), place[0]).to(output.dtype)

    return add
