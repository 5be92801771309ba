"""How OpenCLIP's text encoder lies in single files of Stable Diffusion 2.x and SDXL.

It computes what CLIP's does and is loaded into the same class of huggingface/transformers, but its files name everything in
another way, hold query, key and value of a layer as one tensor of three parts, and the last projection turned round.

Legend for shapes: D width of the encoder, P width of the projection.
Source: the module structure of mlfoundations/open_clip (`transformer.py`, `TextTransformer`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lora_scripts.models.layout_names import Place, Shapes, count_numbers

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["open_clip_config", "open_clip_places", "unread_open_clip_tensors"]


_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_THIRDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


def open_clip_places(names: Iterable[str], prefix: str) -> dict[str, Place]:
    """Name in a CLIPTextModel or CLIPTextModelWithProjection -> its place in the original file.

    Raises:
        ValueError: a name that the original layout has no place for.
    """
    return {name: _place(name.removeprefix("text_model."), prefix) for name in names}


def _place(name: str, prefix: str) -> Place:
    if name in _ENDS:
        return Place(prefix + _ENDS[name])
    if name == "text_projection.weight":
        return Place(prefix + "text_projection", turned=True)
    if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        block, part, end = f"{prefix}transformer.resblocks.{match[1]}.", match[2], match[3]
        if part in _LAYER:
            return Place(f"{block}{_LAYER[part]}.{end}")
        attention, _, projection = part.partition(".")
        if attention == "self_attn" and projection in _THIRDS:
            return Place(f"{block}attn.in_proj_{end}", third=_THIRDS[projection])
    raise ValueError(f"{name}: no place in the original OpenCLIP layout")


def open_clip_config(shapes: Shapes, prefix: str, *, penultimate: bool) -> dict[str, Any]:
    """What the shapes say of the encoder's configuration.

    Args:
        penultimate: the model reads the last layer but one, and the configuration counts the layers that are read. A file
            without `text_projection` was written from such a model and holds no more than those.
    Raises:
        KeyError, ValueError: they are not those of an OpenCLIP text encoder.
    """
    vocab_size, width = shapes[prefix + "token_embedding.weight"]
    layers = count_numbers(shapes, prefix + "transformer.resblocks.")
    config = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shapes[prefix + "transformer.resblocks.0.mlp.c_fc.weight"][0],
        "max_position_embeddings": shapes[prefix + "positional_embedding"][0],
        "num_hidden_layers": layers,
    }
    if not penultimate:
        return config | {"projection_dim": shapes[prefix + "text_projection"][1]}
    if prefix + "text_projection" in shapes:
        config["num_hidden_layers"] = layers - 1
    return config


def unread_open_clip_tensors(tensors: Mapping[str, Tensor], prefix: str, num_layers: int) -> dict[str, Tensor]:
    """What a file of a model that reads the last layer but one holds beyond what is read: one more layer, the projection.

    Programs that build all layers before they read a file look for it; no result depends on its numbers.

    Args:
        tensors: the encoder's tensors as the file names them.
        num_layers: of the layers that are read; the last of them is written once more.
    """
    import torch

    last = f"{prefix}transformer.resblocks.{num_layers - 1}."
    unread = f"{prefix}transformer.resblocks.{num_layers}."
    added = {unread + name.removeprefix(last): tensors[name].clone() for name in tensors if name.startswith(last)}
    width = tensors[prefix + "ln_final.bias"]
    added[prefix + "text_projection"] = torch.eye(len(width), dtype=width.dtype)
    return added
