"""A frozen layer with something trainable beside it: what all kinds of adapter have in common."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scripts.models.frozen_linear import PLAIN_LINEAR, product

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from lora_scripts.adapters.weights import LayerChange

__all__ = ["AdapterLayer", "applied", "at_strength", "copied", "switched_off", "weight_shape"]


def weight_shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """[out, in] or [out, in, k, k], also of a linear layer that keeps its weight quantised and packed."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.shape)


class AdapterLayer(nn.Module):
    """A frozen layer with a trainable change; takes the place of the layer in its parent.

    A kind of adapter is a subclass: what it trains it registers as a float32 parameter, what it must remember for an exact
    resume as a persistent buffer, and what can be computed again as another buffer.

    Attributes:
        base: the layer as it was, frozen.
        rank: R; of an OFT the size of its blocks.
        alpha: numerator of the scale alpha / R.
        dropout: share of the change's inputs that is zeroed in training.
        strength: 1 in training; another value for previews, 0 switches the change off.
    """

    base: nn.Linear | nn.Conv2d

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout, self.strength = rank, alpha, dropout, 1.0
        # A subclass (a quantised layer, say) may multiply in its own way: then it is called as it is.
        self._plain = type(base) in (*PLAIN_LINEAR, nn.Conv2d)

    def _trained(self, *shape: int) -> nn.Parameter:
        """A float32 parameter of zeros on the base's device."""
        return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=self.base.weight.device))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:
        """The frozen weight: model code asks a layer for its dtype and device this way."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the change at its strength."""
        raise NotImplementedError

    def reset(self, generator: torch.Generator, init: Any = "gaussian") -> None:
        """Draws the initial values, with which the layer does what its base does.

        Args:
            generator: on the CPU.
            init: of low-rank kinds, see `LoRALayer.reset`; the others begin in one way.
        """
        raise NotImplementedError

    def start_from(self, change: Any) -> None:
        """Takes over a finished change that `fitted` returned."""
        raise NotImplementedError

    def fitted(self, change: LayerChange) -> tuple[LayerChange, float]:
        """The change in a form that `start_from` takes, and the share of its squared norm that was kept.

        Raises:
            ModelError: this kind cannot go on from it; the text says why, without the layer's name.
        """
        raise NotImplementedError

    def tensors(self) -> LayerChange:
        """A copy of the change, float32 on the CPU."""
        raise NotImplementedError

    @property
    def _dropping(self) -> bool:
        return self.training and self.dropout > 0.0

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self._dropping)

    @property
    def _hooked(self) -> bool:
        return bool(self.base._forward_hooks or self.base._forward_pre_hooks)

    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by name, of low-rank kinds `lora_A` first."""
        return dict(self._parameters)  # type: ignore[arg-type]

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold: the trainable tensors, and what else the start was made of."""
        kept = {n: b for n, b in self._buffers.items() if b is not None and n not in self._non_persistent_buffers_set}
        return {**{name: parameter.detach() for name, parameter in self.trained().items()}, **kept}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterLayer:
        # model.half() or .to(torch.bfloat16) must not round the trained weights; they follow the device alone.
        self.base._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter in self.trained().values():
            parameter.data = parameter.data.to(fn(parameter.data).device)
            if parameter.grad is not None:
                parameter.grad.data = parameter.grad.data.to(parameter.device)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


@contextmanager
def at_strength(layers: Iterable[AdapterLayer], strength: float) -> Iterator[None]:
    """Within the block the layers' changes count `strength` times, as in `<lora:NAME:0.7>`, and dropout is off."""
    before = [(layer, layer.strength, layer.training) for layer in layers]
    for layer, _, _ in before:
        layer.strength, layer.training = strength, False
    try:
        yield
    finally:
        for layer, old_strength, old_training in before:
            layer.strength, layer.training = old_strength, old_training


def switched_off(models: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """A block within which the models are, to the bit, as they were before an adapter was put into them."""
    found = (layer for model in models for layer in model.modules() if isinstance(layer, AdapterLayer))
    return at_strength(found, 0.0)


def applied(layer: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x through a layer of this form with another weight, [out, in] or [out, in, k, k]."""
    return layer._conv_forward(x, weight, bias) if isinstance(layer, nn.Conv2d) else product(x, weight, bias)


def copied(tensor: Tensor) -> Tensor:
    """A copy in float32 on the CPU."""
    return tensor.detach().to("cpu", torch.float32, copy=True)
