"""DoRA: length and direction of every weight row are trained apart.

Legend for shapes: R rank, in/out the layer's features or channels, k kernel size.
Source: Liu et al. 2024, arXiv 2402.09353, equation 5, with the norm held constant in the backward pass (section 4.3), as PEFT
does it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scripts.adapters.dense import dense_weight, row_products
from lora_scripts.adapters.layer import copied
from lora_scripts.adapters.layers import LoRAConv2d, LoRAInit, LoRALayer, LoRALinear
from lora_scripts.adapters.low_rank import linear_low_rank
from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.models.low_bit_layers import low_bit_of

__all__ = ["DoRAConv2d", "DoRALinear"]


class _DoRA(LoRALayer):
    """m * V / |V| x + b with V = W + s B A and |V| the length of each row; W at the start, when m = |W|.

    Attributes:
        magnitude: m, [out], float32.
        base_squares: |W|^2, [out], float32; the frozen weight's, so computed once.
    """

    magnitude: nn.Parameter
    base_squares: Tensor

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base, rank, alpha, dropout)
        squares = dense_weight(base).flatten(1).square().sum(1)
        self.register_buffer("base_squares", squares, persistent=False)
        self.magnitude = nn.Parameter(squares.sqrt())

    @torch.no_grad()
    def reset(self, generator: torch.Generator, init: LoRAInit = "gaussian") -> None:
        super().reset(generator, init)
        self.magnitude.copy_(self.base_squares.sqrt())

    @torch.no_grad()
    def start_from(self, tensors: LoRATensors) -> None:
        """Takes over a DoRA with its lengths, or a plain LoRA, which leaves the lengths as they come out."""
        super().start_from(tensors)
        self.magnitude.copy_(self.row_norms() if tensors.magnitude is None else tensors.magnitude)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """|W + s B A|, [out], without the sum ever being there.

        |W + s B A|^2 = |W|^2 + 2 s <W, B A> + s^2 <B A, B A> needs W A^T and A A^T only: 2 R in out operations and no
        [out, in] matrix, which PEFT makes in every pass.
        """
        A, B = self.lora_A.flatten(1), self.lora_B.flatten(1)
        mixed = (row_products(self.base, self.lora_A) * B).sum(1)
        own = ((B @ (A @ A.T)) * B).sum(1)
        # Rounding may take a row that training has brought to zero below it.
        return (self.base_squares + 2 * self.scale * mixed + self.scale**2 * own).clamp_min(1e-30).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        if self.strength == 0.0:
            return self.base(x)  # type: ignore[no-any-return]
        gain = self._by_channel(self.magnitude / self.row_norms())
        if self._dropping:
            # The frozen output is whole, what training changes of it sees the thinned input.
            dropped = F.dropout(x, self.dropout, True)
            summed = self._summed(dropped)
            out = self.base(x) + (gain.to(summed.dtype) * summed - self._without_bias(dropped))
        else:
            summed = self._summed(x)
            out = gain.to(summed.dtype) * summed
            if self.bias is not None:
                out = out + self._by_channel(self.bias)
        return out if self.strength == 1.0 else torch.lerp(self.base(x), out, self.strength)

    def _summed(self, x: Tensor) -> Tensor:
        """V x."""
        return torch.add(self._without_bias(x), self._product(x, self.lora_A, self.lora_B), alpha=self.scale)

    def _without_bias(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out if self.bias is None else out - self._by_channel(self.bias)

    def _by_channel(self, values: Tensor) -> Tensor:
        """[out] so that it fits the output."""
        return values

    def tensors(self) -> LoRATensors:
        return LoRATensors(copied(self.lora_A), copied(self.lora_B), self.alpha, copied(self.magnitude))


class DoRALinear(_DoRA, LoRALinear):
    """A linear layer; x [..., in], A [R, in], B [out, R], m [out]."""

    def _summed(self, x: Tensor) -> Tensor:
        if self._plain and not (self._hooked or torch.is_autocast_enabled(x.device.type)):
            low_bit = low_bit_of(self.base)
            return linear_low_rank(x, self.base.weight, None, self.lora_A, self.lora_B, self.scale, low_bit=low_bit)
        return super()._summed(x)


class DoRAConv2d(_DoRA, LoRAConv2d):
    """A convolution; x [N, in, h, w], A [R, in, k, k], B [out, R, 1, 1], m [out]: a row is all that makes one channel."""

    def _by_channel(self, values: Tensor) -> Tensor:
        return values[:, None, None]
