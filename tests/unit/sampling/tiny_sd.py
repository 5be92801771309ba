"""A Stable Diffusion of a few thousand weights, real classes throughout, and random LoRAs for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.models.clip_tokenizer import packaged_clip_tokenizer
from lora_scripts.models.stable_diffusion import StableDiffusionParts

WIDTH = 16


@cache
def tokenizer() -> CLIPTokenizer:
    return packaged_clip_tokenizer()


def tiny_parts(seed: int = 0, *, linear_projection: bool = False, context: int = WIDTH) -> StableDiffusionParts:
    """Parts with random weights, float32, in evaluation mode."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=context,
        attention_head_dim=2,
        use_linear_projection=linear_projection,
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=context,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=context,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    # CLIP starts with weights of 0.02, which make all prompts alike.
    with torch.no_grad():
        for parameter in text_encoder.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    for module in (unet, vae, text_encoder):
        module.eval().requires_grad_(False)
    scheduler = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "steps_offset": 1,
    }
    return StableDiffusionParts(unet, vae, text_encoder, tokenizer(), scheduler, "epsilon")


def pipeline(parts: StableDiffusionParts, scheduler: Any = None) -> StableDiffusionPipeline:
    """diffusers' own pipeline around the same modules."""
    made = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=scheduler or PNDMScheduler(**parts.scheduler_config, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def save_folder(parts: StableDiffusionParts, folder: Path) -> Path:
    """The parts as a diffusers folder."""
    pipeline(parts).save_pretrained(folder)
    return folder


_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "q_proj",
    "out_proj",
    "fc1",
)


def random_lora(
    parts: StableDiffusionParts,
    *,
    rank: int = 3,
    alpha: float = 5.0,
    seed: int = 1,
    size: float = 0.3,
    targets: tuple[str, ...] = _TARGETS,
    components: tuple[str, ...] = ("unet", "text_encoder"),
) -> dict[str, LoRATensors]:
    """Random low-rank changes of the layers named, alpha other than the rank so that a lost scale shows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * size

    weights: dict[str, LoRATensors] = {}
    for component in components:
        for path, module in getattr(parts, component).named_modules():
            if not path.endswith(targets):
                continue
            if isinstance(module, torch.nn.Conv2d):
                out, inner, *kernel = module.weight.shape
                pair = draw(rank, inner, *kernel), draw(out, rank, 1, 1)
            else:
                out, inner = module.weight.shape
                pair = draw(rank, inner), draw(out, rank)
            weights[f"{component}.{path}"] = LoRATensors(*pair, alpha=alpha)
    return weights


def merge(parts: StableDiffusionParts, weights: dict[str, LoRATensors], strength: float = 1.0) -> None:
    """Adds W + strength * delta by hand."""
    for name, lora in weights.items():
        component, _, path = name.partition(".")
        weight = getattr(parts, component).get_submodule(path).weight
        with torch.no_grad():
            weight += strength * lora.delta().reshape(weight.shape)
