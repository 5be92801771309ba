"""The tensors of a LoHa: the elementwise product of two low-rank matrices.

Legend for shapes: R rank, in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lora_scripts.adapters.weights import lengths_part, with_lengths

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LoHaTensors", "tucker_product"]


@dataclass(frozen=True)
class LoHaTensors:
    """W + alpha / R * (w1_a w1_b) * (w2_a w2_b), the product in the middle taken element by element.

    Its rank is up to R^2: as many as the products of one row of each pair.

    Attributes:
        w1_a, w2_a: [out, R]; with a core [R, out].
        w1_b, w2_b: [R, in], of a convolution [R, in k k]; with a core [R, in].
        alpha: the scale's numerator.
        shape: of the weight.
        t1, t2: cores of a convolution in Tucker form, [R, R, k, k]; None otherwise.
        magnitude: as in `LoRATensors`.
    Source: Hyeon-Woo et al. 2021, arXiv 2108.06098, proposition 1; Tucker form: proposition 3. Names as LyCORIS.
    """

    kind: ClassVar[str] = "loha"
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    shape: tuple[int, ...]
    t1: Tensor | None = None
    t2: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self, weight: Tensor | None = None) -> Tensor:
        device = self.w1_a.device if weight is None else weight.device
        first = _factor(self.w1_a, self.w1_b, self.t1, device)
        second = _factor(self.w2_a, self.w2_b, self.t2, device)
        return with_lengths(first.mul_(second).mul_(self.scale).reshape(self.shape), weight, self.magnitude)

    def parts(self) -> dict[str, Tensor]:
        parts = {
            "hada_w1_a": self.w1_a,
            "hada_w1_b": self.w1_b,
            "hada_w2_a": self.w2_a,
            "hada_w2_b": self.w2_b,
            "alpha": torch.tensor(self.alpha),
        }
        if self.t1 is not None and self.t2 is not None:
            parts |= {"hada_t1": self.t1, "hada_t2": self.t2}
        return parts | lengths_part(self.magnitude, len(self.shape))


def tucker_product(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[out, in, k, k] from a core [R, R, k, k] and its sides [R, out] and [R, in]."""
    return torch.einsum("ijkl,ip,jr->prkl", core, a, b)


def _factor(a: Tensor, b: Tensor, core: Tensor | None, device: torch.device) -> Tensor:
    a, b = a.float().to(device), b.float().to(device)
    return a @ b if core is None else tucker_product(core.float().to(device), a, b)
