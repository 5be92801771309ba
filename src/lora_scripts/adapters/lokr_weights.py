"""The tensors of a LoKr: the Kronecker product of a small matrix and a larger, often low-rank one.

Legend for shapes: R rank; the weight is [a b, c d] or [a b, c d, k, k].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lora_scripts.adapters.loha_weights import tucker_product
from lora_scripts.adapters.weights import lengths_part, with_lengths

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LoKrTensors"]


@dataclass(frozen=True)
class LoKrTensors:
    """W + scale * w1 (x) w2, where either factor may be a product of two.

    The scale is alpha / R, and 1 where neither factor is a product: then there is no R.

    Attributes:
        w1: ([a, c],) or ([a, R], [R, c]).
        w2: ([b, d],), of a convolution ([b, d, k, k],); or ([b, R], [R, d]), of a convolution ([b, R], [R, d k k]);
            with a core ([R, b], [R, d]).
        alpha: the scale's numerator.
        shape: of the weight.
        t2: core of a convolution in Tucker form, [R, R, k, k]; None otherwise.
        magnitude: as in `LoRATensors`.
    Source: Yeh et al. 2023, arXiv 2309.14859, section 3.2; names and scale as LyCORIS.
    """

    kind: ClassVar[str] = "lokr"
    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    alpha: float
    shape: tuple[int, ...]
    t2: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """R; without one, the largest rank that the larger factor can have."""
        for factor in (self.w2, self.w1):
            if len(factor) == 2:
                return factor[1].shape[0]
        return min(self.w2[0].flatten(1).shape)

    @property
    def scale(self) -> float:
        return 1.0 if len(self.w1) == len(self.w2) == 1 else self.alpha / self.rank

    def factors(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """w1 [a, c] and w2 [b, d] or [b, d, k, k], float32, without the scale."""
        first = [part.float().to(device or self.w1[0].device) for part in self.w1]
        second = [part.float().to(device or self.w2[0].device) for part in self.w2]
        w1 = first[0] if len(first) == 1 else first[0] @ first[1]
        if self.t2 is not None:
            w2 = tucker_product(self.t2.float().to(second[0].device), *second)
        else:
            w2 = second[0] if len(second) == 1 else second[0] @ second[1]
        return w1, w2.reshape(w2.shape[0], self.shape[1] // w1.shape[1], *self.shape[2:])

    def delta(self, weight: Tensor | None = None) -> Tensor:
        w1, w2 = self.factors(None if weight is None else weight.device)
        product = torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous()).mul_(self.scale)
        return with_lengths(product.reshape(self.shape), weight, self.magnitude)

    def parts(self) -> dict[str, Tensor]:
        parts = {"alpha": torch.tensor(self.alpha)}
        for name, factor in (("lokr_w1", self.w1), ("lokr_w2", self.w2)):
            parts |= {name: factor[0]} if len(factor) == 1 else {f"{name}_a": factor[0], f"{name}_b": factor[1]}
        if self.t2 is not None:
            parts["lokr_t2"] = self.t2
        return parts | lengths_part(self.magnitude, len(self.shape))
