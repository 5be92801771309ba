"""Linear layers whose weight never changes: the product itself, and no gradient but the input's.

In float32 on a CPU torch multiplies through MKL, which takes narrower instructions on processors that are not Intel's; oneDNN,
which torch has beside it, chooses by what the processor can do. Measured on an AMD EPYC with AVX-512, two threads: layers
of 64 to 4,096 features come out 1.6 to 2.7 times as fast, the same to rounding. In half precision torch takes oneDNN itself.

Legend for shapes: N rows, in/out features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["PLAIN_LINEAR", "FrozenLinear", "add_product", "freeze_linears", "product"]

HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

FEWEST_MULTIPLICATIONS = 2**19
"""Below that a call of oneDNN takes longer to begin than MKL to finish (10 against 2 microseconds)."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, [..., out], the fast way where no gradient is recorded, as in passes that are written out.

    Args:
        x: [..., in].
        weight: [out, in], of any strides: a transposed one needs no copy.
        bias: [out].
    """
    if _through_onednn(x, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


def add_product(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """Adds x W^T to the total, [N,out], without a gradient: x [N,in], W [out,in] of any strides."""
    if _through_onednn(x, weight):
        total.add_(product(x, weight))
    else:
        torch.addmm(total, x, weight.t(), out=total)  # which torch's counter of operations knows, unlike addmm_


def _through_onednn(x: Tensor, weight: Tensor) -> bool:
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return (
        HAS_ONEDNN
        and not recorded
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.numel() * weight.shape[0] >= FEWEST_MULTIPLICATIONS
        # For a matrix with gaps between its rows oneDNN has no kernel but the one it is checked against, a hundred times slower.
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and not torch.compiler.is_compiling()
    )


class FrozenLinear(nn.Linear):
    """x W^T + b with a gradient to x alone; x [..., in]."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) or self.weight.requires_grad:
            return F.linear(x, self.weight, self.bias)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return product(x, self.weight, self.bias)
        out: Tensor = _Product.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(grad, weight.t()), None, None


PLAIN_LINEAR = (nn.Linear, FrozenLinear)
"""Types of layer that do nothing but multiply with their weight: another subclass may do more."""


def freeze_linears(module: nn.Module) -> None:
    """Every plain linear layer of the module becomes a `FrozenLinear`; weights, names and what is saved stay as they are."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.requires_grad_(False)
            layer.__class__ = FrozenLinear
