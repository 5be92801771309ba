"""A starting point for a vision tower's patch embedding: whitened principal components of the pictures' patches.

A random embedding hands on mostly the brightness of a patch, and a tower takes long to find the edges in the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def whiten_patches(embedding: nn.Conv2d, pictures: Tensor, damping: float = 0.02) -> None:
    """Sets the weight (and bias) so that the patches of `pictures` come out uncorrelated, with variance near one.

    Args:
        pictures: [B,3,H,W], normalised as the tower will see them.
        damping: share of the mean variance that is added before scaling, so that noise is not blown up.
    """
    side = embedding.kernel_size[0]
    patches = nn.functional.unfold(pictures, side, stride=side).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    centred = (patches - mean).double()
    values, vectors = torch.linalg.eigh(centred.t() @ centred / len(centred))
    width = embedding.out_channels
    values, vectors = values[-width:].flip(0), vectors[:, -width:].flip(1)
    scale = (values + damping * values.mean()).rsqrt()
    weight = (vectors * scale).t().float()
    embedding.weight.copy_(weight.view_as(embedding.weight))
    if embedding.bias is not None:
        embedding.bias.copy_(-weight @ mean)
