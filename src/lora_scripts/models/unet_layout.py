"""How a Stable Diffusion U-Net names its tensors in the original single file, and what its shapes say about its configuration.

Source: the module structure of CompVis/stable-diffusion and Stability-AI/generative-models
(`modules/diffusionmodules/openaimodel.py` of both), and of huggingface/diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lora_scripts.models.layout_names import Shapes, count_numbers, one_to_one

__all__ = ["UNET_PREFIX", "ema_name", "unet_config", "unet_names"]

UNET_PREFIX = "model.diffusion_model."

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Name in a UNet2DConditionModel -> name in the original file, for any number of levels and layers.

    The original numbers its blocks through: `layers` resnets and one downsampler per level on the way down, `layers + 1`
    resnets on the way up, an upsampler behind the attention (if there is one) of a level's last block.

    Args:
        names: all tensor names of the model; the numbers of levels and layers are read off them.
    Raises:
        ValueError: a name that the original layout has no place for.
    """
    names = list(names)
    layers = 1 + max(int(match[1]) for name in names if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name)))
    levels_with_attention = {
        int(match[1]) for name in names if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))
    }

    def place(name: str) -> str:
        for ours, theirs in _UNET_ENDS.items():
            if name.startswith(ours + "."):
                return theirs + name.removeprefix(ours)
        if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
            kind, index, rest = match.groups()
            if kind == "attentions" and index == "0":
                return f"middle_block.1.{rest}"
            if kind == "resnets" and index in ("0", "1"):
                return f"middle_block.{2 * int(index)}.{_resnet(rest)}"
        if match := re.fullmatch(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
        ):
            way, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            if way == "down":
                first = 1 + level * (layers + 1)
                if kind == "downsamplers":
                    return f"input_blocks.{first + layers}.0.{rest.replace('conv', 'op', 1)}"
                block = f"input_blocks.{first + index}"
            else:
                first = level * (layers + 1)
                if kind == "upsamplers":
                    return f"output_blocks.{first + layers}.{2 if level in levels_with_attention else 1}.{rest}"
                block = f"output_blocks.{first + index}"
            return f"{block}.0.{_resnet(rest)}" if kind == "resnets" else f"{block}.1.{rest}"
        raise ValueError(f"{name}: no place in the original UNet layout")

    return one_to_one(names, place, UNET_PREFIX)


def _resnet(rest: str) -> str:
    part, _, end = rest.rpartition(".")
    return f"{_RESNET[part]}.{end}"


def ema_name(original: str) -> str:
    """Where the running average of a UNet weight stands: the original's averaging drops all dots from its names."""
    return "model_ema." + original.removeprefix("model.").replace(".", "")


def unet_config(shapes: Shapes, pooled_width: int | None = None) -> dict[str, Any]:
    """What the shapes say of the U-Net's configuration.

    Args:
        pooled_width: of the pooled text embedding that the model is given beside the size of the picture; None without one.
    Raises:
        KeyError, IndexError, ValueError: they are not those of a U-Net of this kind.
    """

    def shape(name: str) -> tuple[int, ...]:
        return shapes[UNET_PREFIX + name]

    num_blocks = count_numbers(shapes, UNET_PREFIX + "input_blocks.")
    widths: list[int] = []
    depths: list[int] = []  # transformer blocks in each layer of a level, 0 without attention
    layers: list[int] = [0]
    for index in range(1, num_blocks):
        block = f"{UNET_PREFIX}input_blocks.{index}"
        if f"{block}.0.op.weight" in shapes:
            layers.append(0)
            continue
        layers[-1] += 1
        if layers[-1] == 1:
            widths.append(shapes[f"{block}.0.in_layers.2.weight"][0])
            has_attention = f"{block}.1.proj_in.weight" in shapes
            depths.append(count_numbers(shapes, f"{block}.1.transformer_blocks.") if has_attention else 0)
    if len(set(layers)) != 1:
        raise ValueError("levels with different numbers of layers")
    middle = count_numbers(shapes, UNET_PREFIX + "middle_block.1.transformer_blocks.")
    config = {
        "in_channels": shape("input_blocks.0.0.weight")[1],
        "out_channels": shape("out.2.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": layers[0],
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "cross_attention_dim": shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        "use_linear_projection": len(shape("middle_block.1.proj_in.weight")) == 2,
    }
    # Written only where it differs, so that a full-size file gives exactly the published configuration.
    if {*depths, middle} - {0, 1}:
        # The middle block is as deep as the last level, or as deep as is said for it where that has no attention.
        config["transformer_layers_per_block"] = [*(depth or 1 for depth in depths[:-1]), depths[-1] or middle]
    if pooled_width is not None:
        width = shape("label_emb.0.0.weight")[1]
        config["projection_class_embeddings_input_dim"] = width
        config["addition_time_embed_dim"] = (
            width - pooled_width
        ) // 6  # original size, crop and target size: six numbers
    return config
