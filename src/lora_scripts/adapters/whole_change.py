"""A layer with a change that has no short form: computed whole in each pass, and kept in none.

Autograd would keep the change, what it was made of, and the sum with the weight until the backward pass: several weights'
worth for every layer. Here the small factors and the input are kept, and the backward pass makes the change again, which costs
little beside the products with it.

Legend for shapes: N rows, in/out features or channels, k kernel size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_scripts.adapters.layer import applied
from lora_scripts.models.frozen_linear import product

__all__ = ["whole_change"]

Make = Callable[..., Tensor]


def whole_change(
    layer: nn.Linear | nn.Conv2d, x: Tensor, make: Make, factors: Sequence[Tensor], *, alone: bool = False
) -> Tensor:
    """The layer's output for x with the change `make(*factors)` added to its weight.

    In float32 change and weight are summed first, which leaves one product; a half-precision sum would round the change
    away, so there each has a product of its own.

    Args:
        make: factors to the change in the shape of the weight, by operations that autograd knows.
        alone: only the change's part of the output, without weight and bias.
    """
    if isinstance(layer, nn.Conv2d) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
        change = applied(layer, x, make(*factors).to(x.dtype))
        return change if alone else applied(layer, x, layer.weight, layer.bias) + change
    weight, bias = (None, None) if alone else (layer.weight, layer.bias)
    out: Tensor = _WholeChange.apply(layer, make, x, weight, bias, *factors)  # type: ignore[no-untyped-call]
    return out


class _WholeChange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: nn.Linear | nn.Conv2d,
        make: Make,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        ctx.layer, ctx.make = layer, make
        ctx.save_for_backward(x, weight, *factors)
        change = make(*factors)
        if weight is None:
            return applied(layer, x, change.to(x.dtype))
        if weight.dtype is torch.float32:
            return applied(layer, x, change.add_(weight), bias)
        return applied(layer, x, weight, bias).add_(applied(layer, x, change.to(x.dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *factors = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [factor.detach().requires_grad_() for factor in factors]
            change = ctx.make(*leaves)
        used = change.detach().to(x.dtype)
        wants_x = ctx.needs_input_grad[2]
        if weight is not None and weight.dtype is torch.float32:
            grad_x, grad_change = _gradients(ctx.layer, x, used + weight, grad, wants_x)
        else:
            grad_x, grad_change = _gradients(ctx.layer, x, used, grad, wants_x)
            if weight is not None and wants_x:
                grad_x = grad_x + _gradients(ctx.layer, x, weight, grad, True, False)[0]
        of_factors = torch.autograd.grad(change, leaves, grad_change.to(change.dtype))
        return None, None, grad_x, None, None, *of_factors


def _gradients(
    layer: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor, grad: Tensor, wants_x: bool, wants_weight: bool = True
) -> tuple[Any, Any]:
    """The gradients of x and of the weight, each None where it is not wanted."""
    if isinstance(layer, nn.Conv2d):
        mask = [wants_x, wants_weight, False]
        options = (layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups, mask)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *options)[:2]  # type: ignore[no-any-return]
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    of_x = product(grads, weight.t()).view(x.shape) if wants_x else None
    return of_x, product(grads.t(), rows.t()) if wants_weight else None
