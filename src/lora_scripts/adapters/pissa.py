"""PiSSA: the adapter begins as the weight's principal part and the frozen layer as what is left.

PEFT writes the remainder W - s B0 A0 over the frozen weight. Here the weight stays as it is and B0 A0 is taken off in the
same low-rank product, which is the same function: the original model is at hand at any time and to the bit, a half-precision
weight is not rounded a second time, and a finished file holds exactly what training changed. It costs a product of rank 2 R
where plain LoRA has one of rank R: 1 % of a layer's time at 2048 features and rank 16.

Legend for shapes: R rank, in/out the layer's features or channels, k kernel size.
Source: Meng et al. 2024, arXiv 2404.02948, section 3; initial values as PEFT's `init_lora_weights="pissa"`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_scripts.adapters.dense import dense_weight
from lora_scripts.adapters.layer import copied
from lora_scripts.adapters.layers import LoRAConv2d, LoRAInit, LoRALayer, LoRALinear
from lora_scripts.adapters.principal import principal_part
from lora_scripts.adapters.weights import LoRATensors

__all__ = ["PiSSAConv2d", "PiSSALinear"]


class _PiSSA(LoRALayer):
    """W x + s (B A - B0 A0) x, where s B0 A0 is the principal part of W and A, B begin as A0, B0.

    A0 and B0 are kept in checkpoints: a decomposition may come out otherwise on another machine or number of threads.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base, rank, alpha, dropout)
        self.register_buffer("start_A", torch.zeros_like(self.lora_A, requires_grad=False))
        self.register_buffer("start_B", torch.zeros_like(self.lora_B, requires_grad=False))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, init: LoRAInit = "pissa") -> None:
        A, B = principal_part(dense_weight(self.base).flatten(1), self.rank, self.scale, generator)
        for start, trained, values in ((self.start_A, self.lora_A, A), (self.start_B, self.lora_B, B)):
            start.copy_(values.reshape(start.shape))
            trained.copy_(start)

    @torch.no_grad()
    def start_from(self, tensors: LoRATensors) -> None:
        """An older LoRA takes the principal part's place: from then on nothing is taken off the weight."""
        super().start_from(tensors)
        self.start_A.zero_()
        self.start_B.zero_()

    @property
    def _start(self) -> tuple[Tensor, Tensor]:
        return self.start_A, self.start_B

    def _change(self, x: Tensor) -> Tensor:
        # Dropout thins out what is trained; the remainder of the weight is part of the frozen layer.
        return super()._change(x) - self._product(x, self.start_A, self.start_B)

    def tensors(self) -> LoRATensors:
        """The change as a plain LoRA of rank 2 R: B A - B0 A0 = (B - B0) A + B0 (A - A0).

        Written so, and not as [B, -B0] [A; A0], no large numbers cancel, so that rounding to half precision is harmless.
        """
        down = torch.cat([self.lora_A, self.lora_A - self.start_A])
        up = torch.cat([self.lora_B - self.start_B, self.start_B], dim=1)
        return LoRATensors(copied(down), copied(up), 2 * self.alpha)


class PiSSALinear(_PiSSA, LoRALinear):
    """A linear layer that trains its principal part; A [R, in], B [out, R]."""


class PiSSAConv2d(_PiSSA, LoRAConv2d):
    """A convolution that trains the principal part of its weight as a matrix [out, in k k]."""
