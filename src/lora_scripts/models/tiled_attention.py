"""Attention on a CPU, in tiles that stay in its cache.

torch's own kernel for a CPU (`scaled_dot_product_attention`) cuts heads of 40 to 160 columns into products too small for the
processor's bfloat16 instructions: half of a Stable Diffusion step went there. Here the scores of a tile of queries with all
keys are one product, and what follows runs over what still lies in the cache. The backward pass computes the scores again, so
nothing of the size queries x keys is kept, unless all of a layer is a single tile.

A softmax looks for the largest score, takes exponentials and divides by their sum. Here powers of two are taken as the scores
are, in one pass; the product with the values adds them up too, in columns of ones, and the result is divided. Only where a sum
leaves the range of numbers are they taken again less the largest. In the backward pass the gradient is divided instead, and the
share that all keys have in common is taken off inside the product, by two more columns.

Sums over products are taken in float32; a score is rounded to the number format of its inputs, as in every attention that is
written out (diffusers' and sd-scripts' plain one). In float32 the products of large tiles go through oneDNN (see
`frozen_linear`), in half precision torch takes it by itself.

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
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from lora_scripts.models.frozen_linear import HAS_ONEDNN, product

__all__ = ["attention", "tiled_attention"]

TILE_SCORES = 2**21
"""Scores at a time: 4 MB in bfloat16, and twice that in the backward pass. Half as many are no faster, twice as many slower."""

LARGE_PRODUCT = 2**22
"""Multiplications of one head from which on a call of oneDNN for each pays in float32."""

LOG2_E = math.log2(math.e)

LEAST_SUM = 2.0**-60
"""Of the exponentials of one query, and the reciprocal of the largest: beyond, they are taken again with the largest being 1."""

COUNTERS = 8
"""Columns that count the exponentials; with them heads of 40 columns are multiplied even faster."""

FULL_ROWS = 8
"""Without a gradient, queries are filled up to a multiple of that with rows of nought: oneDNN cuts rows into equal blocks, and 577 of
them (a picture of 384 px in patches of 16), a prime, take it half as long again as 584."""

FEWEST_FILLED = 128
"""Queries from which on filling up pays."""

CAUSAL_ROWS = 256
"""Queries at a time where each sees only what came before it: fewer leave out more of what is not seen, and fill a product less."""


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """softmax(scale q k^T) v, [B,H,N,D], by whichever way is faster: q [B,H,N,D], k and v [B,H,M,D].

    Args:
        scale: 1 / sqrt D where it is None.
        causal: query i sees the keys 0 ... i alone; N = M.
    """
    if q.device.type == "cpu" and not torch.compiler.is_compiling() and _tiles_are_faster(q, k):
        return tiled_attention(q, k, v, scale=scale, causal=causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal and q.shape[2] > 1, scale=scale)


def _tiles_are_faster(q: Tensor, k: Tensor) -> bool:
    if q.dtype is torch.float32:
        return _is_large_product(q[0, 0], k.shape[2])
    # With AMX torch's own kernel packs its products for the processor's tiles.
    return q.dtype is torch.bfloat16 and not torch.cpu._is_amx_tile_supported()


def _is_large_product(a: Tensor, num_columns: int) -> bool:
    """Whether oneDNN is asked for the product of a matrix [n,d], in float32, with one of so many columns."""
    return a.dtype is torch.float32 and HAS_ONEDNN and a.numel() * num_columns >= LARGE_PRODUCT


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """As `attention`, in tiles, with gradients to q, k and v; in memory the result lies as [B,N,H,D], so heads join as a view."""
    assert not causal or q.shape[2] == k.shape[2], "a causal query is one of the keys"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_rows = q.shape[2]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not recorded and not causal and _is_large_product(q[0, 0], k.shape[2]):
        out = _head_by_head(q, k, v, scale)
        if out is not None:
            return out
    if num_rows % FULL_ROWS and num_rows >= FEWEST_FILLED and not causal and not recorded:
        q = F.pad(q, (0, 0, 0, -num_rows % FULL_ROWS))
    out = _TiledAttention.apply(q, k, v, scale, causal)  # type: ignore[no-untyped-call]
    return out[:, :, :num_rows]  # type: ignore[no-any-return]


def _head_by_head(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """`tiled_attention` in float32 without a gradient; None where a sum leaves the range of numbers.

    What oneDNN returns is a tensor of its own. Here it is the tile, so no score is copied: the 24 layers of a picture in BLIP
    large take 112 instead of 144 ms, measured in turns.
    """
    batch, num_heads, num_rows, width = q.shape
    queries = q.new_empty(num_heads, num_rows, width)
    out, sums = _heads_inside(q), q.new_empty(batch, num_heads, num_rows, 1)
    for picture in range(batch):
        torch.mul(q[picture], scale * LOG2_E, out=queries)
        keys, values = k[picture].contiguous(), v[picture].contiguous()
        for head in range(num_heads):
            E = product(queries[head], keys[head]).exp2_()
            own_sums = torch.sum(E, -1, keepdim=True, out=sums[picture, head])
            torch.div(product(E, values[head].mT), own_sums, out=out[picture, head])
    return out if _in_range(sums) else None


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        out, sums, shifts = _heads_inside(q), q.new_empty(q.shape[:3], dtype=_summed_in(q)), []
        scores, counters = _buffer(q, k), _counters(k)
        for part in _parts(q, k):
            own_q, own_k = _own(q, part) * (scale * LOG2_E), _own(k, part)
            own_v = torch.cat([v[part].flatten(0, 1), counters.expand(len(own_k), -1, -1)], -1)
            own_out = own_q.new_empty(*own_q.shape[:2], own_v.shape[-1])
            for shift in (False, True):
                for rows, keys in _tiles(q, k, causal):
                    E = _exponentials(own_q[:, rows], own_k[:, keys], scores, causal, shift)
                    _multiply(E, own_v[:, keys], own_out[:, rows])
                own_sums = own_out[..., -COUNTERS:].sum(-1, keepdim=True, dtype=sums.dtype)
                if _in_range(own_sums):
                    break
            sums[part].copy_(own_sums.view(sums[part].shape))
            out[part].copy_((own_out[..., :-COUNTERS] / own_sums).view(out[part].shape))
            shifts.append(shift)
        ctx.save_for_backward(q, k, v, out, sums, E if E.numel() == q[..., 0].numel() * k.shape[2] else None)
        ctx.scale, ctx.causal, ctx.shifts = scale, causal, shifts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, sums, kept = ctx.saved_tensors
        dq, dk, dv = (_heads_inside(x) for x in (q, k, v))
        scores, gradients = kept if kept is not None else _buffer(q, k), _buffer(q, k)
        for part, shift in zip(_parts(q, k), ctx.shifts, strict=True):
            own_q, own_k = _own(q, part) * (ctx.scale * LOG2_E), _own(k, part)
            own_v = F.pad(_own(v, part), (0, 2), value=1.0)
            own_d = _own(d_out, part) / _own(sums, part).unsqueeze(-1)
            # What a query's gradient has in common over all keys, in two columns, because one would round it.
            common = -(own_d * _own(out, part)).sum(-1, keepdim=True)
            own_d, high = own_d.to(q.dtype), common.to(q.dtype)
            own_d = torch.cat([own_d, high, (common - high).to(q.dtype)], -1)
            own_dq, own_dk, own_dv = torch.empty_like(own_q), torch.zeros_like(own_k), torch.zeros_like(own_k)
            for rows, keys in _tiles(q, k, ctx.causal):
                tile, d_tile = own_q[:, rows], own_d[:, rows]
                E = _exponentials(tile, own_k[:, keys], scores, ctx.causal, shift) if kept is None else kept
                _multiply(E.mT, d_tile[..., :-2], own_dv[:, keys], add=True)
                dS = _multiply(d_tile, own_v[:, keys].mT, _room(gradients, E.shape)).mul_(E)
                _multiply(dS, own_k[:, keys], own_dq[:, rows])
                _multiply(dS.mT, tile, own_dk[:, keys], add=True)
            for gradient, own, factor in ((dq, own_dq, ctx.scale), (dk, own_dk, 1 / LOG2_E), (dv, own_dv, 1.0)):
                gradient[part].copy_(own.mul_(factor).view(gradient[part].shape))
        return dq, dk, dv, None, None


def _summed_in(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _counters(k: Tensor) -> Tensor:
    """[M,8] ones that a product with the values also adds up: each of an eighth of the keys, so that rounding evens out."""
    columns = torch.arange(k.shape[2]) * COUNTERS // k.shape[2]
    return (columns[:, None] == torch.arange(COUNTERS)).to(k.dtype)


def _in_range(sums: Tensor) -> bool:
    """Whether sums and their reciprocals, times a small gradient, are numbers that the format can hold."""
    if isinstance(sums, FakeTensor):  # a pass that is planned, not computed
        return True
    least, most = torch.aminmax(sums)
    return bool((least > LEAST_SUM) & (most < 1 / LEAST_SUM))  # a single decision, which a recorded pass can check


def _parts(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Which heads of which pictures are computed at a time: those of several pictures, several of one picture, or one."""
    batch, num_heads = q.shape[:2]
    heads = max(1, TILE_SCORES // (q.shape[2] * k.shape[2]))
    pictures, heads = max(1, heads // num_heads), min(heads, num_heads)
    for first in range(0, batch, pictures):
        for head in range(0, num_heads, heads):
            yield slice(first, first + pictures), slice(head, head + heads)


def _tiles(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Which queries and which keys of a part are computed at a time."""
    num_rows, num_keys = q.shape[2], k.shape[2]
    rows = min(num_rows, max(1, TILE_SCORES // num_keys))
    if causal:
        rows = min(rows, CAUSAL_ROWS)
    for row in range(0, num_rows, rows):
        yield slice(row, row + rows), slice(0, min(row + rows, num_rows) if causal else num_keys)


def _own(x: Tensor, part: tuple[slice, slice]) -> Tensor:
    """[g,N,D] of the part's heads, one behind the other: a copy that stays in the cache, unless they lie so."""
    return x[part].flatten(0, 1).contiguous()


def _heads_inside(x: Tensor) -> Tensor:
    """Room for [B,H,N,D] that lies in memory as [B,N,H,D]."""
    batch, num_heads, num_rows, width = x.shape
    return x.new_empty(batch, num_rows, num_heads, width).transpose(1, 2)


def _buffer(q: Tensor, k: Tensor) -> Tensor:
    """Room for the scores of the largest tile."""
    return q.new_empty(max(min(TILE_SCORES, q[..., 0].numel() * k.shape[2]), k.shape[2]))


def _room(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a shape at the buffer's beginning."""
    return buffer[: math.prod(shape)].view(shape)


def _exponentials(tile: Tensor, k: Tensor, buffer: Tensor, causal: bool, shift: bool) -> Tensor:
    """[g,n,m] 2^(q k), in the buffer, not divided by the sum over the keys; where `causal`, the last key is the last query.

    Args:
        shift: let the largest of each query be 1.
    """
    num_rows = tile.shape[1]
    scores = _multiply(tile, k.mT, _room(buffer, (len(tile), num_rows, k.shape[1])))
    if causal:
        unseen = torch.ones(num_rows, num_rows, dtype=torch.bool, device=tile.device).triu_(1)
        scores[..., -num_rows:].masked_fill_(unseen, -torch.inf)
    if shift:
        scores.sub_(scores.amax(-1, keepdim=True))
    return scores.exp2_()


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """[g,n,m] `out`, which becomes a b, or gets it added: a [g,n,d], b [g,d,m]."""
    if _is_large_product(a[0], b.shape[2]):
        for place, left, right in zip(out, a, b, strict=True):
            # Of its two factors oneDNN takes the second as it lies, but copies the first where it is transposed.
            both = product(left, right.mT) if left.stride(-1) == 1 else product(right.mT, left).mT
            place.add_(both) if add else place.copy_(both)
        return out
    return out.baddbmm_(a, b) if add else torch.bmm(a, b, out=out)
