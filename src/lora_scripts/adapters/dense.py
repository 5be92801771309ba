"""The frozen weight of a layer as a plain matrix, however the layer keeps it.

Legend for shapes: in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_scripts.adapters.layer import weight_shape

__all__ = ["dense_weight", "row_products"]


@torch.no_grad()
def dense_weight(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """[out, in] or [out, in, k, k], float32 on the layer's device; a copy.

    A quantised layer is asked what it makes of the unit vectors: that needs no knowledge of its format.
    """
    if layer.weight.is_floating_point() and tuple(layer.weight.shape) == weight_shape(layer):
        return layer.weight.detach().to(torch.float32, copy=True)
    assert isinstance(layer, nn.Linear), f"{type(layer).__name__}: its weight cannot be read"
    return row_products(layer, torch.eye(layer.in_features, device=layer.weight.device))


@torch.no_grad()
def row_products(layer: nn.Linear | nn.Conv2d, rows: Tensor) -> Tensor:
    """W rows^T, [out, number of rows], float32: every weight row times every given row ([R, in] or [R, in, k, k])."""
    weight = layer.weight
    if weight.is_floating_point() and tuple(weight.shape) == weight_shape(layer):
        return (weight.flatten(1) @ rows.flatten(1).to(weight.dtype).T).float()
    bias, layer.bias = layer.bias, None  # a large one would leave little of the products in half precision
    try:
        products: Tensor = layer(rows)
    finally:
        layer.bias = bias
    return products.T.float()
