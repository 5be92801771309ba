"""Stable Diffusion XL and what was trained from it (Pony, Illustrious, NoobAI ...): two text encoders, a U-Net that is told
the size and crop of every picture.

Legend for shapes: B batch, L tokens (77), D width of both text encoders together (768 + 1280), P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lora_scripts.adapters.presets import BlockRoles
from lora_scripts.families.latent_diffusion import CLIP_ATTENTION, UNET_ATTENTION, LatentDiffusion
from lora_scripts.families.protocol import Batch, Encoder
from lora_scripts.models.text_encoding import checkpoint_layers, read_penultimate

if TYPE_CHECKING:
    from lora_scripts.data.buckets import Framing

__all__ = ["StableDiffusionXL"]


class StableDiffusionXL(LatentDiffusion):
    """Frozen SDXL parts and their training objective.

    An empty caption is encoded like any other, as in diffusers' training scripts; that a pipeline may put zeros in the place
    of an empty negative prompt is a matter of rendering (`sampling/conditions.py`).
    """

    name: ClassVar[str] = "sdxl"
    default_targets: ClassVar[Mapping[str, Sequence[str]]] = {
        "unet": UNET_ATTENTION,
        "text_encoder": CLIP_ATTENTION,
        "text_encoder_2": CLIP_ATTENTION,
    }
    block_roles: ClassVar[BlockRoles] = {
        "content": ("unet.down.2", "unet.mid", "unet.up.0.attentions.0"),
        "look": ("unet.down.1", "unet.up.0.attentions.1", "unet.up.0.attentions.2", "unet.up.1"),
    }

    @property
    def base_model_version(self) -> str:
        return "sdxl_base_v1-0"

    @property
    def modelspec_architecture(self) -> str:
        return "stable-diffusion-xl-v1-base/lora"

    # What is encoded ahead --------------------------------------------------------------------------------------------

    def text_encoders(self) -> Sequence[Encoder]:
        dtype, skip = self._parts.text_encoder.dtype, self._config.clip_skip
        name = f"{self._source.fingerprint}/clip+clip2+pooled/{dtype}/skip{max(2, skip)}"
        return [Encoder("text", "caption", name, self._encode_captions, 32)]

    def framing_encoders(self) -> Sequence[Encoder]:
        return [Encoder("time_ids", "fit", "", _time_ids)]

    @torch.no_grad()
    def _encode_captions(self, captions: Sequence[Any]) -> list[dict[str, Tensor]]:
        """{"prompt_embeds": [L,D], "pooled_prompt_embeds": [P]} in the text encoders' number format."""
        embeds, pooled = self.embed(self.tokens(captions))
        return [
            {"prompt_embeds": e, "pooled_prompt_embeds": p} for e, p in zip(embeds.cpu(), pooled.cpu(), strict=True)
        ]

    def embed(self, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embeddings of both text encoders [B,L,D] and the pooled text of the second [B,P], of what `tokens` gives.

        Source: diffusers, `StableDiffusionXLPipeline.encode_prompt`.
        """
        self._parts.read_rest("text_encoder")
        parts, skip = self._parts, self._config.clip_skip
        assert parts.text_encoder_2 is not None, "an SDXL model is loaded with both of its text encoders"
        device = parts.text_encoder.device
        first = read_penultimate(parts.text_encoder, tokens["input_ids"].to(device), skip)
        second = read_penultimate(parts.text_encoder_2, tokens["input_ids_2"].to(device), skip)
        assert second.pooled is not None, "the second text encoder has a projection"
        return torch.cat([first.embeds, second.embeds], dim=-1), second.pooled

    # What is trained --------------------------------------------------------------------------------------------------

    def set_checkpointing(self, on: bool) -> None:
        super().set_checkpointing(on)
        # The 32 wide layers of the second text encoder alone keep some 230 MB a picture.
        for encoder in self._parts.text_encoders:
            checkpoint_layers(encoder, on and self._config.train_text_encoder)

    def conditions(self, batch: Batch) -> Mapping[str, Any]:
        if self._config.train_text_encoder:
            prompt_embeds, pooled = self.embed(self._tokens_of(batch))
        else:
            prompt_embeds, pooled = batch.tensors["prompt_embeds"], batch.tensors["pooled_prompt_embeds"]
        dtype = self._unet_dtype
        # The sizes stay in float32: bfloat16 cannot tell 1023 from 1024.
        added = {"text_embeds": pooled.to(dtype), "time_ids": batch.tensors["add_time_ids"]}
        return {"encoder_hidden_states": prompt_embeds.to(dtype), "added_cond_kwargs": added}


def _time_ids(framings: Sequence[Framing]) -> list[dict[str, Tensor]]:
    """{"add_time_ids": [6]}: height and width of the file's picture, top and left of the crop in the scaled one, height and
    width of what is trained.

    Source: diffusers, `examples/text_to_image/train_text_to_image_lora_sdxl.py`, which mirrors before it crops; Podell et al.
    2023, arXiv 2307.01952, section 2.2.
    """
    rows = []
    for framing in framings:
        (width, height), (shown_width, shown_height) = framing.size, framing.fit.bucket
        ids = [height, width, framing.fit.top, framing.left, shown_height, shown_width]
        rows.append({"add_time_ids": torch.tensor(ids, dtype=torch.float32)})
    return rows
