"""LoHa: the change is the elementwise product of two low-rank matrices, so of rank up to R^2 with 2 R (in + out) numbers.

Legend for shapes: R rank, in/out the layer's features or channels, k kernel size.
Source: Hyeon-Woo et al. 2021, arXiv 2108.06098, proposition 1; initial values and names as LyCORIS.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_scripts.adapters.layer import AdapterLayer, applied, copied, weight_shape
from lora_scripts.adapters.loha_weights import LoHaTensors
from lora_scripts.adapters.weights import LayerChange
from lora_scripts.adapters.whole_change import whole_change
from lora_scripts.errors import ModelError

__all__ = ["LoHaLayer"]


class LoHaLayer(AdapterLayer):
    """W + alpha / R * (w1_a w1_b) * (w2_a w2_b) for a linear layer or a convolution.

    Attributes:
        hada_w1_a, hada_w2_a: [out, R].
        hada_w1_b, hada_w2_b: [R, in] or [R, in k k].
    """

    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base, rank, alpha, dropout)
        self._shape = weight_shape(base)
        out, inside = self._shape[0], math.prod(self._shape[1:])
        self.hada_w1_a, self.hada_w1_b = self._trained(out, rank), self._trained(rank, inside)
        self.hada_w2_a, self.hada_w2_b = self._trained(out, rank), self._trained(rank, inside)

    def forward(self, x: Tensor) -> Tensor:
        scale, shape = self.scale * self.strength, self._shape
        if scale == 0.0:
            return self.base(x)  # type: ignore[no-any-return]

        def change(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
            return ((w1_a * scale) @ w1_b * (w2_a @ w2_b)).view(shape)

        factors = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        if torch.is_autocast_enabled(x.device.type):
            out: Tensor = self.base(x)
            return out + applied(self.base, self._dropped(x), change(*factors).to(x.dtype))
        if self._plain and not (self._dropping or self._hooked):
            return whole_change(self.base, x, change, factors)
        return self.base(x) + whole_change(self.base, self._dropped(x), change, factors, alone=True)  # type: ignore[no-any-return]

    @torch.no_grad()
    def reset(self, generator: torch.Generator, init: Any = None) -> None:
        """Normal values of spread 1 in the wide matrices and 0.1 in w1_a; w2_a is zero, so the change is."""
        for parameter, spread in ((self.hada_w1_b, 1.0), (self.hada_w1_a, 0.1), (self.hada_w2_b, 1.0)):
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, spread, generator=generator))
        self.hada_w2_a.zero_()

    def fitted(self, change: LayerChange) -> tuple[LoHaTensors, float]:
        if not isinstance(change, LoHaTensors) or change.t1 is not None or change.magnitude is not None:
            raise ModelError(f"is of kind {change.kind} or in another form, which a LoHa cannot go on from")
        if change.rank > self.rank:
            raise ModelError(
                f"is a LoHa of rank {change.rank}; set lora_rank to that, as it cannot be cut to {self.rank}"
            )
        return change, 1.0

    @torch.no_grad()
    def start_from(self, change: LoHaTensors) -> None:
        """Takes over a LoHa of at most this rank; what is beyond its rank has no effect yet, but learns."""
        rank = change.rank
        self.hada_w2_a.zero_()
        # The elementwise product of sums has cross terms: w1 beyond the rank must be zero too, and learns through w1_a.
        self.hada_w1_a.zero_()
        self.hada_w1_a[:, :rank].copy_(change.w1_a.double() * (change.scale / self.scale))
        self.hada_w2_a[:, :rank].copy_(change.w2_a)
        self.hada_w1_b[:rank].copy_(change.w1_b)
        self.hada_w2_b[:rank].copy_(change.w2_b)

    def tensors(self) -> LoHaTensors:
        first, second = (
            (copied(self.hada_w1_a), copied(self.hada_w1_b)),
            (copied(self.hada_w2_a), copied(self.hada_w2_b)),
        )
        return LoHaTensors(*first, *second, self.alpha, self._shape)
