"""What Stable Diffusion 1, 2 and SDXL have in common: an autoencoder, a U-Net and their training objective.

A family built on it says how captions become what the U-Net is conditioned on.

Legend for shapes: B batch, h w latent height and width (pixels / 8).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora_scripts.adapters.layer import switched_off
from lora_scripts.adapters.presets import BlockRoles
from lora_scripts.config import RunConfig
from lora_scripts.export.names import kohya_file_names
from lora_scripts.families.class_prompt import ClassPrompt
from lora_scripts.families.protocol import Batch, Encoder, Loss, SampleRequest
from lora_scripts.models.block_swap import swap_blocks
from lora_scripts.models.outline import fill_with_nothing
from lora_scripts.models.same_input import attention_groups
from lora_scripts.models.sd_layout import LAYOUTS
from lora_scripts.models.stable_diffusion import load_stable_diffusion, outline_stable_diffusion
from lora_scripts.objectives.ddpm import NoiseSchedule
from lora_scripts.objectives.denoising import DenoisingObjective
from lora_scripts.speed_rules import swapped_blocks

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_scripts.models.source import BaseModel
    from lora_scripts.models.stable_diffusion import StableDiffusionParts
    from lora_scripts.objectives.denoising import Noised
    from lora_scripts.training.draws import Draws

__all__ = ["CLIP_ATTENTION", "UNET_ATTENTION", "LatentDiffusion"]

UNET_ATTENTION = tuple(
    f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
)
UNET_CONVOLUTIONS = ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

VAE_DTYPES = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""`vae_precision` to dtype. Every picture is encoded once and cached, so the autoencoder's time hardly counts in a run, while
what is lost in its latents is lost in every step: in float32, then, wherever it runs."""

CHANNELS_LAST = ("cpu", "cuda")
"""Devices whose convolutions are fastest where the channels of a pixel lie side by side (oneDNN, cuDNN on tensor cores)."""

FUSABLE = frozenset({"BasicTransformerBlock", "ResnetBlock2D"})
"""Classes that the U-Net is made of, compiled one by one: a dozen of them differ, so it takes little time."""

PIXELS_AT_ONCE = 4 * 512 * 512
"""Pictures are encoded in groups of at most so many pixels; the autoencoder takes about 1 GB for each 512x512 in float32."""


def _encoders_only(source: BaseModel, config: RunConfig) -> list[str]:
    """Parts that a run may do without, because the cache has all that they would say."""
    folded = source.fingerprint != source.own_fingerprint  # LoRAs are added to the text encoders' weights
    keep_texts = (
        folded or config.train_text_encoder or config.prior_preservation_weight
    )  # the class prompt is not cached
    return [part for part in LAYOUTS[source.family].components if part == "vae" or not (part == "unet" or keep_texts)]


class LatentDiffusion(ABC):
    """Frozen parts of a latent diffusion model with a U-Net, and how they are trained."""

    name: ClassVar[str]
    task: ClassVar[str] = "text-to-image"
    num_levels: ClassVar[int] = 16
    shards = None
    few_shapes: ClassVar[bool] = True
    joins_weights: ClassVar[bool] = True
    conv_targets: ClassVar[Mapping[str, Sequence[str]]] = {"unet": UNET_CONVOLUTIONS}
    block_roles: ClassVar[BlockRoles] = {
        "content": ("unet.down.2", "unet.mid", "unet.up.1"),
        "look": ("unet.down.0", "unet.down.1", "unet.up.2", "unet.up.3"),
    }

    def __init__(self, parts: StableDiffusionParts, source: BaseModel, config: RunConfig, device: torch.device) -> None:
        prediction = parts.prediction_type if config.prediction == "auto" else config.prediction
        schedule = NoiseSchedule.from_config(
            parts.scheduler_config, prediction=prediction, zero_snr=config.zero_terminal_snr
        )
        # Previews are rendered with the schedule that is trained with, whatever the model's files say.
        scheduler = {**parts.scheduler_config, "prediction_type": prediction}
        if config.zero_terminal_snr is not None:
            scheduler["rescale_betas_zero_snr"] = config.zero_terminal_snr
        self._parts = replace(parts, scheduler_config=scheduler, prediction_type=prediction)
        self._source, self._config, self._device = source, config, device
        self._objective = DenoisingObjective(config, schedule, device)
        self._unet_dtype = parts.unet.dtype  # asked of the module, it is looked for in all of its layers
        stages = self._token_encoders if config.train_text_encoder else self.text_encoders
        self._class_prompt = ClassPrompt(config.prior_prompt or "", stages, device)

    @classmethod
    def load(cls, source: BaseModel, config: RunConfig, device: torch.device, dtype: torch.dtype) -> Self:
        parts = load_stable_diffusion(
            source,
            device,
            dtype,
            vae_dtype=VAE_DTYPES[config.vae_precision],
            later=_encoders_only(source, config),
            images=torch.channels_last if device.type == "cpu" else None,  # a GPU turns them round faster by itself
        )
        if device.type in CHANNELS_LAST:
            parts.unet.to(memory_format=torch.channels_last)
        family = cls(parts, source, config, device)
        swap_blocks(family.blocks(), swapped_blocks(config), device)
        return family

    @classmethod
    def outline(cls, source: BaseModel, config: RunConfig, device: torch.device, dtype: torch.dtype) -> Self:
        parts = outline_stable_diffusion(source, device, dtype, vae_dtype=VAE_DTYPES[config.vae_precision])
        if device.type in CHANNELS_LAST:
            fill_with_nothing(parts.unet, device, images=torch.channels_last)
        return cls(parts, source, config, device)

    @property
    def components(self) -> Mapping[str, nn.Module]:
        return self._parts.components

    @property
    def schedule(self) -> NoiseSchedule:
        return self._objective.schedule

    @property
    def prediction(self) -> str:
        return self.schedule.prediction

    @property
    def default_resolution(self) -> int:
        return int(self._parts.unet.config.sample_size) * 8

    @property
    def max_caption_tokens(self) -> int:
        return int(self._parts.tokenizer.model_max_length) - 2

    def cut_caption(self, caption: str) -> str:
        marks = self._parts.tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = marks["offset_mapping"]
        if len(spans) <= self.max_caption_tokens:
            return caption
        return caption[: spans[self.max_caption_tokens - 1][1]]

    def file_names(self) -> Mapping[str, str]:
        return kohya_file_names(self.components, self.name)

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids [B,L] on the CPU: "input_ids" for the text encoder, "input_ids_2" for the second one.

        Captions over the limit are cut, others filled up with each tokenizer's own padding.
        """
        parts, form = self._parts, {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokenizers = {"input_ids": parts.tokenizer, "input_ids_2": parts.tokenizer_2}
        return {
            name: tokenizer(list(captions), max_length=self.max_caption_tokens + 2, **form).input_ids
            for name, tokenizer in tokenizers.items()
            if tokenizer is not None
        }

    def _tokens_of(self, batch: Batch) -> Mapping[str, Tensor]:
        return batch.tensors if "input_ids" in batch.tensors else self.tokens(batch.captions)

    # What is encoded ahead --------------------------------------------------------------------------------------------

    @abstractmethod
    def text_encoders(self) -> Sequence[Encoder]:
        """The stages that captions go through, where none of them is trained."""

    def _token_encoders(self) -> Sequence[Encoder]:
        """The stage that captions go through where the text encoders are trained."""

        def run(captions: Sequence[Any]) -> list[dict[str, Tensor]]:
            tokens = self.tokens(captions)
            return [{name: ids[row] for name, ids in tokens.items()} for row in range(len(captions))]

        return [Encoder("tokens", "caption", "", run)]

    def framing_encoders(self) -> Sequence[Encoder]:
        """The stages that read a picture's size and crop; none unless the U-Net is told of them."""
        return ()

    @abstractmethod
    def conditions(self, batch: Batch) -> Mapping[str, Any]:
        """What the U-Net is given besides latents and timesteps, by the names of its arguments."""

    def encoders(self) -> Sequence[Encoder]:
        vae, side = self._parts.vae, self.default_resolution
        exact = None if vae.dtype is torch.float32 else self._encode_pixels_in_float32
        name = f"{self._source.own_fingerprint}/vae/{vae.dtype}/mean+std/fp32"
        width, height = self._config.resolution or (side, side)
        at_once = max(1, min(4, PIXELS_AT_ONCE // (width * height)))
        images = [Encoder("latents", "image", name, self._encode_pixels, at_once, exact), *self.framing_encoders()]
        if self._config.masked_loss != "none":
            images.append(Encoder("masks", "mask", f"mean of {self._pixels_per_latent} pixels", self._encode_masks, 64))
        return images if self._config.train_text_encoder else [*images, *self.text_encoders()]

    @property
    def _pixels_per_latent(self) -> int:
        """How many pixels of a row one latent stands for."""
        return int(2 ** (len(self._parts.vae.config.block_out_channels) - 1))

    def _encode_masks(self, masks: Sequence[Any]) -> list[dict[str, Tensor]]:
        """How much each latent is to be learnt, the mean over the pixels it stands for: {"mask": [1,h,w]} float32 each."""
        return [{"mask": torch.nn.functional.avg_pool2d(mask, self._pixels_per_latent)} for mask in masks]

    @torch.no_grad()
    def _encode_pixels(self, pixels: Sequence[Any]) -> list[dict[str, Tensor]]:
        """The latent distribution, already scaled: {"latents_mean", "latents_std"} [4,h,w] float32 each.

        Mean and spread are kept rather than one sample, so that every step can draw its own, as diffusers' scripts do.
        """
        self._parts.read_rest("vae")
        vae = self._parts.vae
        posterior = vae.encode(torch.stack(list(pixels)).to(self._device, vae.dtype)).latent_dist
        mean = (posterior.mean * vae.config.scaling_factor).float().cpu()
        std = (posterior.std * vae.config.scaling_factor).float().cpu()
        return [{"latents_mean": m, "latents_std": s} for m, s in zip(mean, std, strict=True)]

    def _encode_pixels_in_float32(self, pixels: Sequence[Any]) -> list[dict[str, Tensor]]:
        """As `_encode_pixels`, with the autoencoder in float32 for this once."""
        self._parts.read_rest("vae")
        vae, narrow = self._parts.vae, self._parts.vae.dtype
        try:
            nn.Module.to(vae, torch.float32)
            return self._encode_pixels(pixels)
        finally:
            nn.Module.to(vae, narrow)  # diffusers' own `to` warns of narrow dtypes

    # What is trained --------------------------------------------------------------------------------------------------

    def set_checkpointing(self, on: bool) -> None:
        # The small text encoder of version 1 keeps about 20 MB a picture, the U-Net some 800: not worth its time.
        unet = self._parts.unet
        (unet.enable_gradient_checkpointing if on else unet.disable_gradient_checkpointing)()

    def drawn(self, batch: Batch, draws: Draws) -> Batch:
        # Captions that are encoded in the pass become tokens before it, so that the pass depends on tensors alone.
        tokens = self.tokens(batch.captions) if self._config.train_text_encoder else {}
        return batch.with_tensors({**batch.tensors, **tokens, **self._objective.drawn(batch, draws)})

    def blocks(self) -> Sequence[nn.Module]:
        unet = self._parts.unet
        parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        return [m for part in parts for m in part.modules() if type(m).__name__ == "BasicTransformerBlock"]

    def same_input(self) -> Sequence[Sequence[str]]:
        return attention_groups(self.components)

    def fusable_parts(self) -> Sequence[nn.Module]:
        return [module for module in self._parts.unet.modules() if type(module).__name__ in FUSABLE]

    def wide_parts(self) -> Sequence[nn.Module]:
        return [module for module in self._parts.unet.modules() if type(module).__name__ == "Transformer2DModel"]

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        """The loss of the predicted noise (or velocity), one number per picture, summed; with prior preservation where asked.

        Measurements are made without the latter: `batch.levels` says that it is one.
        """
        noised = self._objective.noised(batch, draws)
        loss = self._objective.loss(self._denoise(noised.noisy_latents, noised.timesteps, batch), noised, batch)
        weight = self._config.prior_preservation_weight
        if not weight or batch.levels is not None:
            return loss
        return replace(loss, total=loss.total + weight * self._class_drift(noised, batch))

    def _class_drift(self, noised: Noised, batch: Batch) -> Tensor:
        """[] how far training has moved the prediction for the class prompt, on the batch's noisy latents, summed."""
        batch = self._class_prompt.in_place_of_captions(batch)
        with torch.no_grad(), switched_off(self.components.values()):
            frozen_pred = self._denoise(noised.noisy_latents, noised.timesteps, batch)
        model_pred = self._denoise(noised.noisy_latents, noised.timesteps, batch)
        return self._objective.drift(model_pred, frozen_pred, noised)

    def work(self, batch: Batch) -> None:
        return None

    def predict(self, batch: Batch, draws: Draws) -> Tensor:
        noised = self._objective.noised(batch, draws)
        return self._denoise(noised.noisy_latents, noised.timesteps, batch)

    def _denoise(self, noisy_latents: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """[B,4,h,w] what the U-Net predicts, in its number format."""
        unet = self._parts.unet
        if self._device.type in CHANNELS_LAST:
            noisy_latents = noisy_latents.contiguous(memory_format=torch.channels_last)
        model_pred: Tensor = unet(
            noisy_latents.to(self._unet_dtype), timesteps, return_dict=False, **self.conditions(batch)
        )[0]
        return model_pred

    # What is shown ----------------------------------------------------------------------------------------------------

    def release_encoders(self) -> None:
        if self._device.type == "cuda":
            texts = () if self._config.train_text_encoder else LAYOUTS[self.name].texts
            for part in {"vae", *texts} - self._parts.unread.keys():
                getattr(self._parts, part).to("cpu")
            torch.cuda.empty_cache()

    @torch.no_grad()
    def sample(self, requests: Sequence[SampleRequest]) -> list[Image]:
        from lora_scripts.sampling.denoise import render

        self._parts.read_rest()
        if self._device.type == "cuda":
            for module in (self._parts.vae, *self._parts.text_encoders):
                module.to(self._device)
        pictures = render(self._parts, requests, self._device, clip_skip=self._config.clip_skip)
        self.release_encoders()
        return pictures
