"""The components that a Stable Diffusion is built of: their configurations, and the modules without their weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ModelError
from lora_scripts.models.published import published_config
from lora_scripts.models.recognise import read_json
from lora_scripts.models.sd_layout import LAYOUTS, FileLayout, derive_config
from lora_scripts.models.unet_layout import UNET_PREFIX
from lora_scripts.models.weights_file import WeightsHeader, inspect_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_scripts.models.source import BaseModel

__all__ = ["CONFIG_KEY", "build_component", "component_configs"]

CONFIG_KEY = "lora_scripts.config"
"""Header entry of our single files: the parts' configurations as JSON, for what tensor shapes do not show."""


def build_component(part: str, config: Mapping[str, Any], name: str) -> Any:
    """One component of a model on the meta device: all shapes, no memory.

    Args:
        part: "unet" (UNet2DConditionModel), "vae" (AutoencoderKL), "text_encoder" (CLIPTextModel) or "text_encoder_2"
            (CLIPTextModelWithProjection): our own classes, or those of diffusers and transformers where a configuration asks for
            more than our own have.
        name: of the model, for messages.

    Raises:
        ModelError: the configuration describes no such module.
    """
    import torch

    try:
        with torch.device("meta"):
            return {"unet": _unet, "vae": _autoencoder}.get(part, _text_encoder)(part, config)
    except Exception as error:  # the libraries check their settings with whatever exception is at hand
        raise ModelError(
            f"{name}: the configuration of its {part} is not valid: {str(error).splitlines()[0]}"
        ) from None


def _unet(part: str, config: Mapping[str, Any]) -> Any:
    from lora_scripts.models.networks.unet import UNet2DConditionModel

    if UNet2DConditionModel.can_be(config):
        return UNet2DConditionModel(config)
    import diffusers

    return diffusers.UNet2DConditionModel.from_config(dict(config))


def _autoencoder(part: str, config: Mapping[str, Any]) -> Any:
    from lora_scripts.models.networks.autoencoder import AutoencoderKL

    if AutoencoderKL.can_be(config):
        return AutoencoderKL(config)
    import diffusers

    return diffusers.AutoencoderKL.from_config(dict(config))


def _text_encoder(part: str, config: Mapping[str, Any]) -> Any:
    from lora_scripts.models.networks.clip_text import CLIPTextModel, CLIPTextModelWithProjection

    own = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
    if own.can_be(config):
        return own(config)
    import transformers

    text_class = getattr(transformers, own.__name__)
    return text_class(transformers.CLIPTextConfig.from_dict(dict(config)))


def component_configs(source: BaseModel) -> dict[str, dict[str, Any]]:
    """Configuration of each component of a model, and of its "scheduler".

    Raises:
        ModelError: a file of the folder is missing, or the shapes in the single file describe no such model.
    """
    layout = LAYOUTS[source.family]
    if source.kind == "single_file":
        return _single_file_configs(inspect_weights(source.path), layout, source)
    configs = {part: dict(read_json(source.path / part / "config.json", source.name)) for part in layout.components}
    file = source.path / "scheduler" / "scheduler_config.json"
    schedule = dict(read_json(file, source.name)) if file.is_file() else published_config("scheduler", layout.family)
    return {**configs, "scheduler": schedule}


def _single_file_configs(header: WeightsHeader, layout: FileLayout, source: BaseModel) -> dict[str, dict[str, Any]]:
    """Configuration of each part and of the scheduler: published, then what the header says, then what the shapes say."""
    written: dict[str, dict[str, Any]] = {part: {} for part in (*layout.components, "scheduler")}
    if CONFIG_KEY in header.metadata:
        try:
            for part, config in json.loads(header.metadata[CONFIG_KEY]).items():
                written[part].update(config)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise ModelError(f"{source.name}: the header entry {CONFIG_KEY} is damaged. Write the file anew.") from None
    if source.prediction_type == "v_prediction" and layout.velocity_sample_size is not None:
        written["unet"].setdefault("sample_size", layout.velocity_sample_size)
    shapes = {key: info.shape for key, info in header.tensors.items()}
    configs = {"scheduler": {**published_config("scheduler", layout.family), **written["scheduler"]}}
    for part in layout.components:
        if part == "unet" and not any(key.startswith(UNET_PREFIX) for key in shapes):
            # Only the running average is there, under names without dots: which block a shape belongs to cannot be told.
            configs[part] = {**published_config(part, layout.family), **written[part]}
        else:
            configs[part] = derive_config(part, shapes, written[part], layout.family)
    return configs
