"""How the layers of a model are spelt in LoRA files.

Inside the program a layer is `component.path.of.the.module` with the real names of the loaded model. kohya files write
`.` as `_`, which cannot be undone without those names; and CLIP's text encoder is `text_model.encoder...` in every file
whether or not the installed transformers still has a module called `text_model`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "KOHYA_NAMING",
    "LANGUAGE_MODEL",
    "FileNames",
    "KohyaNaming",
    "LayerShapes",
    "file_path",
    "kohya_file_names",
    "kohya_layer_names",
    "layer_shapes",
    "split_layer",
    "wrapped_layer",
]


@dataclass(frozen=True)
class KohyaNaming:
    """How the kohya files of a family spell their layers.

    Attributes:
        prefixes: component -> beginning of its keys.
        original_unet: whether the U-Net's layers have the names of the original single file.
    """

    prefixes: Mapping[str, str]
    original_unet: bool = False


KOHYA_NAMING: Mapping[str, KohyaNaming] = {
    "sd15": KohyaNaming({"unet": "lora_unet", "text_encoder": "lora_te"}),
    "sd2": KohyaNaming({"unet": "lora_unet", "text_encoder": "lora_te"}),
    "sdxl": KohyaNaming(
        {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}, original_unet=True
    ),
}
"""By family."""

FileNames = Mapping[str, str]
"""Layer name with its component in front, to its name in a kohya file, without a suffix."""

LANGUAGE_MODEL = "language_model"
"""The component that is a whole language model of transformers."""

LayerShapes = Mapping[str, tuple[int, ...]]
"""Layer name with its component in front, to the shape of its weight."""

_NO_PLACE = ("text_projection",)
"""Layers that not every reader knows, so that no file holds them."""

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


def kohya_file_names(components: Mapping[str, nn.Module], family: str = "sd15") -> dict[str, str]:
    """Every layer of a model that a kohya file has a place for -> its name there, without a suffix.

    Args:
        components: "unet", "text_encoder", ...; an adapter that is attached already is looked through.
        family: "sd15", "sd2" or "sdxl".
    """
    return kohya_layer_names(layer_shapes(components), family)


def kohya_layer_names(layers: Iterable[str], family: str = "sd15") -> dict[str, str]:
    """As `kohya_file_names`, from the names of the layers; those that a kohya file has no place for are left out.

    Args:
        layers: with their component in front. For a U-Net with the original's names (SDXL) they must be all layers of it,
            because its blocks are numbered through.
    Raises:
        ValueError: the original U-Net has no such block.
    """
    names: dict[str, str] = {}
    naming = KOHYA_NAMING[family]
    of_component: dict[str, list[str]] = {}
    for layer in layers:
        of_component.setdefault(split_layer(layer)[0], []).append(layer)
    for component, members in of_component.items():
        if component not in naming.prefixes:
            continue
        prefix, paths = naming.prefixes[component], [split_layer(layer)[1] for layer in members]
        if component == "unet" and naming.original_unet:
            spelt = _original_paths(paths)
        else:
            spelt = {path: file_path(component, path) for path in paths if path not in _NO_PLACE}
        names |= {f"{component}.{path}": f"{prefix}_{name.replace('.', '_')}" for path, name in spelt.items()}
    return names


def _original_paths(paths: Iterable[str]) -> dict[str, str]:
    from lora_scripts.models.unet_layout import UNET_PREFIX, unet_names

    places = unet_names(f"{path}.weight" for path in paths)
    return {
        path.removesuffix(".weight"): place.removeprefix(UNET_PREFIX).removesuffix(".weight")
        for path, place in places.items()
    }


def layer_shapes(components: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Every linear and convolution layer of the components with the shape of its weight.

    An adapter that is attached already is looked through: its own small layers are left out, and a layer it wraps
    keeps the name it had before.
    """
    import torch

    from lora_scripts.adapters.layer import weight_shape

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
