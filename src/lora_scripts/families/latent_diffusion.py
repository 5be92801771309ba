"""What Stable Diffusion 1, 2 and SDXL have in common: an autoencoder, a U-Net and their training objective.

A family built on it says how captions become what the U-Net is conditioned on.

Legend for shapes: B batch, h w latent height and width (pixels / 8).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lora_scripts.config import RunConfig
from lora_scripts.families.protocol import Batch, Encoder, Loss
from lora_scripts.objectives.ddpm import NoiseSchedule
from lora_scripts.objectives.denoising import DenoisingObjective

if TYPE_CHECKING:
    from lora_scripts.models.source import BaseModel
    from lora_scripts.models.stable_diffusion import StableDiffusionParts
    from lora_scripts.training.draws import Draws

__all__ = ["LatentDiffusion"]


class LatentDiffusion(ABC):
    """Frozen parts of a latent diffusion model with a U-Net, and how they are trained."""

    task: ClassVar[str] = "text-to-image"
    num_levels: ClassVar[int] = 16

    def __init__(self, parts: StableDiffusionParts, source: BaseModel, config: RunConfig, device: torch.device) -> None:
        self._parts, self._source, self._config, self._device = parts, source, config, device
        prediction = None if config.prediction == "auto" else config.prediction
        schedule = NoiseSchedule.from_config(
            parts.scheduler_config, prediction=prediction or parts.prediction_type, zero_snr=config.zero_terminal_snr
        )
        self._objective = DenoisingObjective(config, schedule, device)

    @property
    def schedule(self) -> NoiseSchedule:
        return self._objective.schedule

    @property
    def default_resolution(self) -> int:
        return int(self._parts.unet.config.sample_size) * 8

    # What is encoded ahead --------------------------------------------------------------------------------------------

    @abstractmethod
    def text_encoders(self) -> Sequence[Encoder]:
        """The stages that captions go through, where none of them is trained."""

    @abstractmethod
    def conditions(self, batch: Batch) -> Mapping[str, Any]:
        """What the U-Net is given besides latents and timesteps, by the names of its arguments."""

    def encoders(self) -> Sequence[Encoder]:
        vae = self._parts.vae
        exact = None if vae.dtype is torch.float32 else self._encode_pixels_in_float32
        name = f"{self._source.fingerprint}/vae/{vae.dtype}/mean+std/fp32"
        latents = Encoder("latents", "image", name, self._encode_pixels, 4, exact)
        return [latents] if self._config.train_text_encoder else [latents, *self.text_encoders()]

    @torch.no_grad()
    def _encode_pixels(self, pixels: Sequence[Any]) -> list[dict[str, Tensor]]:
        """The latent distribution, already scaled: {"latents_mean", "latents_std"} [4,h,w] float32 each.

        Mean and spread are kept rather than one sample, so that every step can draw its own, as diffusers' scripts do.
        """
        vae = self._parts.vae
        posterior = vae.encode(torch.stack(list(pixels)).to(self._device, vae.dtype)).latent_dist
        mean = (posterior.mean * vae.config.scaling_factor).float().cpu()
        std = (posterior.std * vae.config.scaling_factor).float().cpu()
        return [{"latents_mean": m, "latents_std": s} for m, s in zip(mean, std, strict=True)]

    def _encode_pixels_in_float32(self, pixels: Sequence[Any]) -> list[dict[str, Tensor]]:
        """As `_encode_pixels`, with the autoencoder in float32 for this once."""
        vae, narrow = self._parts.vae, self._parts.vae.dtype
        try:
            nn.Module.to(vae, torch.float32)
            return self._encode_pixels(pixels)
        finally:
            nn.Module.to(vae, narrow)  # diffusers' own `to` warns of narrow dtypes

    # What is trained --------------------------------------------------------------------------------------------------

    def set_checkpointing(self, on: bool) -> None:
        # The text encoder keeps about 20 MB a picture, the U-Net some 800: not worth its time.
        unet = self._parts.unet
        (unet.enable_gradient_checkpointing if on else unet.disable_gradient_checkpointing)()

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        """The loss of the predicted noise (or velocity), one number per picture, summed."""
        noised = self._objective.noised(batch, draws)
        return self._objective.loss(self._denoise(noised.noisy_latents, noised.timesteps, batch), noised, batch)

    def work(self, batch: Batch) -> None:
        return None

    def predict(self, batch: Batch, draws: Draws) -> Tensor:
        noised = self._objective.noised(batch, draws)
        return self._denoise(noised.noisy_latents, noised.timesteps, batch)

    def _denoise(self, noisy_latents: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """[B,4,h,w] what the U-Net predicts, in its number format."""
        unet = self._parts.unet
        if self._device.type == "cpu":
            noisy_latents = noisy_latents.contiguous(memory_format=torch.channels_last)
        model_pred: Tensor = unet(noisy_latents.to(unet.dtype), timesteps, return_dict=False, **self.conditions(batch))[
            0
        ]
        return model_pred
