"""Other noise than plain normal noise: what a denoiser trained on it learns better.

Legend for shapes: B batch, C channels, h w latent height and width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["offset_noise"]


def offset_noise(noise: Tensor, offsets: Tensor, strength: float) -> Tensor:
    """Noise [B,C,h,w] whose channels are each shifted as a whole, so that very dark and very bright can be learned.

    Args:
        offsets: [B,C,1,1] standard normal.
        strength: about 0.03 to 0.1; 0 returns the noise as it is.
    Source: Guttenberg 2023, "Diffusion with offset noise"; as in diffusers' training examples.
    """
    return noise if strength == 0 else noise + strength * offsets.to(noise)
