"""The tensors of an OFT: the output channels are rotated, block by block.

Legend for shapes: N blocks, S size of a block; the weight has N S output channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OFTTensors", "rotations"]


@dataclass(frozen=True)
class OFTTensors:
    """R^T W with R of blocks (I + Q)(I - Q)^-1, Q = blocks - blocks^T: the angles between the rows of a block stay.

    Attributes:
        blocks: [N, S, S].
        alpha: |Q|, over all blocks, is held below alpha * out; 0 leaves it free.
        shape: of the weight; (out,) where the file alone is known, as it does not say the rest.
        rescale: LyCORIS's factor for each output channel, [out]; None for 1.
    Source: Qiu et al. 2023, arXiv 2306.07280, section 3.3; as LyCORIS ("diag-oft") and kohya's networks.oft compute it.
    """

    kind: ClassVar[str] = "oft"
    blocks: Tensor
    alpha: float
    shape: tuple[int, ...]
    rescale: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.blocks.shape[1]

    def delta(self, weight: Tensor | None = None) -> Tensor:
        assert weight is not None, "the change of an OFT depends on the weight it is for"
        blocks = self.blocks.float().to(weight.device)
        turns = rotations(blocks, self.alpha * weight.shape[0]) - torch.eye(self.rank, device=weight.device)
        rows = weight.reshape(*blocks.shape[:2], -1)
        change = torch.matmul(turns.transpose(1, 2), rows).reshape(weight.shape)
        if self.rescale is None:
            return change
        gain = self.rescale.float().to(weight.device).reshape(-1, *[1] * (weight.ndim - 1))
        return gain * change + (gain - 1) * weight

    def parts(self) -> dict[str, Tensor]:
        parts = {"oft_blocks": self.blocks, "alpha": torch.tensor(self.alpha)}
        if self.rescale is not None:
            parts["rescale"] = self.rescale.reshape(-1, *[1] * (max(len(self.shape), 2) - 1))
        return parts


def rotations(blocks: Tensor, constraint: float = 0.0) -> Tensor:
    """[N, S, S], the rotations that the blocks stand for.

    Args:
        blocks: [N, S, S], float32; only what differs from their transpose counts.
        constraint: largest norm of Q; 0 for none.
    """
    skew = blocks - blocks.transpose(1, 2)
    if constraint > 0:
        skew = skew * (constraint / skew.detach().norm().clamp_min(1e-8)).clamp_max(1.0)
    identity = torch.eye(blocks.shape[1], device=blocks.device, dtype=blocks.dtype)
    # X (I - Q) = I + Q; I - Q has no singular value below 1.
    turned: Tensor = torch.linalg.solve(identity - skew, identity + skew, left=False)
    return turned
