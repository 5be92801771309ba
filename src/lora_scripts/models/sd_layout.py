"""How Stable Diffusion 1.x names its tensors in the original single file, and which model its shapes describe.

Only one direction is written down, from the names of the diffusers classes to those of the original file: the names of a
built model are always known, and the mapping is one to one, so reading and writing use the same table.

Source: the module structure of CompVis/stable-diffusion (`ldm/modules/diffusionmodules/openaimodel.py` and `model.py`), and
of huggingface/diffusers and huggingface/transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from typing import Any

from lora_scripts.errors import ModelError

__all__ = [
    "COMPONENTS",
    "TEXT_PREFIX",
    "UNET_PREFIX",
    "VAE_PREFIX",
    "derive_config",
    "ema_name",
    "published_config",
    "text_encoder_names",
    "unet_names",
    "vae_names",
]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."
COMPONENTS = ("unet", "vae", "text_encoder")

Shapes = Mapping[str, tuple[int, ...]]

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
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
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def published_config(component: str) -> dict[str, Any]:
    """The configuration of Stable Diffusion 1.5's "unet", "vae", "text_encoder" or "scheduler"."""
    text = files("lora_scripts.models").joinpath("assets", "sd15", f"{component}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


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

    return _one_to_one(names, place, UNET_PREFIX)


def _resnet(rest: str) -> str:
    part, _, end = rest.rpartition(".")
    return f"{_RESNET[part]}.{end}"


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

    return _one_to_one(names, place, VAE_PREFIX)


def text_encoder_names(names: Iterable[str], *, with_text_model: bool = True) -> dict[str, str]:
    """Name in a CLIPTextModel -> name in the original file.

    Args:
        with_text_model: False for files made before transformers 4 gave its names a `text_model.` in front.
    """
    middle = "text_model." if with_text_model else ""
    return _one_to_one(names, lambda name: middle + name.removeprefix("text_model."), TEXT_PREFIX)


def _one_to_one(names: Iterable[str], place: Callable[[str], str], prefix: str) -> dict[str, str]:
    mapping = {name: prefix + place(name) for name in names}
    assert len(set(mapping.values())) == len(mapping), "two names share one place"
    return mapping


def ema_name(original: str) -> str:
    """Where the running average of a UNet weight stands: the original's averaging drops all dots from its names."""
    return "model_ema." + original.removeprefix("model.").replace(".", "")


def derive_config(component: str, shapes: Shapes, written: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The published configuration with everything that the shapes decide put in; equal to it for a full-size model.

    Not visible in shapes are the numbers of attention heads and of norm groups, the VAE's scaling factor and a few more: those
    come from `written`, else stay as published.

    Args:
        component: "unet", "vae" or "text_encoder".
        shapes: of all tensors of the single file, by their original names.
        written: settings from the file's header; what the shapes say goes before it.
    Raises:
        ModelError: the shapes do not describe a model of this kind.
    """
    derive = {"unet": _unet_config, "vae": _vae_config, "text_encoder": _text_encoder_config}[component]
    try:
        config = {**published_config(component), **(written or {}), **derive(shapes)}
    except (KeyError, IndexError, ValueError) as error:
        raise ModelError(
            f"the {component} in this file is not built like Stable Diffusion 1.x (at {error}). "
            "The file is incomplete or of another model: use the original download."
        ) from None
    if component == "text_encoder" and "num_attention_heads" not in (written or {}):
        # CLIP's heads are 64 wide in every published size.
        config["num_attention_heads"] = max(1, config["hidden_size"] // 64)
    return config


def _unet_config(shapes: Shapes) -> dict[str, Any]:
    def shape(name: str) -> tuple[int, ...]:
        return shapes[UNET_PREFIX + name]

    num_blocks = _count(shapes, UNET_PREFIX + "input_blocks.")
    widths: list[int] = []
    attention: list[bool] = []
    layers: list[int] = [0]
    for index in range(1, num_blocks):
        block = f"{UNET_PREFIX}input_blocks.{index}"
        if f"{block}.0.op.weight" in shapes:
            layers.append(0)
            continue
        layers[-1] += 1
        if layers[-1] == 1:
            widths.append(shapes[f"{block}.0.in_layers.2.weight"][0])
            attention.append(f"{block}.1.proj_in.weight" in shapes)
    if len(set(layers)) != 1:
        raise ValueError("levels with different numbers of layers")
    depth = _count(shapes, UNET_PREFIX + "middle_block.1.transformer_blocks.")
    return {
        "in_channels": shape("input_blocks.0.0.weight")[1],
        "out_channels": shape("out.2.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": layers[0],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "cross_attention_dim": shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        "use_linear_projection": len(shape("middle_block.1.proj_in.weight")) == 2,
        # Written only where it differs, so that a full-size file gives exactly the published configuration.
        **({"transformer_layers_per_block": depth} if depth > 1 else {}),
    }


def _vae_config(shapes: Shapes) -> dict[str, Any]:
    num_levels = _count(shapes, VAE_PREFIX + "encoder.down.")
    return {
        "in_channels": shapes[VAE_PREFIX + "encoder.conv_in.weight"][1],
        "out_channels": shapes[VAE_PREFIX + "decoder.conv_out.weight"][0],
        "latent_channels": shapes[VAE_PREFIX + "decoder.conv_in.weight"][1],
        "block_out_channels": [
            shapes[f"{VAE_PREFIX}encoder.down.{level}.block.0.conv1.weight"][0] for level in range(num_levels)
        ],
        "layers_per_block": _count(shapes, VAE_PREFIX + "encoder.down.0.block."),
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
    }


def _text_encoder_config(shapes: Shapes) -> dict[str, Any]:
    prefix = TEXT_PREFIX + (
        "text_model." if any(name.startswith(TEXT_PREFIX + "text_model.") for name in shapes) else ""
    )
    vocab_size, width = shapes[prefix + "embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shapes[prefix + "encoder.layers.0.mlp.fc1.weight"][0],
        "max_position_embeddings": shapes[prefix + "embeddings.position_embedding.weight"][0],
        "num_hidden_layers": _count(shapes, prefix + "encoder.layers."),
    }


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow a prefix, 0 to N - 1."""
    numbers = {int(match[1]) for name in shapes if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ValueError(f"{prefix}*")
    return len(numbers)
