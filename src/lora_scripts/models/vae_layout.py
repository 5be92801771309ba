"""How Stable Diffusion's autoencoder names its tensors in the original single file, and what its shapes say about it.

Source: the module structure of CompVis/stable-diffusion (`ldm/modules/diffusionmodules/model.py`) and of
huggingface/diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lora_scripts.models.layout_names import Shapes, count_numbers, one_to_one

__all__ = ["VAE_PREFIX", "vae_config", "vae_names"]

VAE_PREFIX = "first_stage_model."

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """Name in an AutoencoderKL -> name in the original file; the decoder's levels count the other way round there.

    Raises:
        ValueError: a name that the original layout has no place for.
    """
    names = list(names)
    levels = 1 + max(int(match[1]) for name in names if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))

    def place(name: str) -> str:
        if match := re.fullmatch(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
            coder, level, kind, index, rest = match.groups()
            block = f"{coder}.down.{level}" if coder == "encoder" else f"{coder}.up.{levels - 1 - int(level)}"
            if kind == "resnets":
                return f"{block}.block.{index}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
            return f"{block}.{kind.removesuffix('rs')}.{rest}"
        if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d+)\.(.+)", name):
            return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
        if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            return f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
        if re.match(r"((encoder|decoder)\.conv_in|(encoder|decoder)\.conv_out|quant_conv|post_quant_conv)\.", name):
            return name
        if re.match(r"(encoder|decoder)\.conv_norm_out\.", name):
            return name.replace("conv_norm_out", "norm_out")
        raise ValueError(f"{name}: no place in the original autoencoder layout")

    return one_to_one(names, place, VAE_PREFIX)


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """What the shapes say of the autoencoder's configuration.

    Raises:
        KeyError, IndexError, ValueError: they are not those of an autoencoder of this kind.
    """
    num_levels = count_numbers(shapes, VAE_PREFIX + "encoder.down.")
    return {
        "in_channels": shapes[VAE_PREFIX + "encoder.conv_in.weight"][1],
        "out_channels": shapes[VAE_PREFIX + "decoder.conv_out.weight"][0],
        "latent_channels": shapes[VAE_PREFIX + "decoder.conv_in.weight"][1],
        "block_out_channels": [
            shapes[f"{VAE_PREFIX}encoder.down.{level}.block.0.conv1.weight"][0] for level in range(num_levels)
        ],
        "layers_per_block": count_numbers(shapes, VAE_PREFIX + "encoder.down.0.block."),
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
    }
