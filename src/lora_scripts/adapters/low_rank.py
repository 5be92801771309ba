"""The products of a linear LoRA layer, forward and backward, in as few kernels as they take.

Written with plain torch operations, a frozen layer and its low-rank change take two extra passes over the output and
one over the gradient of the input, and a dozen autograd nodes. Here both are added inside the matrix product.
The figures are in docs/benchmarks.md; adding the change to the weight first (fewer products, but in half precision the
rounded sum would lose it) was measured too and gains nothing at the sizes of a U-Net.

Legend for shapes: N rows, R rank, in/out features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["linear_low_rank"]


def linear_low_rank(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x W^T + b + scale * x A^T B^T, [..., out].

    Args:
        x: [..., in] in the dtype of the frozen weight.
        weight, bias: [out, in] and [out], frozen.
        A, B: [R, in] and [out, R] in float32, used in the dtype of x.
        start: A and B as they were, frozen; their product is taken off (PiSSA).
    """
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Linear.apply(rows, weight, bias, A, B, scale, start)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        start: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        ctx.scale, ctx.rank = scale, A.shape[0]
        if start is not None:  # further rows of the same two products, so that they take no passes of their own
            A, B = torch.cat([A, start[0]]), torch.cat([B, -start[1]], dim=1)
        a, b = A.to(x.dtype), (B * scale).to(x.dtype)
        low = F.linear(x, a)
        out = F.linear(x, weight, bias).addmm_(low, b.t())
        ctx.save_for_backward(x, weight, a, b, low)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad_low = grad @ b
        grad_x = (grad @ weight).addmm_(grad_low, a) if ctx.needs_input_grad[0] else None
        grad_a = (grad_low[:, : ctx.rank].t() @ x).float()
        grad_b = (grad.t() @ low[:, : ctx.rank]).float().mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None, None
