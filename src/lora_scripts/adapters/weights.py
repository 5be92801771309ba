"""The change that an adapter makes to one layer, apart from any model or file: what all kinds share, and plain LoRA.

The other kinds: `loha_weights`, `lokr_weights`, `oft_weights`; `parts` reads any of them.
Legend for shapes: R rank, in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias

import torch

from lora_scripts.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FullTensors",
    "LayerChange",
    "LayerChanges",
    "LoRATensors",
    "LoRAWeights",
    "kind_name",
    "lengths_part",
    "require_plain",
    "with_lengths",
]


class LayerChange(Protocol):
    """What an adapter of any kind does to the weight of one layer.

    Attributes:
        kind: "lora" (a DoRA too), "loha", "lokr", "oft" or "full".
        alpha: numerator of the scale; of an OFT its constraint, 0 for none.
    """

    kind: ClassVar[str]

    @property
    def alpha(self) -> float: ...

    @property
    def rank(self) -> int:
        """R; of an OFT the size of its blocks, of a full change the largest that its shape allows."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes: [out, in] or [out, in, k, k]."""
        ...

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """What is added to the layer's weight at strength 1, in its shape, float32.

        Args:
            weight: the frozen weight, float32; an OFT and what has row lengths (DoRA) need it. The result is on its device.
        """
        ...

    def parts(self) -> dict[str, Tensor]:
        """The tensors by their names in a kohya or LyCORIS file: "lora_down.weight", "hada_w1_a", "alpha" ..."""
        ...


@dataclass(frozen=True)
class LoRATensors:
    """The low-rank change of one layer: W + alpha / R * lora_B @ lora_A.

    rsLoRA and PiSSA are written in this form too: alpha says the scale that acts, whatever formula it came from.

    Attributes:
        lora_A: [R, in] for a linear layer, [R, in, k, k] for a convolution.
        lora_B: [out, R] for a linear layer, [out, R, 1, 1] for a convolution.
        alpha: the scale's numerator.
        magnitude: DoRA's row lengths, [out]: the rows of the sum above are brought to them. [1, in(, 1, 1)] where a file
            has them by input channel, as LyCORIS wrote for a while. None for a plain LoRA.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; Liu et al. 2024, arXiv 2402.09353, equation 5.
    """

    kind: ClassVar[str] = "lora"
    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """[out, in] or [out, in, k, k], float32: what is added to the layer's weight at strength 1.

        Args:
            weight: the frozen weight, float32; only a DoRA needs it. The result is on its device.
        """
        device = self.lora_A.device if weight is None else weight.device
        down, up = self.lora_A.float().to(device), self.lora_B.float().to(device)
        product: Tensor = self.scale * (up.flatten(1) @ down.flatten(1))
        change = product.reshape(up.shape[0], *down.shape[1:])
        return with_lengths(change, weight, self.magnitude)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.lora_B.shape[0], *self.lora_A.shape[1:]

    def parts(self) -> dict[str, Tensor]:
        parts = {"lora_down.weight": self.lora_A, "lora_up.weight": self.lora_B, "alpha": torch.tensor(self.alpha)}
        return parts | lengths_part(self.magnitude, len(self.shape))


@dataclass(frozen=True)
class FullTensors:
    """A change that is stored whole.

    Attributes:
        diff: [out, in] or [out, in, k, k].
    """

    kind: ClassVar[str] = "full"
    diff: Tensor

    @property
    def alpha(self) -> float:
        return float(self.rank)

    @property
    def rank(self) -> int:
        return min(self.diff.shape[0], math.prod(self.diff.shape[1:]))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.diff.shape)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.diff.float() if weight is None else self.diff.float().to(weight.device)

    def parts(self) -> dict[str, Tensor]:
        return {"diff": self.diff}


def with_lengths(change: Tensor, weight: Tensor | None, magnitude: Tensor | None) -> Tensor:
    """The change once the rows of weight + change were brought to given lengths; without any, the change itself.

    Args:
        magnitude: [out], or [1, in(, 1, 1)]: lengths of what belongs to one input channel.
    Source: Liu et al. 2024, arXiv 2402.09353, equation 5.
    """
    if magnitude is None:
        return change
    assert weight is not None, "the change of a DoRA depends on the weight it is for"
    magnitude, summed = magnitude.float().to(weight.device), weight + change
    if magnitude.ndim == 1:
        lengths, magnitude = summed.flatten(1).norm(dim=1), magnitude.reshape(-1, *[1] * (weight.ndim - 1))
        gain = magnitude / lengths.clamp_min(1e-15).reshape(magnitude.shape)
    else:
        lengths = summed.transpose(0, 1).flatten(1).norm(dim=1)
        gain = magnitude / lengths.clamp_min(1e-15).reshape(magnitude.shape)
    # (gain - 1) W first: where the lengths hardly changed, the difference of the two large sums would lose digits.
    moved: Tensor = (gain - 1) * weight + gain * change
    return moved


def lengths_part(magnitude: Tensor | None, ndim: int) -> dict[str, Tensor]:
    """`dora_scale` as files have it, [out, 1(, 1, 1)] for lengths of rows; nothing without lengths."""
    if magnitude is None:
        return {}
    return {"dora_scale": magnitude.reshape(-1, *[1] * (ndim - 1)) if magnitude.ndim == 1 else magnitude}


LoRAWeights: TypeAlias = Mapping[str, LoRATensors]
"""Layer name with its component in front, `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`, to tensors."""
LayerChanges: TypeAlias = Mapping[str, LayerChange]
"""The same, of any kind."""


def kind_name(change: LayerChange) -> str:
    """What people call it: "LoRA", "DoRA", "LoHa" ..."""
    if isinstance(change, LoRATensors):
        return "LoRA" if change.magnitude is None else "DoRA"
    return _NAMES.get(change.kind, change.kind)


def require_plain(weights: LayerChanges) -> LoRAWeights:
    """The same weights, once sure that each is a plain LoRA: a file of those has no place for anything else.

    Raises:
        ExportError: a layer is a DoRA or of another kind.
    """
    plain = {layer: change for layer, change in weights.items() if isinstance(change, LoRATensors)}
    for layer, change in weights.items():
        if layer not in plain or plain[layer].magnitude is not None:
            raise ExportError(
                f"Export failed: {layer} is a {kind_name(change)}, which this kind of file has no place for. Bake it first: "
                "lora_scripts.export.bake turns it into a plain LoRA."
            )
    return plain


_NAMES = {"loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "full": "whole difference"}
