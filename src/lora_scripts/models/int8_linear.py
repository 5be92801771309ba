"""A frozen linear layer whose weight is kept in 8 bits; the arithmetic is that of the input.

bitsandbytes' own layer (LLM.int8()) rounds the inputs too, by columns that it picks from all rows of a pass: what comes out
for one text then depends on the others beside it, and its gradient is not that of what it computed. Here the weight alone is
rounded. Both hold the same bytes.

Legend for shapes: N rows, in/out features.
Source: Dettmers et al. 2022, arXiv 2208.07339, section 2.1, for one scale per row of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Int8Linear"]


class Int8Linear(nn.Linear):
    """x (s Q)^T + b; x [..., in], Q [out, in] in int8, s [out] float32, one scale for each row.

    Attributes:
        weight: Q.
        scales: s.
    """

    scales: Tensor

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        with torch.device("meta"):
            super().__init__(weight.shape[1], weight.shape[0], bias is not None)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, self.weight, self.scales)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        # model.to(torch.bfloat16) must not round the scales; they follow the device alone.
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = scales.to(self.scales.device)
        return self


class _Product(torch.autograd.Function):
    """The weight in the dtype of the input lives while it is needed: whole numbers up to 127 are exact in all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scales)
        return F.linear(x, weight.to(x.dtype)).mul_(scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        return (grad * scales).to(grad.dtype) @ weight.to(grad.dtype), None, None
