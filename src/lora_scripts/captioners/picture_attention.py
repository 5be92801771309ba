"""Cross-attention of captions to the vision states of their pictures: with projected keys and values, or with none.

A score is q (W_k s) = (W_k^T q) s, and a mix of values W_v (sum of p s): the projections can stand on the side of the query, which is one
token, instead of on that of a picture's 577 states. Then there are no keys and values to project and to keep for each layer: all
layers read the same states. It pays for short captions; per head and token it multiplies as if a head were as wide as a state. A
bias of the keys adds the same to all scores of a query, so it falls away in the softmax; that of the values comes out as it is.

Legend: B pictures, K candidates per picture, N vision states, S width of a vision state, D width, H heads.
Source: Li et al. 2022, arXiv 2201.12086; the order of the products as in DeepSeek-AI 2024, arXiv 2405.04434, section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_scripts.models.frozen_linear import HAS_ONEDNN
from lora_scripts.models.packed_linear import packed, packed_product, plain_weight

__all__ = ["PictureAttention", "attend", "picture_attention"]


class PictureAttention(Protocol):
    """The states of a batch of pictures, as the decoder's layers ask them."""

    def mix(self, index: int, query: Tensor) -> Tensor:
        """[B,K,D] what layer `index` takes from the pictures for its queries, [B,K,D]."""
        ...

    def keep(self, pictures: Tensor) -> None:
        """Drop the pictures whose entry in [B] `pictures` is false."""
        ...


def picture_attention(attentions: Sequence[Any], states: Tensor, num_queries: int) -> PictureAttention:
    """The faster way for the pictures of a batch.

    Args:
        attentions: of each layer, with its linear layers `key` and `value`.
        states: [B,N,S].
        num_queries: of a picture, tokens times candidates.
    """
    packs = HAS_ONEDNN and states.device.type == "cpu" and states.dtype in (torch.float32, torch.bfloat16)
    fewer_products = num_queries * attentions[0].num_attention_heads <= attentions[0].all_head_size
    return (States if packs and fewer_products else KeysAndValues)(attentions, states)


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[B,H,K,D/H] mix of `values` for a few queries.

    Written out because the fused kernel is made for many queries: for one to five, in bf16 on a CPU, it measured two to
    nine times slower.
    """
    weights = torch.matmul(query * query.shape[-1] ** -0.5, keys.transpose(-1, -2)).softmax(dim=-1)
    return torch.matmul(weights, values)


class KeysAndValues:
    """Keys and values of each layer, projected once."""

    def __init__(self, attentions: Sequence[Any], states: Tensor) -> None:
        self._num_heads: int = attentions[0].num_attention_heads
        self._keys = [self._heads(layer.key(states)) for layer in attentions]
        self._values = [self._heads(layer.value(states)) for layer in attentions]

    def mix(self, index: int, query: Tensor) -> Tensor:
        query = self._heads(query)
        return attend(query, self._keys[index], self._values[index]).transpose(1, 2).flatten(2)

    def keep(self, pictures: Tensor) -> None:
        for store in (self._keys, self._values):
            store[:] = [tensor[pictures] for tensor in store]

    def _heads(self, states: Tensor) -> Tensor:
        """[B,L,D] to [B,H,L,D/H]."""
        return states.reshape(*states.shape[:2], self._num_heads, -1).transpose(1, 2).contiguous()


class States:
    """The states alone, packed for both products; the projections are applied to the queries and to what comes out."""

    def __init__(self, attentions: Sequence[Any], states: Tensor) -> None:
        heads = attentions[0].num_attention_heads
        shape = (heads, attentions[0].all_head_size // heads, states.shape[-1])
        self._to_states = [plain_weight(layer.key).view(shape) * shape[1] ** -0.5 for layer in attentions]
        self._from_states = [plain_weight(layer.value).view(shape).mT for layer in attentions]
        self._biases = [layer.value.bias for layer in attentions]
        self._by_state = [packed(picture) for picture in states]
        self._by_column = [packed(picture.t()) for picture in states]

    def mix(self, index: int, query: Tensor) -> Tensor:
        batch, num_candidates, _ = query.shape
        to_states, from_states = self._to_states[index], self._from_states[index]  # [H,D/H,S] and [H,S,D/H]
        heads = len(to_states)
        query = query.reshape(batch * num_candidates, heads, -1).transpose(0, 1)
        asked = torch.bmm(query, to_states).view(heads, batch, num_candidates, -1).transpose(0, 1).flatten(1, 2)
        # One product after the other for all pictures, not both for each: so half of the packed states are in use at a time.
        shares = self._times(asked, self._by_state).softmax(-1)
        mixed = self._times(shares, self._by_column)
        mixed = mixed.view(batch, heads, num_candidates, -1).transpose(0, 1).flatten(1, 2)
        out = torch.bmm(mixed, from_states).transpose(0, 1).reshape(batch, num_candidates, -1)
        return out if self._biases[index] is None else out + self._biases[index]

    def keep(self, pictures: Tensor) -> None:
        for store in (self._by_state, self._by_column):
            store[:] = [each for each, kept in zip(store, pictures.tolist(), strict=True) if kept]

    @staticmethod
    def _times(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """[B,HK,out] products of each picture's [HK,in] with its own packed [out,in]."""
        return torch.stack([packed_product(rows, weight) for rows, weight in zip(x, weights, strict=True)])
