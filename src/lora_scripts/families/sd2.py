"""Stable Diffusion 2.x: OpenCLIP-H text encoder, linear projections in the U-Net, epsilon or v prediction.

The 512 px models predict noise and the 768 px ones velocity; which one a model is stands in its files.
"""

from __future__ import annotations

from typing import ClassVar

from lora_scripts.families.one_text_encoder import OneTextEncoderDiffusion
from lora_scripts.models.text_encoding import checkpoint_layers

__all__ = ["StableDiffusion2"]


class StableDiffusion2(OneTextEncoderDiffusion):
    """Frozen Stable Diffusion 2.x parts and their training objective.

    The text encoder as converted for transformers lacks OpenCLIP-H's last layer, which these models never read: `clip_skip: 1`
    is what they were trained with.
    """

    name: ClassVar[str] = "sd2"

    @property
    def base_model_version(self) -> str:
        return "sd_v2_v" if self.prediction == "v_prediction" else "sd_v2"

    @property
    def modelspec_architecture(self) -> str:
        kind = "768-v" if self.prediction == "v_prediction" else "512"
        return f"stable-diffusion-v2-{kind}/lora"

    def set_checkpointing(self, on: bool) -> None:
        super().set_checkpointing(on)
        # Its 23 wide layers keep some 140 MB a picture.
        checkpoint_layers(self._parts.text_encoder, on and self._config.train_text_encoder)
