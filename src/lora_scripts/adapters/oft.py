"""OFT: the output channels of a layer are rotated, block by block, so that the angles within a block stay as they were.

The output is rotated, not the weight: that costs rows out S operations where a rotated weight costs in out S and a copy of it,
and in half precision the small turn of a weight would be rounded away.

Legend for shapes: N blocks of size S, N S = out.
Source: Qiu et al. 2023, arXiv 2306.07280, section 3.3; as LyCORIS's diag-oft and kohya's networks.oft.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_scripts.adapters.layer import AdapterLayer, copied, weight_shape
from lora_scripts.adapters.oft_weights import OFTTensors, rotations
from lora_scripts.adapters.weights import LayerChange
from lora_scripts.errors import ModelError

__all__ = ["OFTLayer", "block_size"]


class OFTLayer(AdapterLayer):
    """R^T W x + b for a linear layer or a convolution, R of N blocks (I + Q)(I - Q)^-1.

    Attributes:
        oft_blocks: [N, S, S], Q = oft_blocks - oft_blocks^T.
    """

    oft_blocks: nn.Parameter

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float) -> None:
        """`rank`: the largest size of a block, see `block_size`; `alpha` does nothing."""
        shape = weight_shape(base)
        size = block_size(shape[0], rank)
        super().__init__(base, size, 0.0, dropout)
        self._shape = shape
        self.oft_blocks = self._trained(shape[0] // size, size, size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        if self.strength == 0.0:
            return out
        turns = rotations(self.oft_blocks) - torch.eye(self.rank, device=self.oft_blocks.device)
        turns = (turns * self.strength).to(out.dtype)
        channel = 1 if isinstance(self.base, nn.Conv2d) else -1
        plain = out if self.bias is None else out - (self.bias[:, None, None] if channel == 1 else self.bias)
        return out + _turned(self._dropped(plain), turns, channel)

    @torch.no_grad()
    def reset(self, generator: torch.Generator, init: Any = None) -> None:
        """No rotation; nothing is drawn."""
        self.oft_blocks.zero_()

    def fitted(self, change: LayerChange) -> tuple[OFTTensors, float]:
        if not isinstance(change, OFTTensors) or change.rescale is not None:
            raise ModelError(f"is of kind {change.kind} or in another form, which an OFT cannot go on from")
        if change.blocks.shape != self.oft_blocks.shape:
            raise ModelError(
                f"is an OFT of blocks {list(change.blocks.shape)}, here they are {list(self.oft_blocks.shape)}"
            )
        return change, 1.0

    @torch.no_grad()
    def start_from(self, change: OFTTensors) -> None:
        blocks = change.blocks.float()
        if change.alpha > 0:
            norm = (blocks - blocks.transpose(1, 2)).norm()
            blocks = blocks * (change.alpha * self._shape[0] / norm.clamp_min(1e-8)).clamp_max(1.0)
        self.oft_blocks.copy_(blocks)

    def tensors(self) -> OFTTensors:
        blocks = copied(self.oft_blocks)
        # Readers shorten Q to alpha, or to alpha times the channels, some of them also where alpha is 0: so say a bound
        # that no reader reaches.
        bound = math.ceil(1.01 * float((blocks - blocks.transpose(1, 2)).norm()))
        return OFTTensors(blocks, float(max(1, bound)), self._shape)


def _turned(out: Tensor, turns: Tensor, channel: int) -> Tensor:
    """Each block of channels times its [S, S]; out is [..., N S] or [B, N S, h, w]."""
    blocks, size = turns.shape[:2]
    if channel == -1:
        return torch.einsum("...kn,knm->...km", out.reshape(*out.shape[:-1], blocks, size), turns).reshape(out.shape)
    parts = out.reshape(out.shape[0], blocks, size, *out.shape[2:])
    return torch.einsum("bknhw,knm->bkmhw", parts, turns).reshape(out.shape)


def block_size(out: int, largest: int) -> int:
    """The largest divisor of `out` up to `largest` and up to its root: LyCORIS reads no blocks larger than their number."""
    return max(size for size in range(1, min(largest, math.isqrt(out)) + 1) if out % size == 0)
