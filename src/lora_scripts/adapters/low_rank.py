"""The products of a LoRA layer, forward and backward, in as few kernels as they take.

A frozen layer and its low-rank change written with plain torch operations cost two extra passes over the output, one
over the gradient of the input, and a dozen autograd nodes. Here the change is added inside the matrix product itself, and
neither the base output nor the unscaled change is kept for the backward pass.

Legend for shapes: N rows, R rank, in/out features or channels, h w picture, k kernel size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["conv2d_low_rank", "linear_low_rank"]


def linear_low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x W^T + b + scale * x A^T B^T, [..., out].

    Args:
        x: [..., in] in the dtype of the frozen weight.
        weight, bias: [out, in] and [out], frozen.
        A, B: [R, in] and [out, R] in float32, used in the dtype of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Linear.apply(rows, weight, bias, A, B, scale)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        a, b = A.to(x.dtype), (B * scale).to(x.dtype)
        low = F.linear(x, a)
        out = F.linear(x, weight, bias).addmm_(low, b.t())
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad_low = grad @ b
        grad_x = (grad @ weight).addmm_(grad_low, a) if ctx.needs_input_grad[0] else None
        grad_a = (grad_low.t() @ x).float()
        grad_b = (grad.t() @ low).float().mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None


def conv2d_low_rank(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """conv(x, W) + b + scale * conv1x1(conv(x, A), B), [batch, out, h', w'].

    Args:
        x: [batch, in, h, w] in the dtype of the frozen weight, contiguous or channels-last.
        weight, bias: [out, in, k, k] and [out], frozen; no groups.
        A, B: [R, in, k, k] and [out, R, 1, 1] in float32, used in the dtype of x.
    """
    low = F.conv2d(x, A.to(x.dtype), None, stride, padding, dilation)
    out = F.conv2d(x, weight, bias, stride, padding, dilation)
    return torch.add(out, F.conv2d(low, B.to(x.dtype)), alpha=scale)
