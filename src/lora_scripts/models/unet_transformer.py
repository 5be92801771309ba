"""The transformers of diffusers' U-Net, computed with less copying.

Source: diffusers, `Transformer2DModel`, of which this is the part that the U-Nets of Stable Diffusion 1, 2 and SDXL use.

Legend for shapes: B batch, N tokens or pixels, D columns, C channels, h w height and width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers.models.transformers.transformer_2d import Transformer2DModel

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["PixelTransformer", "use_pixel_transformers"]


class PixelTransformer(Transformer2DModel):  # type: ignore[misc]
    """Hands its tokens on as pixels whose channels lie side by side, as they are, where diffusers copies them into planes."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        """[B,C,h,w] from tokens [B,N,D]."""
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        pixels = hidden_states.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
        out: Tensor = (pixels if self.use_linear_projection else self.proj_out(pixels)) + residual
        return out


def use_pixel_transformers(unet: nn.Module) -> None:
    """Puts it in the place of diffusers' own; weights, names and configuration stay."""
    for module in unet.modules():
        if type(module) is Transformer2DModel:
            module.__class__ = PixelTransformer
