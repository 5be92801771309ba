"""Frozen layers whose products are made in 8 bits while a training pass runs, and plainly at any other time.

The weight itself stays where it is: previews, measurements and the proof of the finished file are of the model as it is
published, and adapters that are made from the weight (DoRA, PiSSA) read it as ever. The copies in 8 bits lie beside it.

Legend for shapes: N batch, in/out features or channels, h w height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_scripts.models.frozen_linear import PLAIN_LINEAR, FrozenLinear
from lora_scripts.models.low_bit import MULTIPLE, LowBit, LowBitWeight, low_bit_bytes, low_bit_linear, low_bit_weight

__all__ = ["LowBitLayers", "is_pointwise", "low_bit_copies", "low_bit_of"]

LEAST_WEIGHTS = 2**19
"""Of a layer: below, rounding its input takes as long as a product in 8 bits saves (docs/benchmarks.md)."""


class _LowBitLayer(nn.Module):
    """What both kinds of layer have in common.

    Attributes:
        low_bit: the weight once more, in 8 bits.
        in_low_bit: whether products are made with it.
    """

    low_bit: LowBitWeight
    in_low_bit: bool

    def _take_over(self: Any, layer: nn.Linear | nn.Conv2d, kind: LowBit) -> None:
        self.register_parameter("weight", layer.weight)
        self.register_parameter("bias", layer.bias)
        self.low_bit, self.in_low_bit = low_bit_weight(layer.weight.flatten(1), kind), False
        self.train(layer.training)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        # model.to(torch.bfloat16) must not round the scales; they follow the device alone.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.low_bit = self.low_bit.to(self.weight.device)
        return self


class LowBitLinear(_LowBitLayer, FrozenLinear):
    """x W^T + b; x [..., in]."""

    def __init__(self, layer: nn.Linear, kind: LowBit) -> None:
        with torch.device("meta"):
            nn.Linear.__init__(self, layer.in_features, layer.out_features, layer.bias is not None)
        self._take_over(layer, kind)

    def forward(self, x: Tensor) -> Tensor:
        return low_bit_linear(x, self.low_bit, self.bias) if self.in_low_bit else super().forward(x)


class LowBitPointwise(_LowBitLayer, nn.Conv2d):
    """A 1x1 convolution, which is the same linear layer for every pixel; x [N, in, h, w]."""

    def __init__(self, layer: nn.Conv2d, kind: LowBit) -> None:
        with torch.device("meta"):
            nn.Conv2d.__init__(self, layer.in_channels, layer.out_channels, 1, bias=layer.bias is not None)
        self._take_over(layer, kind)

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_low_bit:
            return super().forward(x)
        return low_bit_linear(x.permute(0, 2, 3, 1), self.low_bit, self.bias).permute(0, 3, 1, 2)


def low_bit_of(layer: nn.Module) -> LowBitWeight | None:
    """The weight in 8 bits where products are to be made with it now."""
    return layer.low_bit if isinstance(layer, _LowBitLayer) and layer.in_low_bit else None


class LowBitLayers:
    """The layers that can compute in 8 bits, in the places of those they were made from; names and weights stay."""

    def __init__(self, parts: Sequence[nn.Module], kind: LowBit) -> None:
        """`parts`: as `ModelFamily.wide_parts`; adapters are attached already."""
        self._layers: list[_LowBitLayer] = []
        for parent, name, layer in _places(parts):
            new = LowBitLinear(layer, kind) if isinstance(layer, nn.Linear) else LowBitPointwise(layer, kind)
            setattr(parent, name, new)
            self._layers.append(new)

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within the block products are made in 8 bits; a backward pass that computes activations again belongs into it."""
        for layer in self._layers:
            layer.in_low_bit = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer.in_low_bit = False


def low_bit_copies(parts: Sequence[nn.Module], kind: LowBit) -> int:
    """Bytes that the weights in 8 bits take beside the model, from shapes alone."""
    return sum(low_bit_bytes(layer.weight.numel(), kind) for _, _, layer in _places(parts))


def _places(parts: Sequence[nn.Module]) -> list[tuple[nn.Module, str, nn.Linear | nn.Conv2d]]:
    """Every layer that can and should compute in 8 bits, with its parent and its name there."""
    found: dict[int, tuple[nn.Module, str, nn.Linear | nn.Conv2d]] = {}
    for part in parts:
        for parent in part.modules():
            for name, layer in parent.named_children():
                # A subclass (a quantised layer, say) multiplies in its own way.
                if (isinstance(layer, nn.Linear) and type(layer) in PLAIN_LINEAR) or (
                    type(layer) is nn.Conv2d and is_pointwise(layer)
                ):
                    found[id(layer)] = parent, name, layer
    return [place for place in found.values() if _pays(place[2]) and not place[2].weight.requires_grad]


def is_pointwise(layer: nn.Conv2d) -> bool:
    """Whether the convolution is a linear layer for every pixel by itself."""
    form = layer.kernel_size, layer.stride, layer.padding, layer.groups
    return form == ((1, 1), (1, 1), (0, 0), 1)


def _pays(layer: nn.Linear | nn.Conv2d) -> bool:
    out, inside = layer.weight.shape[:2]
    return out % MULTIPLE == 0 and inside % MULTIPLE == 0 and out * inside >= LEAST_WEIGHTS
