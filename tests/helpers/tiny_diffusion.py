"""Stable Diffusion 1.x, 2.x and SDXL of a few thousand random weights: the real classes, on the disk in both layouts.

The CLIP vocabulary is the real one, so captions are read as by the big models.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_scripts.models.clip_tokenizer import packaged_clip_tokenizer
from lora_scripts.models.published import published_config
from lora_scripts.models.single_file import write_single_file
from lora_scripts.models.stable_diffusion import StableDiffusionParts

WIDTH, WIDTH_2, POOLED, TIME_WIDTH = 8, 16, 12, 4
"""Width of the text encoder; of SDXL's second one, of its pooled output; of each of SDXL's six numbers on the size."""

_SHARED = {"sample_size": 8, "norm_num_groups": 4, "attention_head_dim": 2, "in_channels": 4, "out_channels": 4}
_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
    },
    "sd2": {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "use_linear_projection": True,
        "attention_head_dim": (2, 4),
    },
    # Three levels as in the original, the first without attention, each of the others of another depth.
    "sdxl": {
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH + WIDTH_2,
        "use_linear_projection": True,
        "attention_head_dim": (2, 2, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_WIDTH,
        "projection_class_embeddings_input_dim": POOLED + 6 * TIME_WIDTH,
    },
}
_PIPELINES = {"sd15": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


@cache
def tokenizer(pad_token: str) -> CLIPTokenizer:
    return packaged_clip_tokenizer(pad_token)


def tiny_parts(family: str, seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionParts:
    """Parts with random weights, float32, frozen, in evaluation mode. Pictures of 64 px are its native size."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**{**_SHARED, **_UNETS[family]})
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=published_config("vae", family)["scaling_factor"],
        force_upcast=published_config("vae", family).get("force_upcast", True),
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": _text_encoder(WIDTH, published_config("text_encoder", family))}
    tokenizers = {"tokenizer": tokenizer(published_config("tokenizer", family)["pad_token"])}
    if family == "sdxl":
        parts["text_encoder_2"] = _text_encoder(WIDTH_2, published_config("text_encoder_2", family), POOLED)
        tokenizers["tokenizer_2"] = tokenizer(published_config("tokenizer_2", family)["pad_token"])
    for module in parts.values():
        module.eval().requires_grad_(False)
    scheduler = published_config("scheduler", family) | {"prediction_type": prediction_type}
    return StableDiffusionParts(
        **parts, **tokenizers, scheduler_config=scheduler, prediction_type=prediction_type, family=family
    )


def _text_encoder(width: int, published: dict[str, Any], pooled: int | None = None) -> Any:
    small = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "projection_dim": pooled or width,
    }
    text_class = CLIPTextModel if pooled is None else CLIPTextModelWithProjection
    encoder = text_class(CLIPTextConfig(**published | small))
    # CLIP starts with weights of 0.02 and biases of 0, which make all prompts alike and all layers' biases equal.
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(parameter * 3 if parameter.ndim > 1 else parameter + 0.1 * torch.randn(parameter.shape))
    return encoder


def save_folder(parts: StableDiffusionParts, folder: Path) -> Path:
    """The diffusers layout."""
    index: dict[str, Any] = {"_class_name": _PIPELINES[parts.family]}
    names = ["unet", "vae", "text_encoder", "tokenizer"]
    for name in [*names, "text_encoder_2", "tokenizer_2"] if parts.text_encoder_2 is not None else names:
        part = getattr(parts, name)
        part.save_pretrained(folder / name)
        index[name] = ["diffusers" if name in ("unet", "vae") else "transformers", type(part).__name__]
    schedule = {key: value for key, value in parts.scheduler_config.items() if not key.startswith("_")}
    DDPMScheduler.from_config(schedule).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_single_file(parts: StableDiffusionParts, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The original layout, with our header, which says what so small a model's shapes do not show."""
    write_single_file(parts, path, dtype)
    return path
