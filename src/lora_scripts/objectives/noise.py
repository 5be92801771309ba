"""Other noise than plain normal noise: what a denoiser trained on it learns better.

Legend for shapes: B batch, C channels, h w latent height and width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lora_scripts.training.draws import Draws

__all__ = ["offset_noise", "pyramid_noise"]


def offset_noise(noise: Tensor, offsets: Tensor, strength: float) -> Tensor:
    """Noise [B,C,h,w] whose channels are each shifted as a whole, so that very dark and very bright can be learned.

    Args:
        offsets: [B,C,1,1] standard normal.
        strength: about 0.03 to 0.1; 0 returns the noise as it is.
    Source: Guttenberg 2023, "Diffusion with offset noise"; as in diffusers' training examples.
    """
    return noise if strength == 0 else noise + strength * offsets.to(noise)


def pyramid_noise(noise: Tensor, draws: Draws, keys: Sequence[str], iterations: int, discount: float) -> Tensor:
    """Noise [B,C,h,w] with ever coarser noise on it, at unit spread: large shapes and tones are learnt as well as details.

    Level i is drawn r^i times smaller, with r drawn anew from 2 ... 4 for each, enlarged and weighed by discount^i. Each
    picture has its own sizes and is brought back to unit spread by itself, so it does not depend on its batch mates, where
    the implementations named below share both over a batch.

    Args:
        noise: [B,C,h,w] on the CPU.
        iterations: levels at most; a level of a single row or column is the last one.
        discount: 0 to 1; the larger, the more the coarse levels count.
    Source: Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training"; as kohya's sd-scripts
        (`--multires_noise_iterations`, `--multires_noise_discount`).
    """
    height, width = noise.shape[-2:]
    summed = noise.clone()
    for picture, key in zip(summed, keys, strict=True):
        for level in range(iterations):
            ratio = 2.0 + 2.0 * draws.fraction(key, f"pyramid size {level}")
            size = max(1, int(height / ratio**level)), max(1, int(width / ratio**level))
            coarse = draws.normal([key], (noise.shape[1], *size), f"pyramid {level}")
            enlarged = F.interpolate(coarse, size=(height, width), mode="bilinear")
            picture.add_(enlarged[0], alpha=discount**level)
            if 1 in size:
                break
    return summed / torch.std(summed, dim=(1, 2, 3), keepdim=True)
