"""How the U-Net's attention layers call their projections and `tiled_attention.attention`.

Source: diffusers, `AttnProcessor2_0`, of which this is the part that the U-Nets of Stable Diffusion 1, 2 and SDXL use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.models.tiled_attention import attention

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention
    from torch import Tensor

__all__ = ["use_tiled_attention"]


def use_tiled_attention(unet: UNet2DConditionModel) -> None:
    """Lets the attention layers of a U-Net of diffusers compute in tiles where that is faster, as our own ones do."""
    for block in unet.modules():
        if type(block).__name__ == "BasicTransformerBlock" and hasattr(block.attn1, "set_processor"):
            block.attn1.set_processor(_Processor())
            block.attn2.set_processor(_Processor())


class _Processor:
    """Projections, attention, projection: hidden_states [B,N,D], encoder_hidden_states [B,M,E] or None."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None, "captions are padded, not masked, in Stable Diffusion"
        keys_from = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        inputs = (attn.to_q, hidden_states), (attn.to_k, keys_from), (attn.to_v, keys_from)
        q, k, v = (projection(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for projection, x in inputs)
        mixed = attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[1](attn.to_out[0](mixed))
        return out
