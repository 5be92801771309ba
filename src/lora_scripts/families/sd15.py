"""Stable Diffusion 1.x: CLIP-L text encoder, U-Net with cross-attention, epsilon (or v) prediction."""

from __future__ import annotations

from typing import ClassVar

from lora_scripts.families.one_text_encoder import OneTextEncoderDiffusion

__all__ = ["StableDiffusion15"]


class StableDiffusion15(OneTextEncoderDiffusion):
    """Frozen Stable Diffusion 1.x parts and their training objective."""

    name: ClassVar[str] = "sd15"

    @property
    def base_model_version(self) -> str:
        return "sd_v1"

    @property
    def modelspec_architecture(self) -> str:
        return "stable-diffusion-v1/lora"
