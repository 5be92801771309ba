"""What is read of CLIP text encoders: the layer that a U-Net was trained with, and the pooled text.

Legend for shapes: B batch, L tokens (77), D width of the text encoder, P width of its projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ReadText", "TextStates", "checkpoint_layers", "read_normed", "read_penultimate"]


@dataclass(frozen=True)
class TextStates:
    """What a text encoder makes of token ids.

    Attributes:
        embeds: [B,L,D].
        pooled: [B,P] the whole text in one vector, projected; None where the encoder has no projection.
    """

    embeds: Tensor
    pooled: Tensor | None = None


ReadText: TypeAlias = "Callable[[Any, Tensor, int], TextStates]"
"""From a text encoder, token ids [B,L] on its device and clip_skip to what a family reads of it."""


def read_normed(encoder: Any, input_ids: Tensor, clip_skip: int) -> TextStates:
    """As Stable Diffusion 1 and 2 read: the last layer, or an earlier one, through the final norm.

    Args:
        clip_skip: 1 is the last layer, 2 the one before it.
    Source: AUTOMATIC1111/stable-diffusion-webui, `modules/sd_hijack_clip.py`.
    """
    if clip_skip == 1:
        return TextStates(encoder(input_ids).last_hidden_state)
    hidden = encoder(input_ids, output_hidden_states=True).hidden_states
    return TextStates(getattr(encoder, "text_model", encoder).final_layer_norm(hidden[-clip_skip]))


def read_penultimate(encoder: Any, input_ids: Tensor, clip_skip: int) -> TextStates:
    """As SDXL reads: the last layer but one, or an earlier one, without the final norm; pooled is the projected text.

    Args:
        clip_skip: 1 and 2 are the last layer but one: what model cards for SDXL call clip skip 2 is what the base model
            was trained with. 3 is the layer before it.
    Source: diffusers, `StableDiffusionXLPipeline.encode_prompt`.
    """
    answer = encoder(input_ids, output_hidden_states=True)
    return TextStates(answer.hidden_states[-max(2, clip_skip)], getattr(answer, "text_embeds", None))


def checkpoint_layers(encoder: nn.Module, on: bool) -> None:
    """Whether the backward pass computes the layers of a CLIP text encoder again rather than keeping what they hold."""
    from torch.utils.checkpoint import checkpoint

    from lora_scripts.models.networks.clip_text import CLIPEncoderLayer

    for layer in encoder.modules():
        if isinstance(layer, CLIPEncoderLayer):
            layer.gradient_checkpointing = on
        elif type(layer).__name__ == CLIPEncoderLayer.__name__:  # that of transformers
            own: Any = layer
            own._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            own.gradient_checkpointing = on
            own.training = on  # transformers asks for it; the modules below it stay in evaluation mode
