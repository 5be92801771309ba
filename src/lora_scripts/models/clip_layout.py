"""How OpenAI's CLIP text encoder lies in single files: by the names of huggingface/transformers behind a prefix.

Source: the module structure of huggingface/transformers, as CompVis/stable-diffusion and
Stability-AI/generative-models (`modules/encoders/modules.py`) hold it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_scripts.models.layout_names import Shapes, count_numbers, one_to_one

__all__ = ["clip_config", "clip_names"]


def clip_names(names: Iterable[str], prefix: str, *, with_text_model: bool = True) -> dict[str, str]:
    """Name in a CLIPTextModel -> name in the original file.

    Args:
        prefix: what the file puts in front of the encoder's names.
        with_text_model: False for files made before transformers 4 gave its names a `text_model.` in front.
    """
    middle = "text_model." if with_text_model else ""
    return one_to_one(names, lambda name: middle + name.removeprefix("text_model."), prefix)


def clip_config(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """What the shapes say of the encoder's configuration.

    Raises:
        KeyError, ValueError: they are not those of a CLIP text encoder.
    """
    prefix += "text_model." if any(name.startswith(prefix + "text_model.") for name in shapes) else ""
    vocab_size, width = shapes[prefix + "embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shapes[prefix + "encoder.layers.0.mlp.fc1.weight"][0],
        "max_position_embeddings": shapes[prefix + "embeddings.position_embedding.weight"][0],
        "num_hidden_layers": count_numbers(shapes, prefix + "encoder.layers."),
    }
