"""The layers of the published models from their real modules: what the layer tables are made from, and proved by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.adapter_files.reference import ReferenceLayer
from lora_scripts.export.names import file_path, split_layer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["built_layers"]


def built_layers(architecture: str) -> list[ReferenceLayer]:
    """The same rows from the real modules, built on the meta device: what the data files are made from and proved by."""
    from lora_scripts.export.names import kohya_layer_names, layer_shapes
    from lora_scripts.models.unet_layout import UNET_PREFIX, unet_names

    shapes = layer_shapes(_modules(architecture))
    kohya = kohya_layer_names(shapes, architecture)
    places = unet_names(f"{split_layer(layer)[1]}.weight" for layer in shapes if layer.startswith("unet."))
    rows = []
    for layer, shape in shapes.items():
        component, path = split_layer(layer)
        place = places.get(f"{path}.weight", "") if component == "unet" else ""
        original = place.removeprefix(UNET_PREFIX).removesuffix(".weight")
        rows.append(ReferenceLayer(f"{component}.{file_path(component, path)}", shape, kohya.get(layer, ""), original))
    return rows


def _modules(architecture: str) -> dict[str, nn.Module]:
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from lora_scripts.models.published import published_config

    with torch.device("meta"):
        modules: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel.from_config(published_config("unet", architecture)),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**published_config("text_encoder", architecture))),
        }
        if architecture == "sdxl":
            config = CLIPTextConfig(**published_config("text_encoder_2", architecture))
            modules["text_encoder_2"] = CLIPTextModelWithProjection(config)
    return modules
