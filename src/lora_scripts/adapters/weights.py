"""The tensors of a LoRA, apart from any model or file format.

Legend for shapes: R rank, in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from lora_scripts.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LoRATensors", "LoRAWeights", "require_plain"]


@dataclass(frozen=True)
class LoRATensors:
    """The low-rank change of one layer: W + alpha / R * lora_B @ lora_A.

    rsLoRA and PiSSA are written in this form too: alpha says the scale that acts, whatever formula it came from.

    Attributes:
        lora_A: [R, in] for a linear layer, [R, in, k, k] for a convolution.
        lora_B: [out, R] for a linear layer, [out, R, 1, 1] for a convolution.
        alpha: the scale's numerator.
        magnitude: DoRA's row lengths, [out]: the rows of the sum above are brought to them. None for a plain LoRA.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; Liu et al. 2024, arXiv 2402.09353, equation 5.
    """

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
        if self.magnitude is None:
            return change
        assert weight is not None, "the change of a DoRA depends on the weight it is for"
        lengths = (weight + change).flatten(1).norm(dim=1).clamp_min(1e-15)
        gain = (self.magnitude.to(device) / lengths).reshape(-1, *[1] * (weight.ndim - 1))
        dora: Tensor = (gain - 1) * weight + gain * change
        return dora


LoRAWeights: TypeAlias = Mapping[str, LoRATensors]
"""Layer name with its component in front, `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`, to tensors."""


def require_plain(weights: LoRAWeights) -> None:
    """Stops a writer of plain LoRA files from leaving out what it has no place for.

    Raises:
        ExportError: a layer is a DoRA.
    """
    for layer, tensors in weights.items():
        if tensors.magnitude is not None:
            raise ExportError(
                f"Export failed: {layer} is a DoRA, which this kind of file has no place for. Bake it first: "
                "lora_scripts.export.bake turns it into a plain LoRA."
            )
