"""LoKr: the change is the Kronecker product of a small matrix and a larger, mostly low-rank one.

It is never formed. With the input's channels laid out as [c, d], x (w1 (x) w2)^T is a product with w2 along d and one with w1 along c.

Legend for shapes: R rank; the weight is [a b, c d] or [a b, c d, k, k]; h w height and width.
Source: Yeh et al. 2023, arXiv 2309.14859, section 3.2; factors, initial values and names as LyCORIS.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scripts.adapters.layer import AdapterLayer, copied, weight_shape
from lora_scripts.adapters.lokr_weights import LoKrTensors
from lora_scripts.adapters.weights import LayerChange
from lora_scripts.errors import ModelError

__all__ = ["LoKrLayer", "factorised"]


class LoKrLayer(AdapterLayer):
    """W + scale * w1 (x) w2 for a linear layer or a convolution.

    Attributes:
        lokr_w1: [a, c].
        lokr_w2_a, lokr_w2_b: [b, R] and [R, d] or [R, d k k]; w2 is their product.
        lokr_w2: [b, d] or [b, d, k, k] instead of them, where R is no less than half of the longer side. The scale is 1 then.
    """

    lokr_w1: nn.Parameter

    def __init__(
        self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float, factor: int | None = None
    ) -> None:
        """`factor`: see `factorised`."""
        super().__init__(base, rank, alpha, dropout)
        self._shape = weight_shape(base)
        self._kernel = self._shape[2:]
        (a, b), (c, d) = factorised(self._shape[0], factor), factorised(self._shape[1], factor)
        self._sides = (a, b, c, d)
        self.lokr_w1 = self._trained(a, c)
        self._whole = rank >= max(b, d) / 2
        if self._whole:
            self.lokr_w2 = self._trained(b, d, *self._kernel)
        else:
            self.lokr_w2_a, self.lokr_w2_b = self._trained(b, rank), self._trained(rank, d * math.prod(self._kernel))

    @property
    def scale(self) -> float:
        return 1.0 if self._whole else super().scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        scale = self.scale * self.strength
        if scale == 0.0:
            return out
        change = self._of_pictures if isinstance(self.base, nn.Conv2d) else self._of_rows
        return torch.add(out, change(self._dropped(x), (self.lokr_w1 * scale).to(x.dtype)))

    def _of_rows(self, x: Tensor, w1: Tensor) -> Tensor:
        """The change of the output for x [..., in], with w1 scaled."""
        _, _, c, d = self._sides
        parts = x.reshape(-1, c, d)
        if self._whole:
            mixed = torch.matmul(w1, F.linear(parts, self.lokr_w2.to(x.dtype)))
        else:
            # w1 acts in the middle, where the rows are R wide.
            low = torch.matmul(w1, F.linear(parts, self.lokr_w2_b.to(x.dtype)))
            mixed = F.linear(low, self.lokr_w2_a.to(x.dtype))
        return mixed.reshape(*x.shape[:-1], self._shape[0])

    def _of_pictures(self, x: Tensor, w1: Tensor) -> Tensor:
        """The change of the output for x [B, in, h, w], with w1 scaled."""
        a, _, c, d = self._sides
        assert isinstance(self.base, nn.Conv2d)
        parts = x.reshape(-1, d, *x.shape[2:])
        w2 = self.lokr_w2 if self._whole else self.lokr_w2_b
        low = self.base._conv_forward(parts, w2.view(-1, d, *self._kernel).to(x.dtype), None)
        size = low.shape[2:]
        mixed = torch.matmul(w1, low.reshape(x.shape[0], c, -1)).reshape(x.shape[0] * a, low.shape[1], *size)
        if not self._whole:
            mixed = F.conv2d(mixed, self.lokr_w2_a[:, :, None, None].to(x.dtype))
        return mixed.reshape(x.shape[0], self._shape[0], *size)

    @torch.no_grad()
    def reset(self, generator: torch.Generator, init: Any = None) -> None:
        """Uniform values with a = sqrt 5 in w1 and w2_a; w2_b (or w2) is zero, so the change is."""
        drawn = [self.lokr_w1] if self._whole else [self.lokr_w1, self.lokr_w2_a]
        for parameter in drawn:
            bound = 1.0 / math.sqrt(parameter.shape[1])
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        (self.lokr_w2 if self._whole else self.lokr_w2_b).zero_()

    def fitted(self, change: LayerChange) -> tuple[LoKrTensors, float]:
        own = self.tensors()
        if not isinstance(change, LoKrTensors) or change.t2 is not None or change.magnitude is not None:
            raise ModelError(f"is of kind {change.kind} or in another form, which a LoKr cannot go on from")
        shapes, wanted = ([list(part.shape) for part in (*each.w1, *each.w2)] for each in (change, own))
        if shapes != wanted:
            raise ModelError(
                f"is a LoKr of factors {shapes}, here they are {wanted}; set lora_rank and lokr_factor as it had"
            )
        return change, 1.0

    @torch.no_grad()
    def start_from(self, change: LoKrTensors) -> None:
        self.lokr_w1.copy_(change.w1[0].double() * (change.scale / self.scale))
        for parameter, part in zip(self._second(), change.w2, strict=True):
            parameter.copy_(part)

    def _second(self) -> tuple[nn.Parameter, ...]:
        return (self.lokr_w2,) if self._whole else (self.lokr_w2_a, self.lokr_w2_b)

    def tensors(self) -> LoKrTensors:
        second = tuple(copied(part) for part in self._second())
        # Without a rank readers take the scale for 1 whatever alpha says; say what acts.
        return LoKrTensors(
            (copied(self.lokr_w1),), second, float(self.rank) if self._whole else self.alpha, self._shape
        )


def factorised(size: int, factor: int | None = None) -> tuple[int, int]:
    """Two numbers whose product is `size`, the smaller one first: as near to each other as can be, or as the factor has it.

    Args:
        factor: the smaller one if it divides the size, else the bound of it; None: no bound.
    Source: LyCORIS, `factorization`.
    """
    if factor is not None and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    small = 1
    for candidate in range(1, math.isqrt(size) + 1):
        if size % candidate == 0 and candidate <= (factor or size):
            small = candidate
    return small, size // small
