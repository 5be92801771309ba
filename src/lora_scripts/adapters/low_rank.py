"""The products of a linear LoRA layer, forward and backward, in as few kernels and operations as they take.

Written with plain torch operations, a frozen layer and its low-rank change take two extra passes over the output and
one over the gradient of the input, and a dozen autograd nodes. Here both are added inside the matrix product.

Operations, in units of 2 N R: x A^T takes in, low B^T out, and the four products of the backward pass 2 (in + out), of which
the two of the frozen weight alone take N in out each. That is the least that keeps the weight and the change apart. Adding the
change to the weight first saves two of the six for 2 R in out more in each pass, so it counts fewer operations as soon as N > in
out / (in + out). Measured (docs/benchmarks.md), that is 3 to 9 % of the layer where N is several times the width and costs a
second weight per layer kept between the passes, is slower elsewhere, and in half precision the rounded sum would lose the change.
So it is not done.

What does pay is how the narrow products lie in memory. Each is written so that the rank runs along rows, [R, N] or [R, in], never
along columns: a CPU's kernels are up to twelve times slower for the transposed twin at rank 8, which is up to 7 % of the layer.

Legend for shapes: N rows, R rank, in/out features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_scripts.models.frozen_linear import product
from lora_scripts.models.low_bit import LowBitWeight, low_bit_product, transposed_low_bit_product

__all__ = ["linear_low_rank"]


def linear_low_rank(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    start: tuple[Tensor, Tensor] | None = None,
    low_bit: LowBitWeight | None = None,
) -> Tensor:
    """x W^T + b + scale * x A^T B^T, [..., out].

    Args:
        x: [..., in] in the dtype of the frozen weight.
        weight, bias: [out, in] and [out], frozen.
        A, B: [R, in] and [out, R] in float32, used in the dtype of x.
        start: A and B as they were, frozen; their product is taken off (PiSSA).
        low_bit: the weight in 8 bits, to make its two products with; those of A and B stay in the dtype of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Linear.apply(rows, weight, bias, A, B, scale, start, low_bit)  # type: ignore[no-untyped-call]
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
        low_bit: LowBitWeight | None,
    ) -> Tensor:
        ctx.scale, ctx.rank, ctx.low_bit = scale, A.shape[0], low_bit
        if start is not None:  # further rows of the same two products, so that they take no passes of their own
            A, B = torch.cat([A, start[0]]), torch.cat([B, -start[1]], dim=1)
        a, b_t = A.to(x.dtype), (B * scale).to(x.dtype).t().contiguous()
        low_t = product(a, x)
        out = product(x, weight, bias) if low_bit is None else _with_bias(low_bit_product(x, low_bit), bias)
        out.addmm_(low_t.t(), b_t)
        ctx.save_for_backward(x, weight, a, b_t, low_t)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b_t, low_t = ctx.saved_tensors
        grad_low_t = product(b_t, grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            plain = ctx.low_bit is None
            grad_x = product(grad, weight.t()) if plain else transposed_low_bit_product(grad, ctx.low_bit)
            grad_x.addmm_(grad_low_t.t(), a)
        grad_a = product(grad_low_t[: ctx.rank], x.t()).float()
        grad_b = product(low_t[: ctx.rank], grad.t()).t().float().mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None, None, None


def _with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out.add_(bias)
