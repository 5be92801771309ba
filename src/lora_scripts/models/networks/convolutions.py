"""What both networks are made of: residual blocks and changes of resolution.

Legend for shapes: B batch, C channels, h w height and width, E width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Downsample2D", "ResnetBlock2D", "Upsample2D"]

LARGEST_INDEX = 2**31
"""Elements that torch's kernel for nearest neighbours in channels-last memory can count."""


class ResnetBlock2D(nn.Module):
    """Two convolutions beside a short cut; the noise level, where there is one, is added between them.

    Args:
        time_width: E; None for a network without noise levels.
    Source: Ho et al. 2020, arXiv 2006.11239, appendix B; names as in diffusers.
    """

    def __init__(self, channels: int, out_channels: int, time_width: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_width is None else nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """[B,C,h,w] and [B,E] to [B,out,h,w]."""
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            assert time is not None
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h


class Downsample2D(nn.Module):
    """Half the resolution, by a convolution.

    Args:
        padding: on all sides; 0 pads right and below only, as the autoencoder does.
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self._one_sided = padding == 0
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] to [B,C,h/2,w/2]."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self._one_sided else x)
        return out


class Upsample2D(nn.Module):
    """Every pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """[B,C,h,w] to [B,C,2h,2w], or to `size` where a resolution is not even."""
        if x.shape[0] >= 64 or x.numel() * 4 > LARGEST_INDEX:
            x = x.contiguous()  # the kernel for channels-last memory fails there
        x = F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=tuple(size))
        out: Tensor = self.conv(x)
        return out
