"""The autoencoder of Stable Diffusion 1, 2 and SDXL: pictures to latents and back.

Source: Rombach et al. 2022, arXiv 2112.10752, section 3.1 and appendix G. Configuration and names as diffusers' AutoencoderKL.

Legend for shapes: B batch, C channels, H W height and width in pixels, h w in latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scripts.models.networks.convolutions import Downsample2D, ResnetBlock2D, Upsample2D
from lora_scripts.models.networks.network import ModelConfig, Network

__all__ = ["AutoencoderKL", "Decoded", "Encoded", "Gaussian"]

FREE: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
}
FIXED: Mapping[str, Any] = {
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
EPS = 1e-6


class Gaussian(NamedTuple):
    """The distribution of a picture's latents: mean and standard deviation, [B,C,h,w]."""

    mean: Tensor
    std: Tensor

    def mode(self) -> Tensor:
        """The most likely latents."""
        return self.mean


class Encoded(NamedTuple):
    """What `encode` returns."""

    latent_dist: Gaussian


class Decoded(NamedTuple):
    """What `decode` returns: [B,3,H,W]."""

    sample: Tensor


class AutoencoderKL(Network):
    """Encoder and decoder."""

    free, fixed = FREE, FIXED

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        channels = self.config.latent_channels
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @classmethod
    def can_be(cls, config: Mapping[str, Any]) -> bool:
        whole = {**FREE, **config}
        return (
            super().can_be(config)
            and {*whole["down_block_types"]} == {"DownEncoderBlock2D"}
            and {*whole["up_block_types"]} == {"UpDecoderBlock2D"}
            and len(whole["down_block_types"]) == len(whole["up_block_types"]) == len(whole["block_out_channels"])
        )

    def encode(self, x: Tensor) -> Encoded:
        """[B,3,H,W] in [-1,1] to the distribution of latents, not scaled."""
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Encoded(Gaussian(mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))))

    def decode(self, z: Tensor, return_dict: bool = True) -> Decoded:
        """Latents, not scaled, to pixels; the first entry and `sample` are the same either way."""
        return Decoded(self.decoder(self.post_quant_conv(z)))


class Encoder(nn.Module):
    """[B,3,H,W] to [B,2C,h,w]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        before = widths[0]
        for level, width in enumerate(widths):
            resize = Downsample2D(width, padding=0) if level < len(widths) - 1 else None
            self.down_blocks.append(_Level(before, width, config.layers_per_block, groups, downsampler=resize))
            before = width
        self.mid_block = _Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return out


class Decoder(nn.Module):
    """[B,C,h,w] to [B,3,H,W]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        before = widths[-1]
        for level in reversed(range(len(widths))):
            resize = Upsample2D(widths[level]) if level else None
            self.up_blocks.append(_Level(before, widths[level], config.layers_per_block + 1, groups, upsampler=resize))
            before = widths[level]
        self.mid_block = _Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class _Level(nn.Module):
    """Residual blocks of one resolution, then the way to the next."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        num_layers: int,
        groups: int,
        *,
        downsampler: Downsample2D | None = None,
        upsampler: Upsample2D | None = None,
    ) -> None:
        super().__init__()
        inputs = [channels, *[out_channels] * (num_layers - 1)]
        self.resnets = nn.ModuleList([ResnetBlock2D(width, out_channels, None, groups, EPS) for width in inputs])
        self.downsamplers = nn.ModuleList([downsampler] if downsampler is not None else [])
        self.upsamplers = nn.ModuleList([upsampler] if upsampler is not None else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class _Middle(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([_OneHead(channels, groups)])
        self.resnets = nn.ModuleList([ResnetBlock2D(channels, channels, None, groups, EPS) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return out


class _OneHead(nn.Module):
    """Attention of every latent to all others, beside a short cut."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, for its name: to_out.0

    def forward(self, picture: Tensor) -> Tensor:
        x = self.group_norm(picture.flatten(2)).transpose(1, 2)
        q, k, v = (layer(x)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        mixed = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        out: Tensor = mixed.transpose(1, 2).reshape(picture.shape) + picture
        return out
