"""The U-Net's transformers: every latent looks at all others, and at the caption.

Source: Rombach et al. 2022, arXiv 2112.10752, section 3.3 and appendix E.2.1; names as in diffusers.

Legend for shapes: B batch, C channels, h w latent height and width, N latents (h w), M tokens of the caption.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_scripts.models.tiled_attention import attention

__all__ = ["Attention", "BasicTransformerBlock", "Transformer2DModel"]


class Attention(nn.Module):
    """Multi-head attention of C channels to a sequence of `context_width` channels.

    Args:
        context_width: of what keys and values are made from; None where that is the input itself.
    """

    def __init__(self, channels: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_width or channels, channels, bias=False)
        self.to_v = nn.Linear(context_width or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, for its name: to_out.0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[B,N,C], and [B,M,context_width] unless the input looks at itself, to [B,N,C]."""
        keys_from = x if context is None else context
        inputs = (self.to_q, x), (self.to_k, keys_from), (self.to_v, keys_from)
        q, k, v = (layer(read).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, read in inputs)
        out: Tensor = self.to_out[0](attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class GEGLU(nn.Module):
    """A linear layer of which one half gates the other. Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = value * F.gelu(gate)
        return out


class FeedForward(nn.Module):
    """Four times as wide within, and gated; the place between its layers is that of a dropout that no such model has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[2](self.net[0](x))
        return out


class BasicTransformerBlock(nn.Module):
    """Attention to itself, attention to the caption, feed-forward; each beside a short cut and behind a norm."""

    def __init__(self, channels: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(channels), Attention(channels, heads)
        self.norm2, self.attn2 = nn.LayerNorm(channels), Attention(channels, heads, context_width)
        self.norm3, self.ff = nn.LayerNorm(channels), FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B,N,C] and [B,M,context_width] to [B,N,C]."""
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        out: Tensor = self.ff(self.norm3(x)) + x
        return out


class Transformer2DModel(nn.Module):
    """Transformer blocks on a picture, beside a short cut.

    Args:
        num_blocks: transformer blocks, one after the other.
        linear: whether the projections around them are linear layers; otherwise 1x1 convolutions, which compute the same.
    """

    def __init__(
        self, channels: int, heads: int, num_blocks: int, context_width: int, groups: int, linear: bool
    ) -> None:
        super().__init__()

        def projection() -> nn.Module:
            return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

        self.gradient_checkpointing = False
        self._linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(channels, heads, context_width) for _ in range(num_blocks)]
        )
        self.proj_out = projection()

    def forward(self, picture: Tensor, context: Tensor) -> Tensor:
        """[B,C,h,w] and [B,M,context_width] to [B,C,h,w]."""
        size = picture.shape[-2:]
        x = self.norm(picture)
        x = self.proj_in(_as_sequence(x)) if self._linear else _as_sequence(self.proj_in(x))
        for block in self.transformer_blocks:
            x = run(block, x, context, again=self.gradient_checkpointing)
        x = _as_picture(self.proj_out(x), size) if self._linear else self.proj_out(_as_picture(x, size))
        return x + picture


def run(module: nn.Module, *inputs: Tensor, again: bool) -> Any:
    """The module's output; `again` computes its activations anew in the backward pass instead of keeping them."""
    if again and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


def _as_sequence(picture: Tensor) -> Tensor:
    batch, channels = picture.shape[:2]
    return picture.permute(0, 2, 3, 1).reshape(batch, -1, channels)


def _as_picture(x: Tensor, size: torch.Size) -> Tensor:
    # The channels of a pixel stay side by side, as they are; copied into planes, they would only be turned back.
    return x.reshape(len(x), *size, -1).permute(0, 3, 1, 2)
