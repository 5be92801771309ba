"""Attention in half precision on a CPU, in tiles that stay in its cache.

torch's own kernel for a CPU (`scaled_dot_product_attention`) cuts heads of 40 to 160 columns into products too small for the
processor's bfloat16 instructions: half of a Stable Diffusion step went there. Here the scores of a tile of queries with all
keys are one product, and the softmax runs over what still lies in the cache. The backward pass computes the scores again,
so nothing of the size queries x keys is kept. The sum over products is taken in float32; a score is rounded to the number
format of its inputs, as in every attention that is written out (diffusers' and sd-scripts' plain one).

Legend for shapes: G heads times batch, N queries, M keys, D columns of a head.
Source: Dao et al. 2022, arXiv 2205.14135, equation 3 and appendix B.2 (the backward pass from recomputed scores).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["attention", "tiled_attention"]

TILE_SCORES = 2**21
"""Scores at a time: 4 MB in bfloat16, and twice that in the backward pass. Half as many are no faster, twice as many slower."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt D) v, [B,H,N,D], by whichever way is faster: q [B,H,N,D], k and v [B,H,M,D]."""
    tiles = (
        q.device.type == "cpu"
        and q.dtype is torch.bfloat16
        and not torch.cpu._is_amx_tile_supported()  # there torch's kernel packs its products for the tiles
    )
    return tiled_attention(q, k, v) if tiles else F.scaled_dot_product_attention(q, k, v)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tiled_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt D) v, [B,H,N,D], with gradients to all three: q [B,H,N,D], k and v [B,H,M,D]."""
    out: Tensor = _TiledAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)))  # type: ignore[no-untyped-call]
    return out.view(q.shape)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (q * q.shape[-1] ** -0.5).contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        scores = _buffer(q, k)
        for heads, rows in _tiles(q, k):
            P = _probabilities(q[heads, rows], k[heads], scores)
            torch.bmm(P, v[heads], out=out[heads, rows])
        ctx.save_for_backward(q, k, v)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        d_out = d_out.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scores, gradients = _buffer(q, k), _buffer(q, k)
        for heads, rows in _tiles(q, k):
            tile, d_tile = q[heads, rows], d_out[heads, rows]
            P = _probabilities(tile, k[heads], scores)
            dv[heads].baddbmm_(P.mT, d_tile)
            dP = torch.bmm(d_tile, v[heads].mT, out=_part(gradients, tile, k))
            dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
            torch.bmm(dS, k[heads], out=dq[heads, rows])
            dk[heads].baddbmm_(dS.mT, tile)
        return dq.mul_(q.shape[-1] ** -0.5), dk, dv


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Which heads and which of their queries are computed at a time: several whole heads, or a part of one."""
    (num_heads, num_rows, _), num_keys = q.shape, k.shape[1]
    heads = max(1, TILE_SCORES // (num_rows * num_keys))
    rows = min(num_rows, max(1, TILE_SCORES // num_keys))
    for first in range(0, num_heads, heads):
        for row in range(0, num_rows, rows):
            yield slice(first, first + heads), slice(row, row + rows)


def _buffer(q: Tensor, k: Tensor) -> Tensor:
    """Room for the scores of the largest tile."""
    return q.new_empty(max(min(TILE_SCORES, q[..., 0].numel() * k.shape[1]), k.shape[1]))


def _part(buffer: Tensor, tile: Tensor, k: Tensor) -> Tensor:
    """[g,n,M] at the buffer's beginning."""
    shape = (*tile.shape[:2], k.shape[1])
    return buffer[: shape[0] * shape[1] * shape[2]].view(shape)


def _probabilities(tile: Tensor, k: Tensor, buffer: Tensor) -> Tensor:
    """[g,n,M] share of every key in every query's answer, in the buffer."""
    scores = torch.bmm(tile, k.mT, out=_part(buffer, tile, k))
    return torch.softmax(scores, -1, out=scores)
