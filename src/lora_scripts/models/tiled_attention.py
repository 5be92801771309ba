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

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["attention", "tiled_attention"]

TILE_SCORES = 2**21
"""Scores at a time: 4 MB in bfloat16, and twice that in the backward pass. Half as many are no faster, twice as many slower."""

CAUSAL_ROWS = 256
"""Queries at a time where each sees only what came before it: fewer leave out more of what is not seen, and fill a product less."""


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """softmax(scale q k^T) v, [B,H,N,D], by whichever way is faster: q [B,H,N,D], k and v [B,H,M,D].

    Args:
        scale: 1 / sqrt D where it is None.
        causal: query i sees the keys 0 ... i alone; N = M.
    """
    tiles = (
        q.device.type == "cpu"
        and q.dtype is torch.bfloat16
        and not torch.cpu._is_amx_tile_supported()  # there torch's kernel packs its products for the tiles
        and not torch.compiler.is_compiling()
    )
    if tiles:
        return tiled_attention(q, k, v, scale=scale, causal=causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal and q.shape[2] > 1, scale=scale)


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """As `attention`, in tiles, with gradients to q, k and v."""
    assert not causal or q.shape[2] == k.shape[2], "a causal query is one of the keys"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _TiledAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)), scale, causal)  # type: ignore[no-untyped-call]
    return out.view(q.shape)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        q, k, v = (q * scale).contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        scores = _buffer(q, k)
        for heads, rows, keys in _tiles(q, k, causal):
            P = _probabilities(q[heads, rows], k[heads, keys], scores, causal)
            torch.bmm(P, v[heads, keys], out=out[heads, rows])
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        d_out = d_out.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scores, gradients = _buffer(q, k), _buffer(q, k)
        for heads, rows, keys in _tiles(q, k, ctx.causal):
            tile, d_tile = q[heads, rows], d_out[heads, rows]
            P = _probabilities(tile, k[heads, keys], scores, ctx.causal)
            dv[heads, keys].baddbmm_(P.mT, d_tile)
            dP = torch.bmm(d_tile, v[heads, keys].mT, out=_part(gradients, P.shape))
            dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
            torch.bmm(dS, k[heads, keys], out=dq[heads, rows])
            dk[heads, keys].baddbmm_(dS.mT, tile)
        return dq.mul_(ctx.scale), dk, dv, None, None


def _tiles(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Which heads, which of their queries and which keys are computed at a time: several whole heads, or a part of one."""
    (num_heads, num_rows, _), num_keys = q.shape, k.shape[1]
    heads = max(1, TILE_SCORES // (num_rows * num_keys))
    rows = min(num_rows, max(1, TILE_SCORES // num_keys))
    if causal:
        rows = min(rows, CAUSAL_ROWS)
    for first in range(0, num_heads, heads):
        for row in range(0, num_rows, rows):
            seen = min(row + rows, num_rows) if causal else num_keys
            yield slice(first, first + heads), slice(row, row + rows), slice(0, seen)


def _buffer(q: Tensor, k: Tensor) -> Tensor:
    """Room for the scores of the largest tile."""
    return q.new_empty(max(min(TILE_SCORES, q[..., 0].numel() * k.shape[1]), k.shape[1]))


def _part(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a shape at the buffer's beginning."""
    return buffer[: math.prod(shape)].view(shape)


def _probabilities(tile: Tensor, k: Tensor, buffer: Tensor, causal: bool) -> Tensor:
    """[g,n,m] share of every key in every query's answer, in the buffer; where `causal`, the last key is the last query."""
    num_rows = tile.shape[1]
    scores = torch.bmm(tile, k.mT, out=_part(buffer, (len(tile), num_rows, k.shape[1])))
    if causal:
        unseen = torch.ones(num_rows, num_rows, dtype=torch.bool, device=tile.device).triu_(1)
        scores[..., -num_rows:].masked_fill_(unseen, -torch.inf)
    return torch.softmax(scores, -1, out=scores)
