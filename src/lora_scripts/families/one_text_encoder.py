"""What Stable Diffusion 1 and 2 have in common beyond SDXL: one text encoder, read behind its final norm.

Legend for shapes: B batch, L tokens (77), D width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_scripts.families.latent_diffusion import CLIP_ATTENTION, UNET_ATTENTION, LatentDiffusion
from lora_scripts.families.protocol import Batch, Encoder
from lora_scripts.models.text_encoding import read_normed

__all__ = ["OneTextEncoderDiffusion"]


class OneTextEncoderDiffusion(LatentDiffusion):
    """A U-Net conditioned on the embeddings of one CLIP text encoder."""

    default_targets: ClassVar[Mapping[str, Sequence[str]]] = {"unet": UNET_ATTENTION, "text_encoder": CLIP_ATTENTION}

    def text_encoders(self) -> Sequence[Encoder]:
        name = f"{self._source.fingerprint}/clip/{self._parts.text_encoder.dtype}/skip{self._config.clip_skip}"
        return [Encoder("text", "caption", name, self._encode_captions, 32)]

    @torch.no_grad()
    def _encode_captions(self, captions: Sequence[Any]) -> list[dict[str, Tensor]]:
        """{"prompt_embeds": [L,D]} in the text encoder's number format."""
        return [{"prompt_embeds": embeds} for embeds in self.embed(self.tokens(captions)).cpu()]

    def embed(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Text embeddings [B,L,D] of what `tokens` gives."""
        self._parts.read_rest("text_encoder")
        encoder = self._parts.text_encoder
        return read_normed(encoder, tokens["input_ids"].to(encoder.device), self._config.clip_skip).embeds

    def conditions(self, batch: Batch) -> Mapping[str, Any]:
        trained = self._config.train_text_encoder
        prompt_embeds = self.embed(self._tokens_of(batch)) if trained else batch.tensors["prompt_embeds"]
        return {"encoder_hidden_states": prompt_embeds.to(self._unet_dtype)}
