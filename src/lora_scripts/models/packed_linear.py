"""Linear layers of models that only infer, on a CPU: the weight lies in memory as oneDNN's kernel reads it.

torch hands oneDNN a plain matrix, which is brought into the kernel's order in every call. Done once, at load, it saves 10 to 20 %
of a product with thousands of rows, and more than half of one with a few, as in decoding. A GELU that follows is computed on
the way out, before the product leaves the cache. Measured on an AMD EPYC with AVX-512, two threads, in float32 and bfloat16.

The packed matrix replaces the plain one, so nothing is held twice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_scripts.models.frozen_linear import HAS_ONEDNN, PLAIN_LINEAR

__all__ = ["PackedLinear", "pack_linears", "packed", "packed_product", "plain_weight"]

GELU_AFTER = (("fc1", "activation_fn"), ("dense", "intermediate_act_fn"))
"""What transformers calls a linear layer and the function that its parent applies to what comes out of it."""

EXACT_GELUS = ("GELU", "GELUActivation")
"""Classes of torch and transformers; others approximate it."""


def packed(weight: Tensor) -> Tensor:
    """The matrix [out,in], of any strides, in the order of oneDNN's kernel: a copy, for `packed_product`."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return copy


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x W^T + b, [..., out], or its GELU, of a packed weight [out,in]; x [..., in]."""
    after, kind = ("gelu", "none") if gelu else ("none", "")
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], kind)
    return out


def plain_weight(layer: nn.Module) -> Tensor:
    """[out,in] of a linear layer, packed or not; of a packed one it is a copy."""
    if isinstance(layer, PackedLinear):
        return layer.weight.to_dense()
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach()


class PackedLinear(nn.Module):
    """x W^T + b, or its GELU; x [..., in], without a gradient.

    Args:
        linear: on the CPU, in float32 or bfloat16.
        gelu: apply it to the product, exactly (by the error function).
    """

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.weight: Tensor = packed(linear.weight.detach())
        self._gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return packed_product(x, self.weight, self.bias, gelu=self._gelu)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, gelu={self._gelu}"


def pack_linears(model: nn.Module) -> None:
    """Packs every plain linear layer of a model that will only infer, where that can be done: in place, for good.

    On another device, in another number format or without oneDNN the model stays as it is.
    """
    if not HAS_ONEDNN:
        return
    for parent in list(model.modules()):
        with_gelu = [name for name, after in GELU_AFTER if type(getattr(parent, after, None)).__name__ in EXACT_GELUS]
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and type(layer) in PLAIN_LINEAR and _can_pack(layer.weight):
                setattr(parent, name, PackedLinear(layer, gelu=name in with_gelu))
        for name, after in GELU_AFTER:
            if name in with_gelu and isinstance(getattr(parent, name, None), PackedLinear):
                setattr(parent, after, nn.Identity())


def _can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
