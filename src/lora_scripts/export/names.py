"""How the layers of a model are spelt in LoRA files.

Inside the program a layer is `component.path.of.the.module` with the real names of the loaded model. kohya files write
`.` as `_`, which cannot be undone without those names; and CLIP's text encoder is `text_model.encoder...` in every file
whether or not the installed transformers still has a module called `text_model`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "KOHYA_PREFIXES",
    "LANGUAGE_MODEL",
    "LayerShapes",
    "file_path",
    "kohya_name",
    "layer_shapes",
    "split_layer",
    "wrapped_layer",
]

KOHYA_PREFIXES: Mapping[str, str] = {"unet": "lora_unet", "text_encoder": "lora_te"}
"""Component to key prefix in a kohya file of Stable Diffusion 1 and 2."""

LANGUAGE_MODEL = "language_model"
"""The component that is a whole language model of transformers."""

LayerShapes = Mapping[str, tuple[int, ...]]
"""Layer name with its component in front, to the shape of its weight."""

_CLIP_CHILDREN = ("encoder.", "embeddings.", "final_layer_norm")
_ADAPTER_CHILD = re.compile(r"(^|\.)lora_[A-Za-z_]+(\.|$)")


def split_layer(name: str) -> tuple[str, str]:
    """("unet", "mid_block.attentions.0.proj_in") from "unet.mid_block.attentions.0.proj_in"."""
    component, _, path = name.partition(".")
    return component, path


def file_path(component: str, path: str) -> str:
    """The module path as files spell it: a CLIP text encoder's layers stand under `text_model`.

    transformers 5 made CLIPTextModel flat; the files of all readers keep the older, nested names.
    """
    if component.startswith("text_encoder") and path.startswith(_CLIP_CHILDREN):
        return f"text_model.{path}"
    return path


def kohya_name(layer: str, prefixes: Mapping[str, str]) -> str:
    """The layer's name in a kohya file, without a suffix: `lora_unet_mid_block_attentions_0_proj_in`.

    Raises:
        KeyError: the layer's component has no prefix.
    """
    component, path = split_layer(layer)
    return f"{prefixes[component].rstrip('_')}_{file_path(component, path).replace('.', '_')}"


def layer_shapes(components: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Every linear and convolution layer of the components with the shape of its weight.

    An adapter that is attached already is looked through: its own small layers are left out, and a layer it wraps
    keeps the name it had before.
    """
    import torch

    from lora_scripts.adapters.layers import weight_shape

    shapes: dict[str, tuple[int, ...]] = {}
    for component, root in components.items():
        for path, module in root.named_modules():
            if _ADAPTER_CHILD.search(path):
                continue
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                name = path.removesuffix(".base_layer").removesuffix(".base")
                shapes[f"{component}.{name}"] = weight_shape(module)
    return shapes


def wrapped_layer(module: nn.Module) -> Any:
    """The layer that an adapter, ours or PEFT's, stands around; the module itself where there is none."""
    for attribute in ("base_layer", "base"):
        inner = getattr(module, attribute, None)
        if inner is not None:
            return inner
    return module


def as_shapes(layers: Iterable[str]) -> dict[str, tuple[int, ...] | None]:
    """Layer name to shape, or to None where only names were given."""
    if isinstance(layers, Mapping):
        return {name: tuple(shape) for name, shape in layers.items()}
    return dict.fromkeys(layers)
