"""Stable Diffusion 1.x: CLIP text encoder, U-Net with cross-attention, epsilon (or v) prediction.

Legend for shapes: B batch, h w latent height and width (pixels / 8), L tokens (77), D width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora_scripts.config import RunConfig
from lora_scripts.families.latent_diffusion import LatentDiffusion
from lora_scripts.families.protocol import Batch, Encoder, SampleRequest
from lora_scripts.models.outline import fill_with_nothing
from lora_scripts.models.stable_diffusion import load_stable_diffusion, outline_stable_diffusion

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_scripts.models.source import BaseModel

__all__ = ["StableDiffusion15"]


class StableDiffusion15(LatentDiffusion):
    """Frozen Stable Diffusion 1.x parts and their training objective."""

    name: ClassVar[str] = "sd15"
    default_targets: ClassVar[Mapping[str, Sequence[str]]] = {
        "unet": (
            "attn1.to_q",
            "attn1.to_k",
            "attn1.to_v",
            "attn1.to_out.0",
            "attn2.to_q",
            "attn2.to_k",
            "attn2.to_v",
            "attn2.to_out.0",
        ),
        "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
    }
    export_prefixes: ClassVar[Mapping[str, str]] = {"unet": "lora_unet", "text_encoder": "lora_te"}
    modelspec_architecture: ClassVar[str] = "stable-diffusion-v1/lora"

    @classmethod
    def load(cls, source: BaseModel, config: RunConfig, device: torch.device, dtype: torch.dtype) -> Self:
        # The autoencoder stays in float32: in half precision its encoder overflows on some pictures.
        parts = load_stable_diffusion(source, device, dtype, vae_dtype=torch.float32)
        for module in (parts.unet, parts.vae, parts.text_encoder):
            module.requires_grad_(False).eval()
        if device.type == "cpu":
            parts.unet.to(memory_format=torch.channels_last)
        return cls(parts, source, config, device)

    @classmethod
    def outline(cls, source: BaseModel, config: RunConfig, device: torch.device, dtype: torch.dtype) -> Self:
        parts = outline_stable_diffusion(source, device, dtype, vae_dtype=torch.float32)
        if device.type == "cpu":
            fill_with_nothing(parts.unet, device, images=torch.channels_last)
        return cls(parts, source, config, device)

    @property
    def base_model_version(self) -> str:
        return "sd_v1"

    @property
    def components(self) -> Mapping[str, nn.Module]:
        return {"unet": self._parts.unet, "text_encoder": self._parts.text_encoder}

    @property
    def max_caption_tokens(self) -> int:
        return int(self._parts.tokenizer.model_max_length) - 2

    def cut_caption(self, caption: str) -> str:
        marks = self._parts.tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = marks["offset_mapping"]
        if len(spans) <= self.max_caption_tokens:
            return caption
        return caption[: spans[self.max_caption_tokens - 1][1]]

    # What is encoded ahead --------------------------------------------------------------------------------------------

    def text_encoders(self) -> Sequence[Encoder]:
        name = f"{self._source.fingerprint}/clip/{self._parts.text_encoder.dtype}/skip{self._config.clip_skip}"
        return [Encoder("text", "caption", name, self._encode_captions, 32)]

    @torch.no_grad()
    def _encode_captions(self, captions: Sequence[Any]) -> list[dict[str, Tensor]]:
        """{"prompt_embeds": [L,D]} in the text encoder's number format."""
        return [{"prompt_embeds": embeds} for embeds in self.embed(captions).cpu()]

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Text embeddings [B,L,D]; captions over the limit are cut."""
        input_ids = self._parts.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.max_caption_tokens + 2,
            return_tensors="pt",
        ).input_ids
        encoder = self._parts.text_encoder
        if self._config.clip_skip == 1:
            embeds: Tensor = encoder(input_ids.to(encoder.device)).last_hidden_state
            return embeds
        hidden = encoder(input_ids.to(encoder.device), output_hidden_states=True).hidden_states
        normed: Tensor = getattr(encoder, "text_model", encoder).final_layer_norm(hidden[-self._config.clip_skip])
        return normed

    def release_encoders(self) -> None:
        if self._device.type == "cuda":
            self._parts.vae.to("cpu")
            if not self._config.train_text_encoder:
                self._parts.text_encoder.to("cpu")
            torch.cuda.empty_cache()

    def conditions(self, batch: Batch) -> Mapping[str, Any]:
        trained = self._config.train_text_encoder
        prompt_embeds = self.embed(batch.captions) if trained else batch.tensors["prompt_embeds"]
        return {"encoder_hidden_states": prompt_embeds.to(self._parts.unet.dtype)}

    # What is shown ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, requests: Sequence[SampleRequest]) -> list[Image]:
        from lora_scripts.sampling.denoise import render

        if self._device.type == "cuda":
            self._parts.vae.to(self._device)
            self._parts.text_encoder.to(self._device)
        pictures = render(self._parts, requests, self._device, clip_skip=self._config.clip_skip)
        self.release_encoders()
        return pictures
