"""The tensors of a LoRA, apart from any model or file format.

Legend for shapes: R rank, in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LoRATensors", "LoRAWeights"]


@dataclass(frozen=True)
class LoRATensors:
    """The low-rank change of one layer: W + alpha / R * lora_B @ lora_A.

    Attributes:
        lora_A: [R, in] for a linear layer, [R, in, k, k] for a convolution.
        lora_B: [out, R] for a linear layer, [out, R, 1, 1] for a convolution.
        alpha: the scale's numerator.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """[out, in] or [out, in, k, k], float32: what is added to the layer's weight at strength 1."""
        down, up = self.lora_A.float(), self.lora_B.float()
        product = up.flatten(1) @ down.flatten(1)
        return (self.scale * product).reshape(up.shape[0], *down.shape[1:])


LoRAWeights: TypeAlias = Mapping[str, LoRATensors]
"""Layer name with its component in front, `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`, to tensors."""
