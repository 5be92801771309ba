"""Stable Diffusion 1.x: CLIP text encoder, U-Net with cross-attention, epsilon (or v) prediction.

Legend for shapes: B batch, h w latent height and width (pixels / 8), L tokens (77), D width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lora_scripts.config import RunConfig
from lora_scripts.families.protocol import Batch, Encoder, Loss, SampleRequest
from lora_scripts.models.outline import fill_with_nothing
from lora_scripts.models.stable_diffusion import StableDiffusionParts, load_stable_diffusion, outline_stable_diffusion
from lora_scripts.objectives.ddpm import (
    NoiseSchedule,
    add_noise,
    min_snr_weights,
    offset_noise,
    sample_timesteps,
    snr,
    training_target,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_scripts.models.source import BaseModel
    from lora_scripts.training.draws import Draws

__all__ = ["StableDiffusion15"]


class StableDiffusion15:
    """Frozen Stable Diffusion 1.x parts and their training objective."""

    name: ClassVar[str] = "sd15"
    task: ClassVar[str] = "text-to-image"
    num_levels: ClassVar[int] = 16
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

    def __init__(self, parts: StableDiffusionParts, source: BaseModel, config: RunConfig, device: torch.device) -> None:
        self._parts, self._source, self._config, self._device = parts, source, config, device
        prediction = None if config.prediction == "auto" else config.prediction
        self.schedule = NoiseSchedule.from_config(
            parts.scheduler_config, prediction=prediction or parts.prediction_type, zero_snr=config.zero_terminal_snr
        ).to(device)

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
    def default_resolution(self) -> int:
        return int(self._parts.unet.config.sample_size) * 8

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

    def encoders(self) -> Sequence[Encoder]:
        vae = self._parts.vae
        print_ = self._source.fingerprint
        exact = None if vae.dtype is torch.float32 else self._encode_pixels_in_float32
        name = f"{print_}/vae/{vae.dtype}/mean+std/fp32"
        stages = [Encoder("latents", "image", name, self._encode_pixels, 4, exact)]
        if not self._config.train_text_encoder:
            skip = self._config.clip_skip
            stages.append(
                Encoder(
                    "text",
                    "caption",
                    f"{print_}/clip/{self._parts.text_encoder.dtype}/skip{skip}",
                    self._encode_captions,
                    32,
                )
            )
        return stages

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

    # What is trained --------------------------------------------------------------------------------------------------

    def set_checkpointing(self, on: bool) -> None:
        # The text encoder keeps about 20 MB a picture, the U-Net some 800: not worth its time.
        unet = self._parts.unet
        (unet.enable_gradient_checkpointing if on else unet.disable_gradient_checkpointing)()

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        """Mean squared error of the predicted noise (or velocity), one number per picture, summed."""
        noisy_latents, target, timesteps = self._noised(batch, draws)
        model_pred = self._denoise(noisy_latents, timesteps, batch)
        per_example = mse_loss(model_pred.float(), target, reduction="none").mean(dim=(1, 2, 3))
        weighted = per_example
        if self._config.min_snr_gamma:
            ratio = snr(self.schedule, timesteps)
            weighted = per_example * min_snr_weights(ratio, self._config.min_snr_gamma, self.schedule.prediction)
        low, high = self._trained_range()
        return Loss(weighted.sum(), len(batch), per_example.detach(), (timesteps - low + 0.5) / (high - low))

    def work(self, batch: Batch) -> None:
        return None

    def predict(self, batch: Batch, draws: Draws) -> Tensor:
        noisy_latents, _, timesteps = self._noised(batch, draws)
        return self._denoise(noisy_latents, timesteps, batch)

    def _noised(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents [B,4,h,w], what to predict from them [B,4,h,w], and timesteps [B]."""
        config, keys = self._config, batch.keys
        mean, std = batch.tensors["latents_mean"], batch.tensors["latents_std"]
        shape = mean.shape[1:]

        def on_device(values: Tensor) -> Tensor:
            return values.to(self._device, non_blocking=True)

        latents = torch.addcmul(mean, std, on_device(draws.normal(keys, shape, "posterior")))
        noise = on_device(draws.normal(keys, shape, "noise"))
        if config.noise_offset and batch.levels is None:
            offsets = on_device(draws.normal(keys, (shape[0], 1, 1), "offset"))
            noise = offset_noise(noise, offsets, config.noise_offset)
        low, high = self._trained_range()
        if batch.levels is None:
            strata = batch.strata if config.timestep_sampling == "stratified" else None
            timesteps = sample_timesteps(
                draws, keys, self.schedule.num_train_timesteps, low=low, high=high, strata=strata
            )
        else:
            timesteps = torch.tensor([min(low + int(level * (high - low)), high - 1) for level in batch.levels])
        timesteps = on_device(timesteps)
        noisy_latents = add_noise(self.schedule, latents, noise, timesteps)
        return noisy_latents, training_target(self.schedule, latents, noise, timesteps), timesteps

    def _trained_range(self) -> tuple[int, int]:
        """The noise levels that are trained, as (lowest timestep, highest + 1)."""
        return self._config.min_timestep, min(self._config.max_timestep + 1, self.schedule.num_train_timesteps)

    def _denoise(self, noisy_latents: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """[B,4,h,w] what the U-Net predicts, in its number format."""
        unet = self._parts.unet
        trained = self._config.train_text_encoder
        prompt_embeds = self.embed(batch.captions) if trained else batch.tensors["prompt_embeds"]
        if self._device.type == "cpu":
            noisy_latents = noisy_latents.contiguous(memory_format=torch.channels_last)
        model_pred: Tensor = unet(
            noisy_latents.to(unet.dtype), timesteps, prompt_embeds.to(unet.dtype), return_dict=False
        )[0]
        return model_pred

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
