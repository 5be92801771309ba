"""Causal attention within texts that lie one behind the other in one row: no padding, and no text sees another.

Registered with transformers as an attention of its own, so every model that uses its attention interface can be run on
packed rows. The lengths of the texts reach it as a keyword argument of the model's `forward`.

Legend for shapes: H heads, K key and value heads, T tokens of the row, L tokens of one text, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_scripts.models.tiled_attention import attention

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["NAME", "Segments", "keep_out_of_graphs", "segment_attention", "segments_at_work"]

NAME = "lora_scripts_segments"


@dataclass(frozen=True, eq=False)
class Segments:
    """Lengths of the texts of a row. An object of its own, because a list would make torch.compile begin anew for other lengths."""

    lengths: Sequence[int]


@contextmanager
def segments_at_work(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model's layers attend by `segment_attention`, and build no mask."""
    _register()
    configs = [model.config] + [c for c in (getattr(model.config, "text_config", None),) if c is not None]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """[1,T,H,D] attention of each text to itself, causal.

    Args:
        query, key, value: [1,H,T,D] and [1,K,T,D].
        segment_lengths: L of every text, in order; their sum is T.
        sliding_window: tokens that each sees at most, itself included; None for all before it.
        softcap: as Gemma 2 squeezes its scores.
    Raises:
        ValueError: the model attends in a way that is not known here (sinks, position biases).
    """
    strange = [name for name in ("s_aux", "position_bias") if unused.get(name) is not None]
    if strange:
        raise ValueError(f"attention with {strange[0]} is not known here")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    lengths = list(segment_lengths.lengths)
    parts = zip(*(torch.split(part, lengths, dim=2) for part in (query, key, value)), strict=True)
    out = [_attend(q, k, v, scaling, sliding_window, softcap) for q, k, v in parts]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    length = q.shape[2]
    if softcap is None and (window is None or length <= window):
        return attention(q, k, v, scale=scaling, causal=True)
    place = torch.arange(length, device=q.device)
    distance = place[:, None] - place[None, :]
    seen = (distance >= 0) & (distance < (length if window is None else window))
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling)
    scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    return torch.softmax(scores.masked_fill(~seen, -torch.inf).float(), dim=-1).to(q.dtype) @ v


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _at_work)


_at_work = segment_attention


def keep_out_of_graphs() -> None:
    """Compiled layers call the attention as it is from now on: how many texts a row has differs from pass to pass."""
    global _at_work
    if _at_work is segment_attention:
        _at_work = torch.compiler.disable(segment_attention)  # type: ignore[no-untyped-call]
